"""DICOM side of cxrloop: receive, check, decode and keep chest films; knows no database and no model."""
