"""The facts of one radiograph, the result of examining a file, and the UIDs of the SOP classes in use.

Plain values only. Must not import a DICOM library.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

# The SOP Instance UID of every result (SR, heatmap) begins with this root; admission rejects such objects.
RESULT_UID_ROOT = "1.2.826.0.1.3680043.8.498.7427."
RESULT_DEVICE = "cxrloop"  # ManufacturerModelName of our results
HEARTBEAT_ID = "CXRLOOP-HEARTBEAT"  # PatientID of the test image that checks the whole path and is never trained on

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # PS3.4 J.3.5: the well-known instance
COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"
DIGITAL_XRAY_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"
DIGITAL_XRAY_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.33"  # sent, never received
SOP_CLASSES = (COMPUTED_RADIOGRAPHY, DIGITAL_XRAY_PRESENTATION, DIGITAL_XRAY_PROCESSING, SECONDARY_CAPTURE)

Outcome = Literal["admitted", "rejected", "quarantined"]


@dataclass(frozen=True)
class Image:
    """Facts of one admitted image; `patient_key` is a pseudonym, no other identity is kept."""

    sop_uid: str
    sop_class: str
    study_uid: str
    patient_key: str
    identified: bool  # False: the pseudonym stands for the study only, so the image never enters the golden set
    view: str  # "PA" | "AP"
    acquired_at: str | None  # ISO 8601, local time of the device; with an offset only where the header has one
    modality: str
    transfer_syntax: str
    rows: int
    columns: int
    photometric: str
    sex: str | None  # "M" | "F"
    age_years: float | None
    scanner: str | None  # manufacturer and model
    sha256: str  # of transfer syntax UID + data set bytes, without the file meta
    pixel_sha256: str  # of the decoded stored values: equal for the same image in another lossless syntax
    heartbeat: bool


@dataclass(frozen=True)
class Examined:
    """The result of examining one file; `reason` names tag and value, and never a person."""

    outcome: Outcome
    reason: str | None
    sha256: str
    sop_uid: str | None = None
    study_uid: str | None = None
    patient_key: str | None = None
    view: str | None = None
    image: Image | None = None
    plate: np.ndarray | None = None  # uint8 [512, 512] when admitted
