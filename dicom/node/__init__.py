"""The DICOM node: associations, C-STORE, C-ECHO, storage commitment, TLS. Must not import dicom.outgoing."""
