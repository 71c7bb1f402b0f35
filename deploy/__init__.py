"""Sealed bundles, the signed pointer, the model server and its client. Must not import DICOM code, the ledger or torch."""
