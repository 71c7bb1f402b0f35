"""The model server: onnxruntime sessions behind HTTP."""
