"""Remove inputs of a matrix, such as the channels of a feed-forward layer.

A matrix W (O, I) has inputs X on the calibration data. The error of removing inputs is the squared change of its
outputs after the remaining columns have been fitted by least squares. Each round removes the columns of least error
(optimal brain surgeon; ZipLM, arXiv 2302.04089).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.one_shot.gram import damped_gram

COLUMNS_AT_ONCE = 16
"""Columns that a round removes: errors are computed anew after each round."""


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Moments of a layer's inputs X, (tokens, I), in double precision, for a layer with or without a bias."""

    gram: Tensor
    """(I, I): X'X; with a bias, of the inputs minus their mean, which the bias can replace."""
    mean: Tensor
    """(I,): 0 without a bias."""

    @classmethod
    def of(cls, gram: Tensor, total: Tensor | None, number: int) -> "InputMoments":
        """Return the moments, given X'X, the sum of X over the tokens, and the ``number`` of tokens.

        ``total``: None for a layer without a bias. Raises FloatingPointError for values that are not finite.
        """
        if not bool(torch.isfinite(gram).all()):
            raise FloatingPointError("inputs are not finite")
        if total is None:
            return cls(gram, torch.zeros_like(gram[0]))
        mean = total / number
        # The sum of (x - mean)(x - mean)' over the tokens. It cancels digits, hence double precision.
        return cls(gram - number * torch.outer(mean, mean), mean)


def by_second_order(weight: Tensor, gram: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the ``number`` inputs of ``weight`` (O, I) that stay. ``gram``: (I, I), of :class:`InputMoments`.

    Returns those inputs, ascending; the others, the least important first; and the error of each removal, fp64.
    """
    damped, _ = damped_gram(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    weight = weight.to(torch.float64, copy=True)
    left = torch.arange(weight.shape[1], device=weight.device)
    removed = [left[:0]]  # empty tensors, for the case that nothing is removed
    scores = [weight[0, :0]]
    while len(left) > number:
        count = min(len(left) - number, COLUMNS_AT_ONCE)
        # (columns left,): the error of removing only one, ||w_j||^2 / [H^-1]_jj
        errors = weight[:, left].square().sum(0) / inverse.diagonal()[left]
        order = errors.argsort(stable=True)  # stable: among equal errors the first column goes, on every device
        columns = left[order[:count]]
        removed.append(columns)
        scores.append(errors[order[:count]])
        left = left[order[count:].sort().values]
        # Eliminating the columns from H^-1 leaves the inverse for the others, and fits their weights by least squares.
        step = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (count, I)
        weight -= weight[:, columns] @ step
        inverse -= inverse[:, columns] @ step
    return left, torch.cat(removed), torch.cat(scores)


def refitted(weight: Tensor, moments: InputMoments, columns: Tensor) -> tuple[Tensor, Tensor, float]:
    """Fit the ``columns`` of ``weight`` (O, I) that stay, (kept,) int64, to the outputs of all, by least squares.

    Returns their values (O, kept) in fp64; what to add to the bias (O,), 0 without one; and the squared change of the
    outputs, relative to their squares, with a bias to their variance.
    """
    damped, _ = damped_gram(moments.gram)
    weight = weight.to(torch.float64)
    fitted = torch.linalg.solve(damped[columns][:, columns], damped[columns] @ weight.t()).t()  # (O, kept)
    change = weight.clone()
    change[:, columns] -= fitted
    # For rows w of W, the sum of w X'X w' is the sum of the squared outputs. The damping is for the solution only.
    outputs = ((weight @ moments.gram) * weight).sum()
    error = outputs  # without outputs nothing can change
    if outputs > 0:
        error = ((change @ moments.gram) * change).sum() / outputs
    # rounding can make a vanishing error negative
    return fitted, change @ moments.mean, float(error.clamp(min=0.0))
