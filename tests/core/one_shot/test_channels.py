"""Removal of inputs, against least squares over all candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pst_ds.core.one_shot import channels
from pst_ds.core.one_shot.channels import InputMoments, by_second_order, refitted
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


@pytest.mark.parametrize("shifts", [False, True])
def test_each_removed_input_is_the_one_of_least_error_after_a_refit(shifts, monkeypatch):
    monkeypatch.setattr(channels, "COLUMNS_AT_ONCE", 1)
    weight, x = _problem()
    moments = InputMoments.of(x.T @ x, x.sum(0) if shifts else None, len(x))
    kept, gone, scores = by_second_order(weight, moments.gram, 2)
    left, errors = list(range(12)), []
    for removed in gone.tolist():
        error = {gone: _least_error(weight, x, [i for i in left if i != gone], shifts)[0] for gone in left}
        assert removed == min(left, key=error.__getitem__)
        errors.append(error[removed])
        left.remove(removed)
    assert kept.tolist() == left
    assert np.allclose(scores.cumsum(0), errors)
    fitted, shift, error = refitted(weight, moments, kept)
    _, wanted = _least_error(weight, x, kept, shifts)
    assert np.allclose(fitted, wanted)
    outputs = x[:, kept] @ fitted.T + shift - x @ weight.double().T
    variance = (x - x.mean(0) if shifts else x) @ weight.double().T
    assert error == pytest.approx(float(outputs.square().sum() / variance.square().sum()))
    assert bool(shift.any()) == shifts


def test_several_at_once_lose_little_to_one_at_a_time(monkeypatch):
    weight, x = _problem(96, 24, 400)
    moments = InputMoments.of(x.T @ x, None, len(x))
    *_, many = refitted(weight, moments, by_second_order(weight, moments.gram, 32)[0])
    *_, largest = refitted(weight, moments, weight.abs().sum(0).topk(32).indices.sort().values)
    monkeypatch.setattr(channels, "COLUMNS_AT_ONCE", 1)
    *_, single = refitted(weight, moments, by_second_order(weight, moments.gram, 32)[0])
    assert single <= many < 1.05 * single
    assert many < largest


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="inputs are not finite"):
        InputMoments.of(torch.full((3, 3), torch.nan), None, 3)
