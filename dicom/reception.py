"""The answer to a C-STORE, judged from command and header before anything is kept (PS3.4 B.2.3, PS3.7 C).

A pure function of the bytes received; the transport above it and the disk below it are not its business.
"""

from typing import BinaryIO

from dicom import header
from dicom.part10 import NATIVE, UNDEFINED, Unreadable, is_uid, read_header

SUCCESS = 0x0000
INVALID_INSTANCE = 0x0117
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900  # data set does not match SOP class (or instance) of the command
NOT_UNDERSTOOD = 0xC000


def answer(data_set: BinaryIO, syntax: str, sop_class: str, sop_uid: str) -> tuple[int, str]:
    """(status, why) for a data set received in `syntax` under the command's SOP class and instance UIDs.

    A storage node does not refuse by content: a knee, a film without pixels or with odd ones is a Success here,
    and set aside by the intake. Refused is only what can't be understood or contradicts its command.
    """
    sop_class, sop_uid = sop_class.strip("\0 "), sop_uid.strip("\0 ")
    if not is_uid(sop_uid):
        return INVALID_INSTANCE, "AffectedSOPInstanceUID (0000,1000) is not a UID"
    try:
        found = read_header(data_set, syntax, pixels=False)
    except Unreadable as error:
        return NOT_UNDERSTOOD, str(error)
    uid = header.text(found.dataset, "SOPInstanceUID")
    if not is_uid(uid):
        return NOT_UNDERSTOOD, "SOPInstanceUID (0008,0018) is missing or not a UID"
    if uid != sop_uid:
        return MISMATCH, "SOPInstanceUID (0008,0018) is not the command's"
    if header.text(found.dataset, "SOPClassUID") != sop_class:
        return MISMATCH, "SOPClassUID (0008,0016) is not the command's"
    if found.pixel_length is not None and (found.pixel_length == UNDEFINED) == (syntax in NATIVE):
        return NOT_UNDERSTOOD, "PixelData (7FE0,0010) is not encoded as the transfer syntax says"
    return SUCCESS, ""
