"""Weights and inputs to prune by, and masks written out as loops."""

import math

import numpy as np
import torch

from pst_ds.core.one_shot.shares import ALONE, Share, keep_by_scores
from pst_ds.core.one_shot.sparsegpt import COLUMNS_AT_A_TIME, sparsegpt_of_share


def correlated_inputs(tokens, features, seed):
    """Correlated inputs of different sizes, (tokens, features) double."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, features)) @ (rng.standard_normal((features, features)) / math.sqrt(features))
    return mixed * rng.lognormal(0.0, 1.0, features)


def normal_weight(outputs, inputs, seed):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def without_smallest(scores, groups, count_of):
    """Mask of ones without the smallest of each group of flat positions, the first of equals going first."""
    keep = np.ones(scores.size, dtype=np.uint8)
    for group in groups:
        order = np.argsort(scores.ravel()[group], kind="stable")
        keep[np.asarray(group)[order[: count_of(len(group))]]] = 0
    return keep.reshape(scores.shape)


def ranked_together(shape, name):
    """Flat positions that are ranked against each other in a matrix (O, I), by pattern."""
    flat = np.arange(math.prod(shape)).reshape(shape)
    if name == "matrix":
        return [flat.ravel()]
    if name == "row":
        return list(flat)
    return list(flat.reshape(-1, int(name.partition(":")[2])))


def counter(name, sparsity):
    if ":" in name:
        n, m = map(int, name.split(":"))
        return lambda size: m - n
    return lambda size: math.floor(sparsity * size)


def output_error(change, gram):
    """||X D'||^2, the squared change of a layer's outputs for a change D of W, (O, I), with ``gram`` X'X, in double."""
    change = change.to(torch.float64)
    return float(((change @ gram.to(torch.float64)) * change).sum())


def sparsegpt(weight, factor, pattern, sparsity, columns=COLUMNS_AT_A_TIME, **options):
    """A matrix (O, I) that one rank prunes."""
    return sparsegpt_of_share(Share.of(weight, pattern, sparsity), factor, columns_at_a_time=columns, **options)


def keep_by_score(scores, layout, pattern, sparsity):
    """The mask of all matrices of a layer in storage order, each by itself, by what prunes a share of one."""
    keep = torch.empty(scores.shape, dtype=torch.uint8)
    for matrix in layout.matrices():
        own, kept = (values[matrix.rect.slices] for values in (scores, keep))
        own, kept = (own.t(), kept.t()) if layout.transposed else (own, kept)
        share = Share.of(own.contiguous(), pattern, sparsity)
        share.require_finite()
        kept.copy_(torch.cat(keep_by_scores([share.weight[rows] for rows in share.panels], share, ALONE)))
    return keep
