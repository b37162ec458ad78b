"""Models with packed weights as ONNX graphs: ``pst-ds export --format onnx`` (docs/how-to/inference.md)."""
