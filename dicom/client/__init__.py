"""Asking other DICOM systems: query and retrieve over DIMSE and DICOMweb, sending objects."""
