"""A model's way into service: sealed bundles, the signed pointer, sessions, the inference server and its client.

Knows numpy, onnxruntime and HTTP; refuses to know DICOM, the ledger, the gate and torch.
"""
