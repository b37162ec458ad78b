"""Running sparse models: packed layers, the native decoder, ONNX Runtime, the HTTP server, and their benchmark."""
