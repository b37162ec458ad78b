"""Names of packed formats and of values, for those that must not wait for torch.

:data:`pst_ds.formats.FORMATS` and :mod:`pst_ds.core.quantization` are what they name.
"""

DENSE = "dense"
PACKINGS = ("bitmask", "2:4", "csr")
COMPRESSED_TENSORS = "compressed-tensors"
"""Dense matrices on a grid, as the library of that name reads them; inputs have the model's dtype."""
COMPRESSED_TENSORS_W8A8 = "compressed-tensors-w8a8"
"""The same in int8, a scale a row, of layers whose inputs are rounded to int8 too, token by token."""
FOR_COMPRESSED_TENSORS = (COMPRESSED_TENSORS, COMPRESSED_TENSORS_W8A8)
GGUF = "gguf"
"""One file for llama.cpp; blocks of 32 weights share a scale."""
ONNX = "onnx"
"""One file for ONNX Runtime, whose sparse products are operators of ours."""
ONNX_FILE = "model.onnx"
"""Its name in an export's folder."""
QUANTIZED_PACKINGS = ("bitmask", "2:4", DENSE)
"""What holds values on a grid."""
VALUE_BITS = {"int8": 8, "int4": 4}
"""Values that are small integers times a scale, and the bits of one."""
GROUPS = (32, 64, 128)
WHOLE_ROW = "row"
"""What shares a scale: so many inputs of an output, or all of them."""
