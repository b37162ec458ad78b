"""The tiled backward pass against float64 autograd of the written-out, straight-through formula."""

import dataclasses
import itertools

import pytest
import torch

from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import Gradients, LayerState, backward, forward
from pst_ds.core.tiles import least_tile_bytes, plan_tiles
from tests.pairs import every_pair

NUM_TOKENS, OUTPUTS, INPUTS, SCORE_RANK, UPDATE_RANK = 29, 126, 105, 3, 2
BY_OUTPUTS, BY_INPUTS = 1.0, 1.8
BUDGETS = [BY_OUTPUTS, BY_INPUTS, 0]
CONSTANTS = Constants(alpha1=0.7, alpha2=0.9, beta=1.3)
SCORE_NAMES, UPDATE_NAMES = "ABRC", "UV"
LAYOUTS = [WeightLayout(OUTPUTS, INPUTS, transposed, parts) for transposed in (False, True) for parts in (1, 3)]
LAYOUT_IDS = [f"{'conv1d' if layout.transposed else 'linear'}-{layout.num_matrices}" for layout in LAYOUTS]

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)


@dataclasses.dataclass
class Case:
    """A layer with random values, its input and the gradient of its output."""

    state: LayerState
    mask: torch.Tensor
    """(O, I) bool"""
    x: torch.Tensor
    bias: torch.Tensor
    grad_y: torch.Tensor

    def gradients(self, budget: float = 0, need_weight: bool = False) -> Gradients:
        """``budget``: bytes of a tile, as a multiple of the least that is taken; 0 is the default, one tile."""
        return backward(
            self.x,
            self.grad_y,
            self.state,
            need_x=True,
            need_weight=need_weight,
            need_bias=True,
            tile_bytes=int(budget * least_tile_bytes(self.state.layout, self.x.element_size())),
        )


def make_case(layout: WeightLayout, num_shards: int = 1, dtype=torch.float32, **changed) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    parts = layout.num_matrices
    factors = Factors(
        A=normal(OUTPUTS, SCORE_RANK),
        B=normal(parts * SCORE_RANK, INPUTS),
        R=normal(OUTPUTS),
        C=normal(parts, INPUTS),
        U=normal(OUTPUTS, UPDATE_RANK),
        V=normal(parts * UPDATE_RANK, INPUTS),
    )
    mask = torch.rand(OUTPUTS, INPUTS, generator=generator) > 0.6
    state = LayerState(
        weight=normal(*layout.shape),
        bits=pack_mask(mask.t() if layout.transposed else mask, num_shards),
        num_shards=num_shards,
        layout=layout,
        factors=factors,
        constants=CONSTANTS,
        magnitude_scales=tuple(2.0 + part for part in range(parts)),
        scores_train=True,
    )
    state = dataclasses.replace(state, **changed)
    return Case(state, mask, normal(NUM_TOKENS, INPUTS), normal(OUTPUTS), normal(NUM_TOKENS, OUTPUTS))


def reference(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(y, gradients by name) by float64 autograd of the formula, with M = mask + S - S.detach() straight through."""
    state, parts = case.state, case.state.layout.num_matrices
    leaves = {n: getattr(state.factors, n).double() for n in "ABRCUV" if getattr(state.factors, n) is not None}
    leaves |= {"x": case.x.double(), "weight": state.weight.double(), "bias": case.bias.double()}
    norms = 1.0 if state.factors.norms is None else state.factors.norms.double()
    for leaf in leaves.values():
        leaf.requires_grad_()

    def by_part(left: str, right: str):
        if left not in leaves:
            return 0.0
        pairs = zip(leaves[left].chunk(parts), leaves[right].chunk(parts), strict=True)
        return torch.cat([a @ b for a, b in pairs])

    width = OUTPUTS // parts
    dense = leaves["weight"].t() if state.layout.transposed else leaves["weight"]
    merged = dense + state.constants.beta * by_part("U", "V")
    ranked = dense.detach() if state.constants.frozen_magnitude else merged
    scale = torch.tensor(state.magnitude_scales, dtype=torch.float64).repeat_interleave(width).unsqueeze(1)
    scores = ranked.abs() * norms / scale + state.constants.alpha1 * by_part("A", "B")
    if "R" in leaves:
        by_column = leaves["C"].repeat_interleave(width, 0)
        scores = scores + state.constants.alpha2 * (leaves["R"].unsqueeze(1) + by_column)
    mask = case.mask.double()
    if state.scores_train:
        mask = mask + scores - scores.detach()
    y = leaves["x"] @ (mask * merged).t() + leaves["bias"]
    y.backward(case.grad_y.double())
    return y.detach(), {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_gradients(found: Gradients, expected: dict[str, torch.Tensor], names, tolerance: float = 1e-6) -> None:
    for name in names:
        assert expected[name].norm() > 0
        assert relative_error(getattr(found, name), expected[name]) <= tolerance, name


@every_pair
@each_layout
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_are_those_of_the_formula(layout, num_shards, budget):
    case = make_case(layout, num_shards)
    found = case.gradients(budget)
    assert_gradients(found, reference(case)[1], ["x", "bias", *SCORE_NAMES, *UPDATE_NAMES])
    assert found.weight is None


@every_pair
@each_layout
@pytest.mark.parametrize("num_shards", [1, 3])
def test_forward_is_the_formula(layout, num_shards):
    case = make_case(layout, num_shards)
    y = forward(case.x.view(1, NUM_TOKENS, INPUTS), case.bias, case.state)
    assert y.shape == (1, NUM_TOKENS, OUTPUTS)
    assert relative_error(y[0], reference(case)[0]) <= 1e-6
    assert relative_error(forward(case.x, None, case.state) + case.bias, reference(case)[0]) <= 1e-6


@each_layout
def test_frozen_magnitude_has_no_path_to_the_update(layout):
    case = make_case(layout, constants=dataclasses.replace(CONSTANTS, frozen_magnitude=True))
    found, attached = case.gradients(BY_INPUTS), make_case(layout).gradients(BY_INPUTS)
    assert_gradients(found, reference(case)[1], ["x", *SCORE_NAMES, *UPDATE_NAMES])
    assert all(torch.equal(getattr(found, n), getattr(attached, n)) for n in SCORE_NAMES)
    assert all(not torch.allclose(getattr(found, n), getattr(attached, n)) for n in UPDATE_NAMES)


@each_layout
def test_fixed_masks_leave_g_times_m_alone(layout):
    """scores_train False: dW = G . M, and no score has a gradient."""
    case = make_case(layout, scores_train=False)
    found = case.gradients(BY_INPUTS)
    assert_gradients(found, reference(case)[1], ["x", "bias", *UPDATE_NAMES])
    assert not any(getattr(found, n).any() for n in SCORE_NAMES)


@every_pair
@each_layout
@pytest.mark.parametrize("scores_train", [True, False])
def test_a_trained_weight_has_the_gradient_g_times_m(layout, scores_train):
    case = make_case(layout, num_shards=2, scores_train=scores_train)
    found = case.gradients(BY_INPUTS, need_weight=True)
    grad = (case.grad_y.double().t() @ case.x.double()) * case.mask
    grad = grad.t() if layout.transposed else grad
    assert relative_error(found.weight, grad) <= 1e-6
    assert torch.equal(found.weight != 0, grad != 0)
    names = [*UPDATE_NAMES, *(SCORE_NAMES if scores_train else "")]
    assert_gradients(found, reference(case)[1], names)


@every_pair
@each_layout
@pytest.mark.parametrize("budget", BUDGETS)
def test_input_norms_weigh_the_magnitude(layout, budget):
    """S has |W| . 1 n', so dW has G . |W| . 1 n'."""
    norms = torch.rand(INPUTS, generator=torch.Generator().manual_seed(3)) * 4.0
    case = make_case(layout)
    case = make_case(layout, factors=dataclasses.replace(case.state.factors, norms=norms))
    assert_gradients(case.gradients(budget), reference(case)[1], ["x", "bias", *SCORE_NAMES, *UPDATE_NAMES])


def without(factors: Factors, names: str) -> Factors:
    return dataclasses.replace(factors, **dict.fromkeys(names))


@every_pair
@pytest.mark.parametrize("left_out", ["AB", "RC", "UV", "ABRC", "ABRCUV"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=[LAYOUT_IDS[0], LAYOUT_IDS[3]])
def test_factors_that_are_left_out_have_no_gradient(layout, left_out):
    whole = make_case(layout)
    has_scores = not set(SCORE_NAMES) <= set(left_out)
    case = make_case(layout, factors=without(whole.state.factors, left_out), scores_train=has_scores)
    found = case.gradients(BY_INPUTS)
    assert_gradients(found, reference(case)[1], ["x", "bias", *(n for n in "ABRCUV" if n not in left_out)])
    assert all(getattr(found, n) is None for n in left_out)


def test_gradients_that_are_not_needed_are_none():
    case = make_case(LAYOUTS[0])
    found = backward(case.x, case.grad_y, case.state, need_x=False, need_weight=False, need_bias=False)
    assert found.x is found.weight is found.bias is None
    assert relative_error(found.A, reference(case)[1]["A"]) <= 1e-6


@each_layout
def test_backward_only_reads_its_arguments(layout):
    case = make_case(layout)
    tensors = [case.x, case.grad_y, case.state.weight, case.state.bits]
    tensors += [getattr(case.state.factors, n) for n in "ABRCUV"]
    before = [t.clone() for t in tensors]
    case.gradients(BY_INPUTS, need_weight=True)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_the_gradients(dtype):
    """Factors get fp32 gradients from 16-bit input, fp64 from fp64."""
    high = torch.promote_types(dtype, torch.float32)
    for layout in (LAYOUTS[0], LAYOUTS[3]):
        case = make_case(layout, dtype=dtype)
        found = case.gradients(BY_INPUTS, need_weight=True)
        assert found.weight.dtype == dtype
        assert {getattr(found, n).dtype for n in "ABRCUV"} == {high}
        names = ["x", "bias", *"ABRCUV"]
        assert_gradients(found, reference(case)[1], names, tolerance=1e-13 if dtype == torch.float64 else 2e-2)


def test_the_cases_cut_several_tiles_both_ways():
    """Guards the sizes and budgets above."""
    for layout, itemsize, (budget, by_outputs) in itertools.product(
        LAYOUTS, (2, 4, 8), ((BY_OUTPUTS, True), (BY_INPUTS, False))
    ):
        tiles = plan_tiles(layout, itemsize, int(budget * least_tile_bytes(layout, itemsize)))
        assert tiles.cut_outputs == by_outputs
        assert len(tiles.rects) > 2
