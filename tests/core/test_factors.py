"""A multiplicative update's grouped factor: its matrix, and the adjoint that gradients go back through."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.factors import Constants, group_of_rows, grouped_columns, layer_factors, ungrouped_columns


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 12))
def test_groups_are_runs_of_nearly_equal_length_in_every_part(rows, parts, groups):
    for found in group_of_rows(rows * parts, parts, groups).view(parts, rows).tolist():
        assert found == sorted(found)
        assert set(found) <= set(range(groups))
        counts = [found.count(g) for g in range(groups)]
        assert max(counts) - min(counts) <= 1


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6))
def test_the_two_are_adjoint(rows, parts, groups, seed):
    """<grouped(u), X> = <u, ungrouped(X)> for every X."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.randn(rows * parts, generator=generator, dtype=torch.float64)
    wide = torch.randn(rows * parts, groups, generator=generator, dtype=torch.float64)
    left = (grouped_columns(column, parts, groups) * wide).sum()
    assert float(left) == pytest.approx(float((column * ungrouped_columns(wide, parts)).sum()), rel=1e-12, abs=1e-12)


def test_spp_repeats_a_row_factor_over_a_group_of_outputs():
    """Row i of the multiplier is U[i] times the row of V of its group (arXiv 2405.16057)."""
    U, V = torch.tensor([2.0, 3.0, 5.0, 7.0]), torch.tensor([[1.0, 10.0, 100.0], [-1.0, -10.0, -100.0]])
    factors = layer_factors({"U": U, "V": V}, 1, Constants(multiplicative=True))
    assert (factors.U @ factors.V).tolist() == [[2, 20, 200], [3, 30, 300], [-5, -50, -500], [-7, -70, -700]]
    assert layer_factors({"U": U}, 1, Constants()).U is U


@pytest.mark.parametrize(("rows", "groups"), [(8, 2), (7, 3), (2, 5)])
def test_each_part_of_a_fused_layer_has_the_factors_of_a_layer_of_its_own(rows, groups):
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(3 * rows, generator=generator), torch.randn(3 * groups, 4, generator=generator)
    constants = Constants(multiplicative=True)
    fused = layer_factors({"U": U, "V": V}, 3, constants)
    for part, (u, v) in enumerate(zip(U.chunk(3), V.chunk(3), strict=True)):
        own = layer_factors({"U": u, "V": v}, 1, constants)
        assert torch.equal(fused.U[part * rows : (part + 1) * rows], own.U)
