"""Removal of groups of inputs, against least squares over all candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pst_ds.core.one_shot import channels
from pst_ds.core.one_shot.channels import InputMoments, by_second_order, by_wanda, refitted
from pst_ds.core.one_shot.gram import DAMPING


def _problem(inputs=12, outputs=7, tokens=60):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = (torch.randn(tokens, inputs, generator=generator) @ mix + 0.5).double()
    return torch.randn(outputs, inputs, generator=generator), x


def _least_error(weight, x, kept, shifts):
    """Damped squared error of the best weights on the ``kept`` inputs, with a constant input if ``shifts``."""
    w, x = weight.double().numpy(), x.numpy()
    if shifts:
        x = x - x.mean(0)
    damping = np.sqrt(DAMPING * (x**2).sum(0).mean())
    inputs = np.concatenate([x, damping * np.eye(x.shape[1])])  # damping draws the weights to their old values
    wanted = inputs @ w.T
    found = np.linalg.lstsq(inputs[:, kept], wanted, rcond=None)[0]
    return ((inputs[:, kept] @ found - wanted) ** 2).sum(), found.T


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("shifts", [False, True])
def test_each_removed_group_is_the_one_of_least_error_after_a_refit(size, shifts, monkeypatch):
    monkeypatch.setattr(channels, "COLUMNS_AT_ONCE", 1)
    weight, x = _problem()
    groups = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(-1, size)
    moments = InputMoments.of(x.T @ x, x.sum(0) if shifts else None, len(x))
    chosen = by_second_order(weight, moments.gram, groups, 2)
    left, errors = list(range(len(groups))), []
    for removed in chosen.removed.tolist():
        error = {g: _least_error(weight, x, groups[[i for i in left if i != g]].flatten(), shifts)[0] for g in left}
        assert removed == min(left, key=error.__getitem__)
        errors.append(error[removed])
        left.remove(removed)
    assert chosen.kept.tolist() == left
    assert np.allclose(chosen.scores.cumsum(0), errors)
    columns = groups[chosen.kept].flatten().sort().values
    made = refitted(weight, moments, columns)
    _, wanted = _least_error(weight, x, columns, shifts)
    assert np.allclose(made.weight, wanted)
    outputs = x[:, columns] @ made.weight.T + made.shift - x @ weight.double().T
    variance = (x - x.mean(0) if shifts else x) @ weight.double().T
    assert made.error == pytest.approx(float(outputs.square().sum() / variance.square().sum()))
    assert bool(made.shift.any()) == shifts


def test_several_at_once_lose_little_to_one_at_a_time(monkeypatch):
    weight, x = _problem(96, 24, 400)
    moments, groups = InputMoments.of(x.T @ x, None, len(x)), torch.arange(96).view(-1, 1)
    many = refitted(weight, moments, by_second_order(weight, moments.gram, groups, 32).kept).error
    wanda = refitted(weight, moments, by_wanda(weight, moments.gram, groups, 32).kept).error
    monkeypatch.setattr(channels, "COLUMNS_AT_ONCE", 1)
    single = refitted(weight, moments, by_second_order(weight, moments.gram, groups, 32).kept).error
    assert single <= many < 1.05 * single
    assert many < wanda


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        InputMoments.of(torch.full((3, 3), torch.nan), None, 3)
