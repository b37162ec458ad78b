"""Criteria in plain torch: the scores of the kernels' formula, with the same bits in any slice."""

from __future__ import annotations

import pytest
import torch

from pst_ds.config.criteria import CRITERIA, as_criterion, criterion_called
from pst_ds.core.criteria.criterion import Criterion, WeightSlice
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.keys import single_weights
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.scores import importance
from pst_ds.errors import InputError

SCALE = 0.37
CONSTANTS = Constants(alpha1=0.7, alpha2=1.3, beta=0.9)
INDEX = torch.zeros(1, 1, dtype=torch.int64)


def _layer(transposed):
    """The weight of a layer of two fused matrices, its layout and factors."""
    layout = WeightLayout(out_features=24, in_features=17, transposed=transposed, num_matrices=2)
    torch.manual_seed(1)
    shapes = {"A": (24, 3), "B": (6, 17), "R": (24,), "C": (2, 17), "U": (24, 4), "V": (8, 17), "norms": (17,)}
    factors = Factors(**{name: torch.randn(shape) for name, shape in shapes.items()})
    return torch.randn(layout.shape), layout, factors


def _slice(weight, factors, **more):
    values = {"layer": "x", "outputs": INDEX, "inputs": INDEX, "magnitude_scale": SCALE, "constants": CONSTANTS}
    return WeightSlice(base=weight, factors=factors, **{**values, **more})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CRITERIA.names)
def test_a_built_in_criterion_has_the_scores_of_the_kernels_in_any_slice(name, transposed, frozen):
    weight, layout, factors = _layer(transposed)
    constants = Constants(alpha1=0.7, alpha2=1.3, beta=0.9, frozen_magnitude=frozen)
    criterion = criterion_called(name)
    for matrix in layout.matrices():
        whole = criterion.visible(tile_factors(factors, layout, matrix, matrix.rect))
        expected = importance(weight[matrix.rect.slices], whole, constants, SCALE)
        r0, c0 = matrix.rect.r0, matrix.rect.c0
        for rect in (matrix.rect, Rect(r0 + 1, r0 + 2, c0, c0 + 9), Rect(r0 + 3, r0 + 11, c0 + 5, c0 + 6)):
            tile = criterion.visible(tile_factors(factors, layout, matrix, rect))
            scores = criterion.scores(_slice(weight[rect.slices], tile, constants=constants))
            assert torch.equal(scores, expected[rect.inside(matrix.rect)])
        rows, cols = torch.tensor([0, 3, 11, 4]), torch.tensor([2, 8, 0, 11])
        singles = single_weights(weight[matrix.rect.slices][rows, cols], rows, cols, whole, constants, SCALE)
        scores = criterion.scores(_slice(singles.weight, singles.tile, constants=constants))
        assert torch.equal(scores.squeeze(1), expected[rows, cols])


def test_a_slice_has_only_what_the_criterion_needs():
    weight, layout, factors = _layer(transposed=False)
    (matrix, _) = layout.matrices()
    tile = Criterion().visible(tile_factors(factors, layout, matrix, matrix.rect))
    assert tile.held().keys() == {"update_left", "update_right"}
    part = _slice(weight[matrix.rect.slices], tile)
    with pytest.raises(ValueError, match=r'reads input_norms, which its needs do not name. Add "input_norms"'):
        _ = part.input_norms
    with pytest.raises(ValueError, match="reads gradient"):
        _ = part.gradient


def test_a_class_an_object_and_a_function_are_criteria():
    class Mine(Criterion):
        def scores(self, part):
            return part.weight

    part = _slice(torch.ones(2, 3), TileFactors())
    for value in (Mine, Mine(), lambda part: part.weight):
        assert torch.equal(as_criterion(value, "x").scores(part), torch.ones(2, 3))


@pytest.mark.parametrize("value", ["magnitude", 3, int])
def test_what_is_not_a_criterion_is_refused(value):
    with pytest.raises(InputError, match=r"criterion: .* is not a criterion. Give a subclass of pst_ds.Criterion, or"):
        as_criterion(value, "criterion")


def test_an_unknown_need_is_refused():
    class Mine(Criterion):
        needs = frozenset({"hessians"})

    with pytest.raises(InputError, match=r"Mine needs hessians, which pst-ds does not have. It has gradients, input"):
        as_criterion(Mine, "criterion")
