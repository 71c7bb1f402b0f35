"""DICOM: receive, check, decode, keep and send chest images. Must not import a database or a model."""
