"""The DICOM node: associations, C-STORE, C-ECHO, storage commitment, TLS.

Must import only dicom.dataset, dicom.store and dicom.errors.
"""
