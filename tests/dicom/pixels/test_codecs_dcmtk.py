"""Images encoded by dcmtk: our decoding compared with dcmtk, pylibjpeg and pydicom."""

import subprocess

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array

from dicom.dataset.syntaxes import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    HTJ2K,
    HTJ2K_RPCL,
    IMPLICIT_LE,
    JPEG_2000,
    JPEG_BASELINE,
    JPEG_EXTENDED,
    JPEG_LOSSLESS,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    JPEG_LS_NEAR,
    RLE,
    SYNTAXES,
)
from dicom.pixels.plate import decode
from tests.support.dicom.encoded_images import LOSSLESS
from tests.support.dicom.pacs import save

WRITTEN_BY_DCMTK = {
    # name: (command, its options, syntax, bits stored, largest difference to the image, to other decoders)
    "explicit little": ("dcmconv", "+te", EXPLICIT_LE, 15, 0, 0),
    "implicit little": ("dcmconv", "+ti", IMPLICIT_LE, 15, 0, 0),
    "big endian": ("dcmconv", "+tb", EXPLICIT_BE, 15, 0, 0),
    "big endian, 8 bits": ("dcmconv", "+tb", EXPLICIT_BE, 8, 0, 0),
    "deflated": ("dcmconv", "+td", DEFLATED_LE, 15, 0, 0),
    "RLE": ("dcmcrle", "", RLE, 15, 0, 0),
    "RLE, 8 bits": ("dcmcrle", "", RLE, 8, 0, 0),
    "JPEG lossless, SV1": ("dcmcjpeg", "+e1", JPEG_LOSSLESS_SV1, 15, 0, 0),
    "JPEG lossless, SV1, 8 bits": ("dcmcjpeg", "+e1", JPEG_LOSSLESS_SV1, 8, 0, 0),
    **{f"JPEG lossless, predictor {n}": ("dcmcjpeg", f"+el +sv {n}", JPEG_LOSSLESS, 15, 0, 0) for n in range(1, 8)},
    # before lossy compression, dcmcjpeg stretches the range of the image
    "JPEG baseline": ("dcmcjpeg", "+eb +q 95", JPEG_BASELINE, 8, 12, 2),
    "JPEG extended, 12 bits": ("dcmcjpeg", "+ee +bt +q 95", JPEG_EXTENDED, 12, 130, 3),
    "JPEG extended, 8 bits": ("dcmcjpeg", "+ee +q 95", JPEG_EXTENDED, 8, 12, 2),
    "JPEG-LS": ("dcmcjpls", "+el", JPEG_LS, 15, 0, 0),
    "JPEG-LS, 8 bits": ("dcmcjpls", "+el", JPEG_LS, 8, 0, 0),
    "JPEG-LS, near": ("dcmcjpls", "+en +md 2", JPEG_LS_NEAR, 15, 2, 0),
}
READERS = {"dcmcjpeg": "dcmdjpeg", "dcmcjpls": "dcmdjpls", "dcmcrle": "dcmdrle", "dcmconv": "dcmconv"}


def real(bits):
    """Return every eighth pixel of a real image, MONOCHROME1, with `bits` bits, and these pixels."""
    ds = dcmread(get_testdata_file("RG1_UNCR.dcm", download=False))
    pixels = ds.pixel_array[::8, ::8] >> (15 - bits)
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16 if bits > 8 else 8, bits, bits - 1
    ds.PixelData = pixels.astype("<u2" if bits > 8 else "u1").tobytes()
    ds["PixelData"].VR = "OW"
    return ds, pixels


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("name", WRITTEN_BY_DCMTK)
def test_images_encoded_by_dcmtk_decode_as_in_dcmtk_pylibjpeg_and_pydicom(tmp_path, name):
    command, options, syntax, bits, to_image, to_others = WRITTEN_BY_DCMTK[name]
    ds, pixels = real(bits)
    written, plain = tmp_path / "written.dcm", tmp_path / "plain.dcm"
    subprocess.run([command, *options.split(), save(ds, tmp_path / "image.dcm"), written], check=True)
    subprocess.run([READERS[command], "+te", written, plain], check=True)
    read = dcmread(written)
    assert read.file_meta.TransferSyntaxUID == syntax
    decoded = decode(read).astype(int)
    assert np.abs(decoded - pixels).max() <= to_image
    references = [dcmread(plain).pixel_array]
    if command != "dcmconv":
        references.append(pixel_array(read, raw=True, decoding_plugin="pylibjpeg"))
    for reference in references:
        assert np.abs(decoded - reference).max() <= to_others


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("command", ["dcmcjpeg", "dcmcjpls", "dcmcrle", "dcmconv +tb", "dcmconv +td"])
def test_signed_images_stay_signed_through_every_lossless_encoder_of_dcmtk(tmp_path, command):
    ds, pixels = real(12)
    ds.PixelRepresentation = 1
    signed = (pixels.astype(np.int16) << 4) >> 4  # the 12 bits read as a signed number
    ds.PixelData = signed.astype("<i2").tobytes()
    subprocess.run([*command.split(), save(ds, tmp_path / "image.dcm"), tmp_path / "written.dcm"], check=True)
    decoded = decode(dcmread(tmp_path / "written.dcm"))
    assert decoded.dtype == np.int16
    assert decoded.min() < 0
    assert (decoded == signed).all()


def test_every_syntax_of_the_node_is_tested():
    here = {*LOSSLESS, JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR, JPEG_2000, HTJ2K_RPCL, HTJ2K}
    assert set(SYNTAXES) == here | {row[2] for row in WRITTEN_BY_DCMTK.values()}


@pytest.mark.peer("dcmtk")
@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "JPGExtended.dcm", "bad_sequence.dcm", "JPEG-LL.dcm"])
def test_odd_jpegs_decode_as_dcmtk_decodes_them(tmp_path, name):
    path = get_testdata_file(name, download=False)
    subprocess.run(["dcmdjpeg", path, tmp_path / "plain.dcm"], check=True, capture_output=True)
    ds = dcmread(path)
    lossy = ds.file_meta.TransferSyntaxUID == JPEG_EXTENDED
    difference = np.abs(decode(ds).astype(int) - dcmread(tmp_path / "plain.dcm").pixel_array).max()
    assert difference <= (1 if lossy else 0)  # two roundings of one cosine transform
