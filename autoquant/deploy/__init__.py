"""Forms of an artifact for runtimes other than onnxruntime, made from the ONNX file alone."""
