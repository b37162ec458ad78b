"""The low-rank matrix U V that best restores the outputs which a pruned layer has lost.

    minimise tr((R - U V) H (R - U V)')     with R = W0 - M . W (O, I), and U (O, r), V (r, I)

H is the Gram matrix of the layer's inputs, so this is the squared error of its outputs over all calibration tokens
(SLiM, arXiv 2410.09615; 3BASiL, arXiv 2603.01376). With H = L L', U V L is the best approximation of R L of rank r,
which is its truncated singular value decomposition: U are the first left singular vectors, and V = U' R.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pst_ds.core.one_shot.gram import UnitGram


class LowRank(NamedTuple):
    """U and V of a product U V."""

    left: Tensor
    """(O, r) fp32."""
    right: Tensor
    """(r, I) fp32."""


def low_rank_fit(residual: Tensor, inputs: UnitGram, rank: int) -> LowRank:
    """Return the U V of a rank that minimises tr((R - U V) H (R - U V)').

    Column k of U and row k of V have equal norms, so that both train at the same rate.

    Args:
        residual: R, (O, I), in any float dtype.
        inputs: H, damped, for inputs with norm 1.
        rank: r, at least 1. Terms beyond the rank of R are 0.
    """
    scaled = residual.to(torch.float64) * inputs.norms
    gram = inputs.gram.to(torch.float64)
    vectors = _left_singular_vectors(scaled, gram, min(rank, *residual.shape))
    right = (vectors.t() @ residual.to(torch.float64)).contiguous()
    # Columns of U have norm 1, and rows of V have all of a term's norm. Half of it, in logarithms, moves to U.
    root = right.norm(dim=1).sqrt()
    left = vectors * root
    right /= torch.where(root > 0, root, 1.0).unsqueeze(1)
    missing = rank - len(root)
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return LowRank(left.to(torch.float32), right.to(torch.float32))


def output_error(residual: Tensor, inputs: UnitGram) -> float:
    """Return tr(R H R'), the squared change of the outputs that a change R (O, I) of the weight makes."""
    scaled = residual.to(torch.float32) * inputs.norms
    return float((scaled @ inputs.gram).mul_(scaled).sum(dtype=torch.float64))


def _left_singular_vectors(scaled: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return the first left singular vectors of ``scaled`` L, (O, rank), where ``gram`` = L L'. fp64.

    By an eigendecomposition of the smaller of the two products, which is several times as fast as a full SVD.
    """
    outputs, inputs = scaled.shape
    if outputs <= inputs:
        _, vectors = torch.linalg.eigh(scaled @ gram @ scaled.t())
        first: Tensor = vectors[:, -rank:].flip(1)  # eigenvalues ascend
        return first
    lower = torch.linalg.cholesky_ex(gram).L  # damped, so positive definite
    turned = scaled @ lower
    _, vectors = torch.linalg.eigh(turned.t() @ turned)
    # QR also makes vectors of singular values near 0 orthonormal, where a division would leave noise.
    left, triangle = torch.linalg.qr(turned @ vectors[:, -rank:].flip(1))
    return torch.where(triangle.diagonal() < 0, -left, left)
