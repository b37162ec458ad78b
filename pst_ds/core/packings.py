"""Names of packed formats and value types, for code that must not import torch.

:data:`pst_ds.formats.FORMATS` and :mod:`pst_ds.core.quantization` implement them.
"""

DENSE = "dense"
PACKINGS = ("bitmask", "2:4", "csr")
COMPRESSED_TENSORS = "compressed-tensors"
"""Dense quantised matrices, as the library compressed-tensors reads them. Activations have the model's dtype."""
COMPRESSED_TENSORS_W8A8 = "compressed-tensors-w8a8"
"""The same in int8 with per-row scales, for layers whose activations are quantised to int8 per token."""
FOR_COMPRESSED_TENSORS = (COMPRESSED_TENSORS, COMPRESSED_TENSORS_W8A8)
GGUF = "gguf"
"""One file for llama.cpp; blocks of 32 weights share a scale."""
ONNX = "onnx"
"""One file for ONNX Runtime, whose sparse products are our custom operators."""
ONNX_FILE = "model.onnx"
"""Name of the ONNX file in an export's folder."""
QUANTIZED_PACKINGS = ("bitmask", "2:4", DENSE)
"""Formats that can contain quantised values."""
VALUE_BITS = {"int8": 8, "int4": 4}
"""Bits per quantised value, by the name of its type."""
GROUPS = (32, 64, 128)
WHOLE_ROW = "row"
"""Group of a per-row scale, in place of a number of inputs."""
