"""DICOM side of cxrloop: receive, check, decode and keep chest images; knows no database and no model."""
