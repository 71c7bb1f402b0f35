"""The C-STORE status for one received data set (PS3.4 B.2.3, PS3.7 C). The node and our own C-GET both use it."""

from typing import BinaryIO

from dicom.dataset import header
from dicom.dataset.part10 import NATIVE, UNDEFINED, is_uid, read_header
from dicom.errors import Unreadable

SUCCESS = 0x0000
INVALID_INSTANCE = 0x0117
NOT_SUPPORTED = 0x0122  # SOP class other than the presentation context's
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900  # data set does not match SOP class (or instance) of the command
NOT_UNDERSTOOD = 0xC000


def store_status(data_set: BinaryIO, syntax: str, sop_class: str, sop_uid: str) -> tuple[int, str]:
    """Return (status, reason) for a data set in `syntax` under the command's SOP class and instance UIDs.

    A storage node does not refuse an image by its content. A knee, or an image without pixels, is a Success here; the
    intake rejects or quarantines it later. Only a data set that is unreadable or contradicts its command is refused.
    """
    sop_class, sop_uid = sop_class.strip("\0 "), sop_uid.strip("\0 ")
    if not is_uid(sop_uid):
        return INVALID_INSTANCE, "AffectedSOPInstanceUID (0000,1000) is not a UID"
    try:
        received = read_header(data_set, syntax, pixels=False)
    except Unreadable as error:
        return NOT_UNDERSTOOD, str(error)
    uid = header.text(received.dataset, "SOPInstanceUID")
    if not is_uid(uid):
        return NOT_UNDERSTOOD, "SOPInstanceUID (0008,0018) is missing or not a UID"
    if uid != sop_uid:
        return MISMATCH, "SOPInstanceUID (0008,0018) is not the command's"
    if header.text(received.dataset, "SOPClassUID") != sop_class:
        return MISMATCH, "SOPClassUID (0008,0016) is not the command's"
    if received.pixel_length is not None and (received.pixel_length == UNDEFINED) == (syntax in NATIVE):
        return NOT_UNDERSTOOD, "PixelData (7FE0,0010) is not encoded as the transfer syntax says"
    return SUCCESS, ""
