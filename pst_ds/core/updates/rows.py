"""Low-rank updates of looked-up rows of W0 (an embedding), and beta (x V') U' of inputs x as a separate product.

Names: n rows in the table, d its width, r the rank, N rows looked up; of a layer O outputs, I inputs, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.kernels import FLAGS, INT, POINTER, TENSOR, NativeSource, load
from pst_ds.core.scores import add_low_rank_

TILE_ELEMENTS = 1 << 22


def updated_rows(weight: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    """Return ``weight`` + beta ``left`` ``right``, (N, d), (N, r), (r, d) to (N, d), in the dtype of ``weight``.

    Sums are fp32 (fp64 for fp64), component by component, so a row is bit-identical alone and in the whole table.
    """
    out = torch.empty_like(weight)
    step = max(1, TILE_ELEMENTS // max(1, weight.shape[1]))
    high = torch.promote_types(weight.dtype, torch.float32)
    right = right.to(high)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        wide = weight[rows].to(high, copy=True)
        add_low_rank_(wide, left[rows].to(high), right, beta, torch.empty_like(wide))
        out[rows] = wide
    return out


def row_gradients(
    ids: Tensor, grad_y: Tensor, left: Tensor, right: Tensor, beta: float, *, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of U (n, r) and V (r, d) for ``ids`` (N,) and ``grad_y`` (N, d), in fp32 (fp64 for fp64).

        dU[i] = beta sum over {k : ids[k] = i} of grad_y[k] V'      dV = beta U[ids]' grad_y

    The row ``padding_idx`` has no gradient, as in ``torch.nn.Embedding``.
    """
    high = torch.promote_types(grad_y.dtype, torch.float32)
    grad = grad_y.to(high) * beta
    padding = -1 if padding_idx is None else padding_idx
    of_rows = grad @ right.to(high).t()
    grad_left = torch.ops.aten.embedding_dense_backward(of_rows, ids, left.shape[0], padding, False)
    kept = left[ids].to(high)
    if padding_idx is not None:
        kept = kept * (ids != padding_idx).unsqueeze(1)
    return grad_left, kept.t() @ grad


def beside(x: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    """Return beta (x V') U' of one user, (..., O), for x (..., I), U ``left`` (O, r) and V ``right`` (r, I)."""
    return beta * linear(linear(x, right), left)


def with_beside_each(y: Tensor, x: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    """Return y + beta (x V') U' with one user per sample, (B, ..., O), in the dtype of y.

    y (B, ..., O), x (B, ..., I), U (B, O, r) and V (B, r, I), in whose dtype it is computed.
    """
    samples = x.shape[0]
    inner = torch.bmm(x.reshape(samples, -1, x.shape[-1]).to(right.dtype), right.transpose(1, 2))
    rows = y.reshape(samples, -1, y.shape[-1]).to(left.dtype)
    return torch.baddbmm(rows, inner, left.transpose(1, 2), alpha=beta).to(y.dtype).view(y.shape)


SOURCE = NativeSource(
    "each.cpp",
    {"pst_add_beside_each": ([*([POINTER] * 2), *([INT] * 5), c_float, c_int, *([TENSOR] * 3), c_int, c_int], None)},
    "updates of users in a batch",
    flags=(
        *(flag for flag in FLAGS if flag != "-ffp-contract=off"),
        "-fassociative-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
    ),
    may_flags=("-fopenmp",),
)
DTYPES = (torch.bfloat16, torch.float32)
FEW_TOKENS = 4
"""Most tokens per sample for which the native product is used; for more, torch's matrix product is faster."""
library = cache(partial(load, SOURCE))


class EachBeside:
    """The updates of the samples of a batch for one layer: U (O, r) and V (r, I) of each, or None.

    All are on the CPU, of one shape and one of DTYPES. Contiguous ones are referenced, not copied.
    """

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor] | None], beta: float):
        self._factors = [None if pair is None else (pair[0].contiguous(), pair[1].contiguous()) for pair in factors]
        self._beta = beta
        some = next(pair for pair in self._factors if pair is not None)
        self._bytes, (self._outputs, self._rank), self._inputs = some[0].element_size(), some[0].shape, some[1].shape[1]
        pointers = c_void_p * len(self._factors)
        self._lefts = pointers(*(None if pair is None else pair[0].data_ptr() for pair in self._factors))
        self._rights = pointers(*(None if pair is None else pair[1].data_ptr() for pair in self._factors))

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + beta (x V') U', (B, ..., O), for y (B, ..., O) and x (B, ..., I), in the dtype of y.

        Sums are fp32. The result of a sample is bit-identical in every batch.
        """
        samples, tokens = len(self._factors), x[0].numel() // self._inputs
        has_gradient = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        native = library() if tokens <= FEW_TOKENS and y.dtype in DTYPES and not has_gradient else None
        if native is None:
            return torch.stack([self._one(i, y[i], x[i]) for i in range(samples)])
        x, y = x.to(y.dtype).contiguous(), y.contiguous()
        out = torch.empty_like(y)
        native.pst_add_beside_each(
            self._lefts, self._rights, samples, tokens, self._outputs, self._inputs, self._rank, self._beta,
            self._bytes, x, y, out, y.element_size(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _one(self, sample: int, y: Tensor, x: Tensor) -> Tensor:
        pair = self._factors[sample]
        if pair is None:
            return y
        high = torch.promote_types(y.dtype, torch.float32)
        left, right = (of.to(high) for of in pair)
        rows = torch.addmm(
            y.reshape(-1, self._outputs).to(high),
            x.reshape(-1, self._inputs).to(high) @ right.t(),
            left.t(),
            alpha=self._beta,
        )
        return rows.to(y.dtype).view(y.shape)
