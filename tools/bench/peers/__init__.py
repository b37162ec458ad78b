"""pst-ds compared with ONNX Runtime, OpenVINO and llama.cpp."""
