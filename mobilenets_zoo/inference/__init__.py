"""Networks for inference: exact rewrites, their fast path in PyTorch, ONNX files."""
