"""Examining changed images in tests: an image whose header is edited, and what the intake makes of it."""

from dicom.intake.examine import Admission, examine
from tests.support.dicom.pacs import KEY, save, xray

GROWN_UPS, EVERYONE = Admission(), Admission(children=True)


def examined(tmp_path, ds, rules=GROWN_UPS):
    """Save a data set as a file and return the result of its examination."""
    return examine(save(ds, tmp_path / "image.dcm"), KEY, rules)


def changed(**values):
    """Return an image with these header values; None removes the element. Its view stands in ViewPosition alone."""
    ds = xray()
    del ds.ViewCodeSequence, ds.AnatomicRegionSequence
    for keyword, value in values.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    return ds
