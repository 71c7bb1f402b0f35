"""Images in every transfer syntax, each written by an encoder that is not ours."""

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
    """The image written and read back, as it would come from a PACS."""
    return dcmread(save(ds, tmp_path / "again.dcm"))


def encapsulated(ds, syntax, stream):
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([bytes(stream)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def in_syntax(syntax, seed=0, bits=12, side=96):
    """One image in any lossless syntax, each written by somebody else's encoder."""
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
