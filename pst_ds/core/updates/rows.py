"""Low-rank updates of looked-up rows of W0 (an embedding).

Names: n rows in the table, d its width, r the rank, N rows looked up.
"""

import torch
from torch import Tensor

from pst_ds.core.scores import add_low_rank_

TILE_ELEMENTS = 1 << 22
"""Weights that are updated in one step, which needs two fp32 copies of them."""


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
    padding = -1  # torch's number for no padding
    if padding_idx is not None:
        padding = padding_idx
    of_rows = grad @ right.to(high).t()
    grad_left = torch.ops.aten.embedding_dense_backward(of_rows, ids, left.shape[0], padding, False)
    looked_up = left[ids].to(high)
    if padding_idx is not None:
        # torch ignores the padding in dU; here it is done for dV.
        looked_up = looked_up * (ids != padding_idx).unsqueeze(1)
    return grad_left, looked_up.t() @ grad
