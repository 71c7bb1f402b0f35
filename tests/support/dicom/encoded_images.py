"""Images in every transfer syntax, written by encoders of other projects."""

import imagecodecs
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from dicom.dataset.syntaxes import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    HTJ2K_LOSSLESS,
    IMPLICIT_LE,
    JPEG_2000_LOSSLESS,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    RLE,
)
from tests.support.dicom.pacs import chest, save, xray


def written_and_read(ds, tmp_path):
    """Return the image after writing it to a file and reading it back."""
    return dcmread(save(ds, tmp_path / "again.dcm"))


def encapsulated(ds, syntax, stream):
    """Return the data set with this code stream as its only fragment."""
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([bytes(stream)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def in_syntax(syntax, seed=0, bits=12, side=96):
    """Return an image in any lossless syntax, written by an encoder of another project."""
    pixels = chest(side, seed, bits)
    if syntax in (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG_2000_LOSSLESS, JPEG_LS):
        return xray(seed, side, bits, transfer_syntax=syntax)
    ds = xray(seed, side, bits)
    if syntax == RLE:
        ds.compress(RLELossless, generate_instance_uid=False)
        return ds
    if syntax == JPEG_LOSSLESS_SV1:
        return encapsulated(ds, syntax, imagecodecs.ljpeg_encode(pixels, bitspersample=bits))
    return encapsulated(ds, syntax, imagecodecs.htj2k_encode(pixels, reversible=True))


LOSSLESS = (
    EXPLICIT_LE,
    IMPLICIT_LE,
    EXPLICIT_BE,
    DEFLATED_LE,
    RLE,
    JPEG_LOSSLESS_SV1,
    JPEG_LS,
    JPEG_2000_LOSSLESS,
    HTJ2K_LOSSLESS,
)
