"""One-shot masks against loops written out in double precision, and SparseGPT against a plain optimal brain surgeon."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot import (
    DAMPING,
    inverse_factor,
    keep_by_score,
    output_error,
    sparsegpt,
    wanda_scores,
)
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.select import keep_mask, prune_count

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
PATTERNS = ["matrix", "row", "2:4", "4:8"]


def _inputs(tokens, features, seed):
    """Correlated inputs of different sizes, (tokens, features) double."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, features)) @ (rng.standard_normal((features, features)) / math.sqrt(features))
    return mixed * rng.lognormal(0.0, 1.0, features)


def _weight(outputs, inputs, seed):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def _without_smallest(scores, groups, count_of):
    """Mask of ones without the smallest of each group of flat positions, the first of equals going first."""
    keep = np.ones(scores.size, dtype=np.uint8)
    for group in groups:
        order = np.argsort(scores.ravel()[group], kind="stable")
        keep[np.asarray(group)[order[: count_of(len(group))]]] = 0
    return keep.reshape(scores.shape)


def _groups(shape, name):
    """Flat positions that are ranked against each other in a matrix (O, I), by pattern."""
    flat = np.arange(math.prod(shape)).reshape(shape)
    if name == "matrix":
        return [flat.ravel()]
    if name == "row":
        return list(flat)
    return list(flat.reshape(-1, int(name.partition(":")[2])))


def _counter(name, sparsity):
    if ":" in name:
        n, m = map(int, name.split(":"))
        return lambda size: m - n
    return lambda size: math.floor(sparsity * size)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_wanda_keeps_what_a_loop_keeps(name, transposed):
    weight, x = _weight(12, 16, 1), _inputs(50, 16, 2)
    scores = np.empty((12, 16))
    for i in range(12):
        for j in range(16):
            scores[i, j] = abs(float(weight[i, j])) * math.sqrt(sum(float(v) ** 2 for v in x[:, j]))
    expected = _without_smallest(scores, _groups((12, 16), name), _counter(name, 0.5))
    stored = weight.t().contiguous() if transposed else weight
    found = wanda_scores(stored, torch.tensor(x).square().sum(0).sqrt(), transposed=transposed)
    keep = keep_by_score(found, WeightLayout(12, 16, transposed=transposed), parse_pattern(name), 0.5)
    assert keep.shape == stored.shape
    assert np.array_equal((keep.t() if transposed else keep).numpy(), expected)


@PROPERTY
@given(name=st.sampled_from(["matrix", "row", "2:4", "1:8", "4x2", "1x4"]), transposed=st.booleans(),
       parts=st.sampled_from([1, 3]), sparsity=st.floats(0.0, 0.99), seed=st.integers(0, 99))  # fmt: skip
def test_counts_are_exact_in_every_matrix_and_unit(name, transposed, parts, sparsity, seed):
    layout = WeightLayout(24, 16, transposed=transposed, num_matrices=parts)
    scores = torch.randint(0, 6, layout.shape, generator=torch.Generator().manual_seed(seed)).float()  # many equals
    keep = keep_by_score(scores, layout, parse_pattern(name), sparsity)
    keep = (keep.t() if transposed else keep).contiguous()
    pruned = (keep == 0).view(parts, 24 // parts, 16)
    if name == "matrix":
        assert (pruned.sum((1, 2)) == prune_count(sparsity, 24 // parts * 16)).all()
    elif name == "row":
        assert (pruned.sum(2) == prune_count(sparsity, 16)).all()
    elif ":" in name:
        n, m = map(int, name.split(":"))
        assert (pruned.view(parts, -1, m).sum(2) == m - n).all()
    else:
        outputs, inputs = map(int, name.split("x"))
        blocks = pruned.view(parts, 24 // parts // outputs, outputs, 16 // inputs, inputs).sum((2, 4))
        assert bool(((blocks == 0) | (blocks == outputs * inputs)).all())
        assert ((blocks > 0).sum((1, 2)) == prune_count(sparsity, blocks[0].numel())).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fused_matrix_is_ranked_by_itself_as_training_ranks_it(transposed):
    weight = _weight(12, 4, 3).round(decimals=1)
    weight[4:8] *= 100
    stored = weight.t().contiguous() if transposed else weight
    layout = WeightLayout(12, 4, transposed=transposed, num_matrices=3)
    keep = keep_by_score(stored.abs(), layout, parse_pattern("matrix"), 0.3)
    for block in layout.matrices():
        at = slice(block.rect.r0, block.rect.r1), slice(block.rect.c0, block.rect.c1)
        assert torch.equal(keep[at].bool(), keep_mask(stored[at].abs().contiguous(), prune_count(0.3, 16)))


def test_what_no_mask_can_be_made_of_is_refused():
    layout = WeightLayout(4, 6)
    with pytest.raises(ValueError, match="all layers together"):
        keep_by_score(torch.ones(4, 6), layout, parse_pattern("global"), 0.5)
    with pytest.raises(ValueError, match="in_features divisible by 4, got 6"):
        keep_by_score(torch.ones(4, 6), layout, parse_pattern("2:4"), 0.5)
    for bad in (math.nan, math.inf):
        for name in ("row", "matrix"):
            with pytest.raises(FloatingPointError):
                keep_by_score(torch.tensor([[1.0, bad], [0.0, 2.0]]), WeightLayout(2, 2), parse_pattern(name), 0.5)


# SparseGPT


def _surgeon(weight, gram, name, sparsity, together):
    """Optimal brain surgery from the first input to the last, (weight, mask): no Cholesky factor, no lazy blocks.

    Before input j the inverse of the Gram matrix of the inputs from j on is made anew; a pruned weight moves all
    weights of its row from j on by w_j / [H^-1]_jj times row j of that inverse.
    """
    left, (outputs, inputs) = weight.double().numpy().copy(), weight.shape
    damped = gram + DAMPING * np.mean(np.diag(gram)) * np.eye(inputs)
    inverses = [np.linalg.inv(damped[j:, j:]) for j in range(inputs)]
    keep = np.ones((outputs, inputs), dtype=np.uint8)
    for j in range(inputs):
        if j % together == 0:
            stop = min(j + together, inputs)
            saliency = np.stack([left[:, k] ** 2 / inverses[k][0, 0] for k in range(j, stop)], 1)
            before = _pruned_before(name, sparsity, outputs, j)
            counter = _counter(name, sparsity)
            if ":" not in name:
                wanted = _pruned_before(name, sparsity, outputs, stop) - before
                counter = lambda size, wanted=wanted: wanted  # noqa: E731
            keep[:, j:stop] = _without_smallest(saliency, _groups(saliency.shape, name), counter)
        move = np.where(keep[:, j] == 0, left[:, j], 0.0) / inverses[j][0, 0]
        left[:, j:] -= np.outer(move, inverses[j][0])
    return left * keep, keep


def _pruned_before(name, sparsity, outputs, inputs):
    return math.floor(sparsity * inputs * (outputs if name == "matrix" else 1))


@pytest.mark.parametrize(
    ("name", "sparsity", "columns"),
    [("matrix", 0.5, 64), ("matrix", 0.7, 16), ("row", 0.5, 64), ("row", 0.6, 12), ("row", 0.5, 1), ("2:4", 0.5, 64),
     ("2:4", 0.5, 8), ("4:8", 0.5, 20), ("1:4", 0.75, 128)],
)  # fmt: skip
def test_sparsegpt_is_the_plain_surgeon(name, sparsity, columns):
    weight, x = _weight(24, 64, 5), _inputs(300, 64, 6)
    together = int(name.partition(":")[2] or columns)
    expected, mask = _surgeon(weight, x.T @ x, name, sparsity, together)
    found, keep = sparsegpt(weight, inverse_factor(torch.tensor(x.T @ x)), parse_pattern(name), sparsity, columns)
    assert np.array_equal(keep.numpy(), mask)
    assert np.abs(found.double().numpy() - expected).max() < 2e-5 * np.abs(expected).max()
    assert bool((found[keep == 0].view(torch.int32) == 0).all())  # +0.0


@PROPERTY
@given(name=st.sampled_from(PATTERNS), outputs=st.integers(1, 9), groups=st.integers(1, 9),
       sparsity=st.floats(0.0, 0.99), columns=st.integers(1, 40), seed=st.integers(0, 99))  # fmt: skip
def test_sparsegpt_prunes_exactly_so_many(name, outputs, groups, sparsity, columns, seed):
    weight, x = _weight(outputs, 8 * groups, seed), torch.tensor(_inputs(40, 8 * groups, seed))
    _, keep = sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern(name), sparsity, columns)
    pruned = keep == 0
    if name == "matrix":
        assert int(pruned.sum()) == prune_count(sparsity, pruned.numel())
    elif name == "row":
        assert (pruned.sum(1) == prune_count(sparsity, 8 * groups)).all()
    else:
        n, m = map(int, name.split(":"))
        assert (pruned.view(-1, m).sum(1) == m - n).all()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_changes_the_outputs_least(name, seed):
    weight, x = _weight(64, 96, seed), torch.tensor(_inputs(1000, 96, seed + 10))
    gram, layout, pattern = x.T @ x, WeightLayout(64, 96), parse_pattern(name)
    by_size = keep_by_score(weight.abs(), layout, pattern, 0.5)
    wanda = keep_by_score(wanda_scores(weight, gram.diagonal().sqrt()), layout, pattern, 0.5)
    found, _ = sparsegpt(weight, inverse_factor(gram), pattern, 0.5)
    errors = [output_error(w - weight, gram) for w in (found, weight * wanda, weight * by_size)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


def test_output_error_is_the_change_of_all_outputs():
    x, change = torch.tensor(_inputs(30, 6, 1)), _weight(4, 6, 2)
    assert output_error(change, x.T @ x) == pytest.approx(float((x @ change.double().T).square().sum()))


def test_the_factor_is_that_of_the_damped_inverse_at_any_scale():
    x = torch.tensor(_inputs(100, 20, 8))
    gram = x.T @ x
    upper = inverse_factor(gram).upper.double()
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean() * torch.eye(20))
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-5, atol=1e-7 * float(inverse.max()))
    torch.testing.assert_close(inverse_factor(gram * 4.0**10).upper.double() * 2.0**10, upper, rtol=1e-6, atol=0.0)


def test_inputs_that_were_never_there_go_first_and_move_nothing():
    weight, x = _weight(6, 16, 4), torch.tensor(_inputs(60, 16, 4))
    x[:, [1, 6, 11]] = 0.0
    factor = inverse_factor(x.T @ x)
    assert factor.dead.nonzero().flatten().tolist() == [1, 6, 11]
    found, keep = sparsegpt(weight, factor, parse_pattern("row"), 3 / 16)
    assert (keep == 0).nonzero()[:, 1].view(6, 3).tolist() == [[1, 6, 11]] * 6
    assert torch.equal(found, weight * keep)


def test_sparsegpt_of_inputs_that_are_all_zero_is_a_mask_alone():
    weight = _weight(3, 8, 1)
    found, keep = sparsegpt(weight, inverse_factor(torch.zeros(8, 8)), parse_pattern("2:4"), 0.5)
    assert torch.equal(found, weight * keep)


def test_a_weight_that_is_zero_already_goes_first():
    weight, x = _weight(8, 32, 9), torch.tensor(_inputs(100, 32, 9))
    gone = keep_by_score(weight.abs(), WeightLayout(8, 32), parse_pattern("2:4"), 0.5) == 0
    weight[gone] = 0.0
    found, keep = sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern("2:4"), 0.5)
    assert torch.equal(keep == 0, gone)
    assert torch.equal(found, weight)  # nothing was lost, so nothing is made up for


def test_sparsegpt_refuses_what_it_cannot_do():
    factor = inverse_factor(torch.eye(6))
    for name in ("global", "2x1"):
        with pytest.raises(ValueError, match="SparseGPT has the patterns"):
            sparsegpt(torch.ones(2, 6), factor, parse_pattern(name), 0.5)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        sparsegpt(torch.ones(2, 6), factor, parse_pattern("2:4"), 0.5)
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        sparsegpt(torch.tensor([[1.0, math.nan]]), inverse_factor(torch.eye(2)), parse_pattern("row"), 0.5)
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        inverse_factor(torch.full((2, 2), math.inf))
    with pytest.raises(FloatingPointError, match="more damping"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
