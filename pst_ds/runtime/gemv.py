"""Products of few vectors with a bitmask weight on a GPU, without expanding it."""

from __future__ import annotations

import torch
from torch import Tensor

from pst_ds.core.kernels.launch import blocks, launch, serves

MOST_VECTORS = 8
"""In a product; the kernel reads the weight once for each vector, and more are faster with the weight expanded."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WORD = 32


def takes(x: Tensor, values: Tensor) -> bool:
    """Return whether the kernel computes the product of ``x`` (..., I) with a weight that has such ``values``."""
    columns = x.shape[-1]
    if values.dtype not in _DTYPES or x.dtype != values.dtype or not columns or columns % _WORD:
        return False
    return 0 < x.numel() // columns <= MOST_VECTORS and serves(x.device)


def bitmask_linear(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias: (..., I) to (..., O) in the dtype of ``x``, with sums in fp32; see :func:`takes`."""
    from pst_ds.runtime import gemv_kernels as kernels

    rows, columns = bitmask.shape[0], x.shape[-1]
    vectors, num_words = x.numel() // columns, columns // _WORD
    shape = (vectors, blocks(num_words, kernels.WARP) * kernels.WARP, kernels.X_WORD)
    padded = x.new_zeros(shape, dtype=torch.float32)
    padded[:, :num_words, :_WORD] = x.reshape(vectors, num_words, _WORD)
    y = x.new_empty(vectors, rows)
    words = bitmask.contiguous().view(torch.int32)
    launch(
        kernels.bitmask_vector, (rows, vectors), padded, padded.stride(0), values, words, num_words, row_offsets, bias,
        y, rows, num_warps=1, fuse=True, UNROLL=kernels.UNROLL,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows)
