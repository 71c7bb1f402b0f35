"""Words and codes for the chest and its frontal views, and an item of a code sequence."""

from pydicom.dataset import Dataset

CHEST_WORDS = {"CHEST", "THORAX", "LUNG", "LUNGS"}  # of BodyPartExamined, and as devices write it
# Thorax, chest, lung, thoracic cavity; in SNOMED CT and in the older SRT spelling
CHEST_CODES = {"51185008", "816094009", "39607008", "43799004", "T-D3000", "T-28000", "T-D3200"}
CHEST = ("816094009", "Chest")  # CID 4031
VIEWS = {  # CID 4010
    "PA": ("272479007", "postero-anterior"),
    "AP": ("399348003", "antero-posterior"),
    "LL": ("399173006", "left lateral"),
    "RL": ("399198007", "right lateral"),
}
VIEW_OF_CODE = {"399348003": "AP", "R-10206": "AP", "272479007": "PA", "R-10214": "PA", "R-40888": "PA"}


def code_item(value: str, meaning: str, scheme: str = "SCT") -> Dataset:
    """Return an item of a code sequence; the scheme is SNOMED CT by default."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
