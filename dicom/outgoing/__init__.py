"""Objects that leave the site: structured reports, secondary captures, de-identified copies.

Must not import dicom.node, dicom.client or dicom.store.
"""
