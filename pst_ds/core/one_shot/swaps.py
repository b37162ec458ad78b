"""Masks refined by swaps: exchange a kept and a pruned weight of a row if the row's outputs then change less.

    E = d H d' of a row, d = w - v: target minus current weights, v = 0 where pruned        arXiv 2512.10922

Removing the kept weight j changes E by v_j^2 H_jj + 2 v_j c_j, with c = H d; adding the pruned weight p with the value
u then changes it by u^2 H_pp - 2 u (c_p + v_j H_jp). Both are exact: a swap is made only if E falls, and two rows of H
update c. u is w_p, the original weight, or, for methods that change weights, the value that lowers E most; kept weights
are then fitted to the mask by least squares. H = X'X, (I, I), is the Gram matrix of a layer's inputs X over all
calibration tokens; O = out_features, I = in_features.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from pst_ds.core.kernels import INT, TENSOR, NativeSource, load
from pst_ds.core.one_shot.gram import UnitGram, least_squares
from pst_ds.core.one_shot.scored import Compensated
from pst_ds.core.patterns import Pattern

LEAST_GAIN = 1e-6
"""Fraction of a row's error that a swap must save, above the rounding error of fp32."""
SOURCE = NativeSource(
    "swaps.cpp", {"pst_swap_pass": ([*([TENSOR] * 6), *([INT] * 5)], INT)}, "swaps of a mask", may_flags=("-fopenmp",)
)
library = cache(partial(load, SOURCE))


def refine_by_swaps(
    weight: Tensor, start: Compensated, inputs: UnitGram, pattern: Pattern, passes: int, *, refit: bool
) -> Compensated:
    """Swap kept with pruned weights of ``start`` until no swap helps, in at most ``passes`` over every row.

    ``weight``: (O, I), before pruning. In a pass every kept weight, from first to last, is swapped with the pruned
    weight that lowers the error of its row most, if any does. Every row, and with N:M every group, keeps its sparsity.
    With ``refit`` kept weights are then fitted to the mask, starting from ``start``. No row's error exceeds its error
    with ``start``. Among equal swaps the lowest index wins.

    Raises ValueError for blocks and for patterns that pool matrices, and FloatingPointError for a weight that is not
    finite.
    """
    if pattern.kind not in ("matrix", "row", "n:m"):
        raise ValueError(f'swaps are for the patterns "matrix", "row" and N:M, not {str(pattern)!r}')
    wanted = weight.to(torch.float32) * inputs.norms
    if not bool(torch.isfinite(wanted).all()):
        raise FloatingPointError("weights are not finite")
    span = pattern.m or weight.shape[1]
    live = wanted.masked_fill(inputs.dead, 0.0)
    keep, values = (
        start.keep.clone(memory_format=torch.contiguous_format),
        start.weight.to(torch.float32) * inputs.norms,
    )
    before = _row_errors(live, values, inputs)
    pulled = wanted @ inputs.gram
    for _ in range(passes):
        if refit:
            values = least_squares(values, keep, pulled, inputs.gram)
        values.masked_fill_(inputs.dead, 0.0)
        pull, errors = _pull(live, values, inputs)
        least = (errors * LEAST_GAIN).to(torch.float32)
        if not _swap_pass(live, values, keep, pull, least, inputs.gram, span, refit=refit):
            break
    if refit:
        values = least_squares(values, keep, pulled, inputs.gram)
    is_better = (_row_errors(live, values, inputs) < before).unsqueeze(1)
    keep = torch.where(is_better, keep, start.keep)
    if not refit:
        return Compensated(weight.masked_fill(keep == 0, 0.0), keep)
    fitted = (values / inputs.norms).masked_fill_(keep == 0, 0.0)
    return Compensated(torch.where(is_better, fitted, start.weight.to(torch.float32)), keep)


def _pull(wanted: Tensor, values: Tensor, inputs: UnitGram) -> tuple[Tensor, Tensor]:
    """Return c = H d, (O, I) fp32, the output error seen from every input, and the errors of the rows, (O,) double."""
    lacking = (wanted - values).to(torch.float64)
    pull = lacking @ inputs.gram.to(torch.float64)
    return pull.to(torch.float32), (pull * lacking).sum(1).clamp_(min=0.0)


def _row_errors(live: Tensor, values: Tensor, inputs: UnitGram) -> Tensor:
    """Return the error of every row's outputs, over inputs that are not dead: (O,) double."""
    return _pull(live, values.masked_fill(inputs.dead, 0.0), inputs)[1]


def _swap_pass(
    wanted: Tensor, values: Tensor, keep: Tensor, pull: Tensor, least: Tensor, gram: Tensor, span: int, *, refit: bool
) -> int:
    """Make the swaps of one pass over all rows, in place. Return their number."""
    tensors = wanted, values, keep, pull, least, gram
    native = library() if all(each.device.type == "cpu" for each in tensors) else None
    if native is None:
        return _swap_pass_in_torch(*tensors, span, refit=refit)
    assert all(each.is_contiguous() for each in tensors)
    return int(native.pst_swap_pass(*tensors, *wanted.shape, span, refit, torch.get_num_threads()))


def _swap_pass_in_torch(
    wanted: Tensor, values: Tensor, keep: Tensor, pull: Tensor, least: Tensor, gram: Tensor, span: int, *, refit: bool
) -> int:
    """Process all rows at once, one input after another: bit-identical to the native loop."""
    swaps = 0
    for j in range(wanted.shape[1]):
        first = j // span * span
        within = slice(first, first + span)
        left, lacking = values[:, j], pull[:, j]
        pulls = pull[:, within] + left.unsqueeze(1) * gram[j, within]
        scores = -(pulls * pulls) if refit else wanted[:, within] * (wanted[:, within] - (pulls + pulls))
        scores.masked_fill_(keep[:, within] != 0, torch.inf)
        at = scores.argmin(1, keepdim=True)  # the first of equal scores
        change = left * (lacking + lacking + left) + scores.gather(1, at).squeeze(1)
        rows = ((keep[:, j] != 0) & (change < -least)).nonzero().squeeze(1)
        if not len(rows):
            continue
        back_at = at[rows, 0] + first
        back = pulls[rows, at[rows, 0]] if refit else wanted[rows, back_at]
        pull[rows] = (pull[rows] + left[rows].unsqueeze(1) * gram[j]) - back.unsqueeze(1) * gram[back_at]
        values[rows, j], keep[rows, j] = 0.0, 0
        values[rows, back_at], keep[rows, back_at] = back, 1
        swaps += len(rows)
    return swaps
