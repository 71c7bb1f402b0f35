"""Codes for findings: a standard code where the site's name for the finding has one, else a code of our own scheme."""

import hashlib

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.sr.coding import Code

SCHEME = "99CXRLOOP"  # PS3.16 8.2: designators beginning with 99 are private

# SNOMED CT and DCM, by the words that sites use for chest images; words that fit two codes are left out
STANDARD = {
    "abnormal": Code("263654008", "SCT", "Abnormal"),
    "atelectasis": Code("46621007", "SCT", "Atelectasis"),
    "cardiomegaly": Code("8186001", "SCT", "Cardiomegaly"),
    "consolidation": Code("95436008", "SCT", "Lung consolidation"),
    "edema": Code("19242006", "SCT", "Pulmonary edema"),
    "effusion": Code("60046008", "SCT", "Pleural effusion"),
    "emphysema": Code("87433001", "SCT", "Pulmonary emphysema"),
    "fracture": Code("125605004", "SCT", "Fracture of bone"),
    "mass": Code("4147007", "SCT", "Mass"),
    "nodule": Code("27925004", "SCT", "Nodule"),
    "opacity": Code("112001", "DCM", "Opacity"),
    "oedema": Code("19242006", "SCT", "Pulmonary edema"),
    "pleural effusion": Code("60046008", "SCT", "Pleural effusion"),
    "pneumonia": Code("233604007", "SCT", "Pneumonia"),
    "pneumothorax": Code("36118008", "SCT", "Pneumothorax"),
    "pulmonary edema": Code("19242006", "SCT", "Pulmonary edema"),
    "pulmonary oedema": Code("19242006", "SCT", "Pulmonary edema"),
}


def finding_code(name: str) -> Code:
    """Return the code for a site's finding (1 to 64 letters, digits, blank, - and _)."""
    standard = STANDARD.get(name.lower().replace("_", " ").replace("-", " ").strip())
    return standard or own_code(name, name)


def own_code(value: str, meaning: str) -> Code:
    """Return a code of our private scheme; a value over 16 characters (SH) is cut and gets a hash."""
    if len(value) > 16:
        value = value[:9].strip() + "-" + hashlib.sha256(value.encode()).hexdigest()[:6]
    return Code(value, SCHEME, meaning[:64])


def schemes() -> list[CodingSchemeIdentificationItem]:
    """Return the CodingSchemeIdentificationSequence (0008,0110) for the private scheme (PS3.3 C.12.1.1.1.6)."""
    return [
        CodingSchemeIdentificationItem(
            SCHEME, name="cxrloop: findings as this site names them", responsible_organization="cxrloop"
        )
    ]
