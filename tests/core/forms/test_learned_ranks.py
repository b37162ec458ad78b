"""Learned ranks: gates with a penalty, terms that are cut for good, and the number of those that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.forms.form import Tile
from pst_ds.core.forms.learned_ranks import LearnedRanks, gates
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload
from pst_ds.nn.optimizer import pst_optimizer, pst_parameter_groups


def _model(penalty=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=False))
    settings = {"target_modules": ["0"], "modules_to_save": (), "score_rank": 0, "structured_scores": False}
    return inject_pst(model, PSTConfig(**settings, update_form="learned-ranks", update_penalty=penalty, seed=1))


def _trained(penalty):
    """Train a layer with up to 8 terms to add a small matrix of rank 2 to its weight, from noisy outputs."""
    model = _model(penalty)
    (layer,) = pst_layers(model).values()
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(40, 2, generator=generator)
    right = torch.randn(2, 24, generator=generator)
    wanted = layer.weight.detach() + 0.05 * left @ right
    optimizer = pst_optimizer(model, update_learning_rate=0.002)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - step / 400)
        x = torch.randn(32, 24, generator=generator)
        outputs = x @ wanted.t() + 3.0 * torch.randn(32, 40, generator=generator)
        loss = (model(x) - outputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, layer, wanted


def test_a_gate_is_open_at_first_and_exactly_closed_below_one_half():
    values = gates(torch.tensor([1.0, 0.75, 0.5, 0.49, 0.0, -3.0]))
    assert values[0] > 0.95
    assert 0.0 < values[1] < values[0]
    assert not values[2:].any()


@pytest.mark.parametrize("outputs", [slice(0, 40), slice(8, 24)])
def test_gradients_of_a_tile_are_those_of_autograd(outputs):
    generator = torch.Generator().manual_seed(0)
    form = LearnedRanks()
    tile = Tile(outputs, slice(4, 20), 40, 24)
    weight = torch.randn(outputs.stop - outputs.start, 16, generator=generator, dtype=torch.float64)
    gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    values = {
        "U": torch.randn(40, 4, generator=generator, dtype=torch.float64),
        "V": torch.randn(4, 24, generator=generator, dtype=torch.float64),
        "G": torch.tensor([1.0, 0.7, 0.4, -0.2], dtype=torch.float64),
    }
    expected = super(LearnedRanks, form).gradients(weight, gradient, values, tile, 0.7)
    terms = form.gradients(weight, gradient, values, tile, 0.7)
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], msg=name)
    assert not terms["G"][2:].any()
    assert not terms["U"][:, 2:].any()
    assert not terms["V"][2:].any()


def test_the_gates_are_the_only_parameters_with_weight_decay():
    model = _model(penalty=3.0)
    (layer,) = pst_layers(model).values()
    groups = {group["name"]: group for group in pst_parameter_groups(model, update_learning_rate=0.01)}
    assert set(groups) == {"updates", "updates x 5 with decay 1.5"}
    penalised = groups["updates x 5 with decay 1.5"]
    assert penalised["params"] == [layer.pst_G]
    assert penalised["weight_decay"] == 1.5
    assert penalised["lr"] == pytest.approx(0.05)
    assert groups["updates"]["weight_decay"] == 0.0


def test_terms_that_do_not_help_are_cut_and_the_merged_weight_has_the_kept_ones():
    model, layer, wanted = _trained(penalty=2.0)
    kept = gates(layer.pst_G.detach()) > 0
    count = int(kept.sum())
    assert 2 <= count < 8
    parameters = {name: value.detach() for name, value in layer.update_parameters().items()}
    assert LearnedRanks().describe(parameters) == {"kept rank": count}
    weight = layer.weight.detach().clone()
    cut = {"U": parameters["U"][:, kept], "V": parameters["V"][kept], "G": parameters["G"][kept]}
    of_kept = LearnedRanks().apply(weight, cut, Tile(slice(0, 40), slice(0, 24), 40, 24), 1.0)
    merged = merge_and_unload(model)[0].weight
    assert torch.equal(merged, of_kept)
    assert (merged - wanted).norm() < 0.8 * (weight - wanted).norm()


def test_without_a_penalty_every_term_is_kept():
    _, layer, _ = _trained(penalty=0.0)
    assert (gates(layer.pst_G.detach()) > 0.9).all()
