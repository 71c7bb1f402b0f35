"""Synthetic chest images for the demo and the tests. Must import only dicom.dataset."""
