"""Sealed model bundles: contract, keys, signatures, the signed pointer, import of ONNX files."""
