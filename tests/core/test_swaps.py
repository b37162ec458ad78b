"""Masks refined by swaps against every single swap tried out, the best of all masks, and the loop in torch."""

import itertools
import math
import os
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot import swaps
from pst_ds.core.one_shot.alps import alps
from pst_ds.core.one_shot.gram import unit_gram
from pst_ds.core.one_shot.scored import Compensated, keep_by_score, wanda_scores
from pst_ds.core.one_shot.sparsegpt import inverse_factor, sparsegpt
from pst_ds.core.one_shot.swaps import refine_by_swaps
from pst_ds.core.patterns import parse_pattern
from tests.core.one_shot_references import output_error

from .one_shot_references import correlated_inputs, normal_weight
from .test_formats import Guarded

PATTERNS = ["matrix", "row", "2:4", "4:8"]
UNTIL_NOTHING_MOVES = 100


def _inputs(features, seed, tokens=200):
    x = torch.tensor(correlated_inputs(tokens, features, seed))
    return x.T @ x


def _damped(inputs):
    """The Gram matrix that errors are measured by, (I, I) double."""
    norms = inputs.norms.double()
    return norms[:, None] * inputs.gram.double() * norms


def _masked(weight, keep):
    return Compensated(weight * keep, keep)


def _wanda(weight, gram, pattern, sparsity):
    scores = wanda_scores(weight, gram.diagonal().sqrt())
    return _masked(weight, keep_by_score(scores, WeightLayout(*weight.shape), pattern, sparsity))


def _random_start(weight, pattern, sparsity, seed):
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return _masked(weight, keep_by_score(scores, WeightLayout(*weight.shape), pattern, sparsity))


def _row_errors(change, gram):
    return [output_error(row[None], gram) for row in change]


def _single_swaps(keep, span):
    """(kept, pruned) of a row whose weights may be swapped."""
    for kept, pruned in itertools.product(np.flatnonzero(keep), np.flatnonzero(keep == 0)):
        if kept // span == pruned // span:
            yield kept, pruned


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("start", ["wanda", "random"])
def test_in_the_end_no_single_swap_makes_a_rows_error_smaller(name, start):
    weight, gram, pattern = normal_weight(20, 16, 1), _inputs(16, 2), parse_pattern(name)
    inputs = unit_gram(gram)
    before = _wanda(weight, gram, pattern, 0.5) if start == "wanda" else _random_start(weight, pattern, 0.5, 3)
    made, h = refine_by_swaps(weight, before, inputs, pattern, UNTIL_NOTHING_MOVES, refit=False), _damped(inputs)
    for row, keep in zip(weight, made.keep.numpy(), strict=True):
        error = output_error((row * keep - row)[None], h)
        for kept, pruned in _single_swaps(keep, pattern.m or 16):
            swapped = keep.copy()
            swapped[[kept, pruned]] = 0, 1
            assert output_error((row * swapped - row)[None], h) >= error * (1 - 1e-5)


def test_of_all_masks_of_a_row_few_are_better():
    weight, gram, pattern = normal_weight(24, 10, 0), _inputs(10, 1), parse_pattern("row")
    inputs, start = unit_gram(gram), _wanda(normal_weight(24, 10, 0), gram, parse_pattern("row"), 0.5)
    made, h = refine_by_swaps(weight, start, inputs, pattern, UNTIL_NOTHING_MOVES, refit=False), _damped(inputs)
    best = 0.0
    for row in weight:
        masks = (torch.isin(torch.arange(10), torch.tensor(kept)) for kept in itertools.combinations(range(10), 5))
        best += min(output_error((row * mask - row)[None], h) for mask in masks)
    found, before = (output_error(each.weight - weight, h) for each in (made, start))
    assert best <= found * (1 + 1e-6)
    assert found < 1.1 * best
    assert found < 0.9 * before


@pytest.mark.parametrize("name", PATTERNS)
def test_in_the_end_no_single_swap_to_the_best_value_does_where_weights_are_fitted(name):
    weight, gram, pattern = normal_weight(20, 16, 1), _inputs(16, 2), parse_pattern(name)
    inputs, start = unit_gram(gram), sparsegpt(weight, inverse_factor(gram), pattern, 0.5)
    made, h = refine_by_swaps(weight, start, inputs, pattern, UNTIL_NOTHING_MOVES, refit=True), _damped(inputs)
    for row, found, keep in zip(weight.double(), made.weight.double(), made.keep.numpy(), strict=True):
        error = output_error((found - row)[None], h)
        for kept, pruned in _single_swaps(keep, pattern.m or 16):
            without = found.clone()
            without[kept] = 0.0
            without[pruned] = (h @ (row - without))[pruned] / h[pruned, pruned]
            assert output_error((without - row)[None], h) >= error * (1 - 1e-4)
        columns = np.flatnonzero(keep)
        least = np.zeros(16)
        least[columns] = np.linalg.solve(h.numpy()[np.ix_(columns, columns)], (h.numpy() @ row.numpy())[columns])
        assert error <= output_error(torch.tensor(least)[None] - row, h) * 1.001 + 1e-9


@given(name=st.sampled_from(PATTERNS), outputs=st.integers(1, 9), groups=st.integers(1, 6), refit=st.booleans(),
       sparsity=st.floats(0.0, 0.99), passes=st.integers(1, 3), seed=st.integers(0, 99))  # fmt: skip
def test_no_rows_error_rises_and_every_row_keeps_its_count(name, outputs, groups, refit, sparsity, passes, seed):
    features = 8 * groups
    weight, inputs, pattern = (
        normal_weight(outputs, features, seed),
        unit_gram(_inputs(features, seed, 40)),
        parse_pattern(name),
    )
    start, h = _random_start(weight, pattern, sparsity, seed), _damped(inputs)
    made = refine_by_swaps(weight, start, inputs, pattern, passes, refit=refit)
    before, after = (_row_errors(each.weight - weight, h) for each in (start, made))
    assert all(new <= old * (1 + 1e-5) for new, old in zip(after, before, strict=True))
    assert torch.equal(made.keep.sum(1), start.keep.sum(1))
    if ":" in name:
        assert (made.keep.view(-1, pattern.m).sum(1) == pattern.n).all()
    assert bool((made.weight[made.keep == 0].view(torch.int32) == 0).all())  # +0.0
    if not refit:
        assert torch.equal(made.weight[made.keep == 1], weight[made.keep == 1])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_outputs_of_every_method_change_less(name, sparsity):
    weight, gram, pattern = normal_weight(64, 96, 1), _inputs(96, 11, 1000), parse_pattern(name)
    inputs = unit_gram(gram)
    starts = {
        "wanda": (_wanda(weight, gram, pattern, sparsity), False, 0.9),
        "sparsegpt": (sparsegpt(weight, inverse_factor(gram), pattern, sparsity), True, 0.95),
        "alps": (alps(weight, unit_gram(gram), pattern, sparsity), True, 1.0),
    }
    for method, (start, refit, share) in starts.items():
        made = refine_by_swaps(weight, start, inputs, pattern, 4, refit=refit)
        before, after = (output_error(each.weight - weight, _damped(inputs)) for each in (start, made))
        assert after <= share * before, method


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", ["row", "2:4", "8:16"])
@pytest.mark.parametrize("features", [16, 48, 112])
def test_the_native_loop_the_one_in_torch_and_any_number_of_threads_give_the_same_bits(
    monkeypatch, features, name, refit
):
    assert swaps.library() is not None
    weight, pattern = normal_weight(37, features, 5), parse_pattern(name)
    inputs, start = unit_gram(_inputs(features, 6)), _random_start(weight, pattern, 0.6, 7)
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made.append(refine_by_swaps(weight, start, inputs, pattern, 3, refit=refit))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(swaps, "library", lambda: None)
    made.append(refine_by_swaps(weight, start, inputs, pattern, 3, refit=refit))
    assert not torch.equal(made[0].keep, start.keep)
    for other in made[1:]:
        assert torch.equal(other.keep, made[0].keep)
        assert torch.equal(other.weight, made[0].weight)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("refit", [False, True])
def test_of_equal_swaps_that_with_the_lowest_index_is_made(monkeypatch, native, refit):
    if not native:
        monkeypatch.setattr(swaps, "library", lambda: None)
    weight = torch.tensor([[1.0] + 40 * [2.0] + [1.0]])
    keep = torch.zeros(1, 42, dtype=torch.uint8)
    keep[0, [0, 41]] = 1
    made = refine_by_swaps(
        weight, _masked(weight, keep), unit_gram(torch.eye(42)), parse_pattern("row"), 9, refit=refit
    )
    assert made.keep.nonzero()[:, 1].tolist() == [1, 2]


def test_weights_of_inputs_that_were_never_there_make_room():
    weight, gram = normal_weight(6, 16, 4), _inputs(16, 4)
    weight[:, 6] = 100.0
    gram[:, 6], gram[6] = 0.0, 0.0
    keep = torch.zeros(6, 16, dtype=torch.uint8)
    keep[:, 4:12] = 1
    for refit in (False, True):
        made = refine_by_swaps(weight, _masked(weight, keep), unit_gram(gram), parse_pattern("row"), 5, refit=refit)
        assert not made.keep[:, 6].any()
        assert (made.keep.sum(1) == 8).all()


def test_what_cannot_be_swapped_is_refused():
    weight, inputs = normal_weight(4, 8, 0), unit_gram(_inputs(8, 0))
    start = _masked(weight, torch.ones(4, 8, dtype=torch.uint8))
    for name in ("4x2", "global"):
        with pytest.raises(ValueError, match='"matrix", "row" and N:M'):
            refine_by_swaps(weight, start, inputs, parse_pattern(name), 1, refit=False)
    weight[1, 2] = math.inf
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        refine_by_swaps(weight, start, inputs, parse_pattern("row"), 1, refit=False)
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        unit_gram(torch.full((3, 3), math.nan))


def _pass_between_guards(native, rows, features, span, refit):
    """A pass with no byte to spare behind any array, against the loop in torch."""
    weight, gram = normal_weight(rows, features, features), torch.rand(features, features)
    keep = (torch.rand(rows, features) < 0.5).to(torch.uint8)
    state = weight, weight * keep, keep, torch.rand(rows, features), torch.zeros(rows), gram
    guarded = [Guarded(each.numpy()) for each in state]
    count = native.pst_swap_pass(*(each.address for each in guarded), rows, features, span, refit, 1)
    assert count == swaps._swap_pass_in_torch(*state, span, refit=refit)
    assert all(np.array_equal(g.array(), each.numpy().ravel()) for g, each in zip(guarded, state, strict=True))


def test_no_byte_beyond_an_array_is_touched():
    native, child = swaps.library(), os.fork()
    if child == 0:
        try:
            for features in (1, 7, 8, 15, 16, 17, 31, 33, 48, 100):
                for refit in (False, True):
                    _pass_between_guards(native, 3, features, features, refit)
                    if features % 8 == 0:
                        _pass_between_guards(native, 3, features, 4, refit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
