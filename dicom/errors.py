"""Every exception class of the package `dicom`. Each exists because a caller catches that very class."""


class DicomError(Exception):
    """Base of all exceptions of this package. No message names a person or holds a UID."""


class Unreadable(DicomError, ValueError):
    """The bytes are not a readable DICOM file; the message names the first error."""


class BlankImage(DicomError, ValueError):
    """All pixels of the image, except padding, have the same value."""


class Rejected(DicomError):
    """A readable image that the admission rules reject; the message names tag and value."""


class Quarantined(DicomError):
    """The header contradicts itself or the pixels; a person must check the file."""


class NotExportable(DicomError):
    """The image must not leave the site; the message gives the reason."""


class HeaderIncomplete(DicomError, ValueError):
    """The image's header lacks an attribute that a valid result needs; the message names it."""


class ArchiveUnusable(DicomError):
    """The archive cannot serve this request, now or later; the message says what to change."""


class ArchiveBusy(DicomError):
    """The archive, or the connection to it, failed for now; retry after at least `after` seconds."""

    def __init__(self, why: str, after: float = 0):
        super().__init__(why)
        self.after = after


class ImageMissing(DicomError):
    """The archive does not deliver this one image; the others may still come."""


class AnswerTooLong(DicomError):
    """An HTTP answer is larger than its limit."""


class LookupFailed(DicomError):
    """It cannot be determined at the moment which images are stored; the message says why."""


class BadCertificate(DicomError, ValueError):
    """A certificate or key cannot be used; the message names the file and what to do."""


class ProtocolError(DicomError):
    """The peer violated the protocol or is too slow: send A-ABORT with `reason` (PS3.8 9.3.8)."""

    def __init__(self, reason: int, why: str):
        super().__init__(why)
        self.reason = reason


class ConnectionEnded(DicomError):
    """The connection to the peer ended."""


class AssociationEnded(DicomError):
    """This node aborted the association, or the peer sent no A-ASSOCIATE-RQ in time (ARTIM)."""
