"""int8 activations: inputs of a layer, quantised as in the kernels that use them, for training and inference.

    x  ~  q * scale        scale = largest / 127;  q = x * (127 / largest), rounded half to even

``largest`` is the largest |x| in a word of columns of a token: 64 columns, or 32 if groups of the weight have 32, so
that a weight's scale covers whole words. Everything is fp32, in this order, as ``quantize_to_bytes`` in
decoder/avx512.hpp computes it. Nothing is clipped, so the gradient passes straight through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.quantization.grid import Grid
from pst_ds.core.quantization.native import NATIVE_DTYPES, native_for, threads_for

INPUT_BITS = (8, 16)
"""Supported bits of a layer's inputs; 16-bit inputs are not quantised in training."""
_LARGEST = 127.0
_LEAST = 1e-30
"""A word without a larger magnitude is all zeros."""
_AT_A_TIME = 1 << 22
"""Numbers that torch quantises in one step."""


@dataclass(frozen=True, slots=True)
class InputGrid:
    """Quantisation of inputs to int8: which numbers of a token share a scale."""

    word: int
    """Consecutive columns that share a scale; the last word of a token may be shorter."""

    @classmethod
    def of(cls, grid: Grid) -> InputGrid:
        """Return the scheme for inputs that are multiplied with weights quantised by ``grid``."""
        return cls(32 if grid.group == 32 else 64)

    def rounded(self, x: Tensor) -> Tensor:
        """Return q * scale for every number of ``x`` (..., columns): a new tensor of its shape and dtype.

        Exact in fp32 up to one rounding, and rounded once more to a narrower dtype. A word with an infinity or a NaN
        becomes NaN.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        native = native_for(rows) if rows.dtype in NATIVE_DTYPES else None
        out = torch.empty_like(rows)
        if native is not None:
            native.pst_round_inputs(
                rows.data_ptr(),
                out.data_ptr(),
                NATIVE_DTYPES[rows.dtype],
                *rows.shape,
                self.word,
                threads_for(rows.numel()),
            )
            return out.view(x.shape)
        step = max(1, _AT_A_TIME // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            out[first : first + step] = self._rounded_in_torch(rows[first : first + step])
        return out.view(x.shape)

    def _rounded_in_torch(self, rows: Tensor) -> Tensor:
        columns = rows.shape[1]
        words = torch.nn.functional.pad(rows.float(), (0, -columns % self.word)).unflatten(1, (-1, self.word))
        largest = words.abs().amax(2, keepdim=True)
        is_zero = largest <= _LEAST  # false for NaN, whose scale is NaN
        # a tensor: torch divides a Python number by multiplying with the reciprocal
        most = torch.full_like(largest, _LARGEST)
        scale, inverse = (ratio.masked_fill_(is_zero, 0.0) for ratio in (largest / most, most / largest))
        rounded: Tensor = (words * inverse).round_().mul_(scale)
        return rounded.flatten(1)[:, :columns]
