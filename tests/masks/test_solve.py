"""Masks and kept weights solved from sums of the backward pass: exact sums, the same bits on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.core.layout import WeightLayout
from pst_ds.errors import InputError
from pst_ds.masks.solve import solve_masks
from pst_ds.nn import gradient_sums
from pst_ds.nn.gradient_sums import GradientSums, LayerSums
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.ranks import rank, world_size
from tests.core.one_shot_references import keep_by_score
from tests.pairs import every_pair

SPARSITY, TOKENS, BATCHES = 0.6, 48, 3


def _bert():
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=20, num_hidden_layers=1, num_attention_heads=4, intermediate_size=44,
            max_position_embeddings=16,
        )
    )  # fmt: skip


MODELS = {
    "bert": _bert,
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=20, n_layer=1, n_head=4, n_positions=16)),
}


def _model(kind, num_shards, **config):
    torch.manual_seed(3)
    model = inject_pst(
        MODELS[kind](),
        PSTConfig(score_rank=0, structured_scores=False, update_rank=4, modules_to_save=(), beta=0.5, **config),
        num_shards=num_shards,
    )
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model


def _tokens(layout, batch):
    """Correlated inputs and gradients of a batch, most of them small, as a classifier's."""
    generator = np.random.default_rng([batch, layout.out_features, layout.in_features])
    x = generator.normal(size=(TOKENS, layout.in_features)) @ generator.normal(size=(layout.in_features,) * 2)
    g = generator.normal(size=(TOKENS, layout.out_features)) * generator.exponential(size=(TOKENS, 1)) ** 1.5
    return torch.tensor(x, dtype=torch.float32), torch.tensor(g, dtype=torch.float32)


def _listened(model, *, by_token=True):
    """Sums over all ranks' shares of the batches, whose gradients are those of a mean over ranks."""
    sums = GradientSums(model, torch.device("cpu"), by_token=by_token)
    for batch in range(BATCHES):
        for layer in pst_layers(model).values():
            x, g = _tokens(layer.layout, batch)
            layer.listen(x[rank() :: world_size()], g[rank() :: world_size()] * world_size())
        sums.settle()
    return sums


def _whole(layer):
    with sharding.gathered([layer.weight, layer.pst_mask]):
        mask = unpack_range(layer.pst_mask.detach(), layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
        return layer.weight.detach().clone(), mask.view(layer.layout.shape).clone()


def _solved(kind, stage, persistence=0):
    """The masks' statistics, and every whole weight and mask, after two solves."""
    model = _model(kind, world_size() if stage == 3 else 1)
    zero = {"stage3_param_persistence_threshold": persistence} if stage == 3 else {}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, **zero}}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    engine = build_engine(model, groups, ds_config=None if stage is None else config)
    stats = [solve_masks(engine.module, _listened(engine.module), SPARSITY * share, share) for share in (0.5, 1.0)]
    return stats, [_whole(layer) for layer in pst_layers(engine.module).values()]


@pytest.mark.zero3
@pytest.mark.parametrize("kind", MODELS)
def test_masks_and_weights_are_the_same_bits_on_1_2_and_3_ranks(run_ranks, kind):
    local, weights = _solved(kind, None)
    for ranks, stage, *more in ((1, 3), (2, 3), (2, 1), (2, 3, 10**6), (3, 3)):
        for stats, found in run_ranks(_solved, ranks, kind, stage, *more):
            assert stats == local
            assert all(
                torch.equal(a, b) for x, y in zip(found, weights, strict=True) for a, b in zip(x, y, strict=True)
            )
    assert local[1].sparsity == pytest.approx(SPARSITY, abs=0.005)


def _error(weight, other, tokens):
    """Weighted squared difference of the outputs of two merged weights (O, I), as the solve counts it."""
    x, g = (torch.cat(part).double() for part in zip(*tokens, strict=True))
    size = g.square().sum(1)
    rows = g.square().mean(0)
    return float((((x @ (weight - other).double().t()).square() @ rows) * (size / size.mean() + 0.1)).sum())


@every_pair
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pattern", ["matrix", "row", "2:4", "1x2"])
def test_a_solve_changes_outputs_less_than_magnitude_and_leaves_the_update(kind, pattern):
    """Also in the matrices of a fused layer, stored either way, and where weights were pruned before."""
    model = _model(kind, 1, pattern=pattern)
    sparsity = 0.5
    for share in (1.0,) if pattern == "2:4" else (0.5, 1.0):  # N:M is complete at once
        before = {name: layer.masked_weight().clone() for name, layer in pst_layers(model).items()}
        factors = [param.clone() for layer in pst_layers(model).values() for _, param in layer.factor_parameters()]
        solve_masks(model, _listened(model), sparsity * share, share)
        after = [param for layer in pst_layers(model).values() for _, param in layer.factor_parameters()]
        assert all(map(torch.equal, factors, after))
    for name, layer in pst_layers(model).items():
        weight, mask = _whole(layer)
        assert bool((weight[mask == 0] == 0).all())
        merged = layer.masked_weight()
        assert torch.equal(merged != 0, mask.bool())
        tokens = [_tokens(layer.layout, batch) for batch in range(1, BATCHES)]
        by_magnitude = keep_by_score(before[name].abs(), layer.layout, layer.rule.pattern, sparsity)
        for matrix in layer.layout.matrices():
            at = matrix.rect.slices
            assert int(mask[at].sum()) == int(by_magnitude[at].sum())
            weights = (merged[at], before[name][at], before[name][at] * by_magnitude[at])
            new, old, other = (w.t() if layer.layout.transposed else w for w in weights)
            own = [(x, g[:, matrix.outputs]) for x, g in tokens]
            assert _error(new, old, own) < 0.9 * _error(other, old, own), name


def test_sums_are_exact_for_any_order_and_near_those_of_real_numbers():
    layout = WeightLayout(9, 700)  # several panels, several products
    x, g = (torch.cat(part) for part in zip(*(_tokens(layout, batch) for batch in range(40)), strict=True))
    real = torch.arange(len(x)) % 5 > 0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    found = []
    for chosen in ([slice(None)], [order], order.split(100)):
        sums = LayerSums(layout, torch.device("cpu"), by_token=True)
        sums.add(x[:100], g[:100], None)
        sums.settle(sums.first)
        for part in chosen:
            sums.add(x[part], g[part], real[part])
        found.append((sums.products(sums.gram), sums.rows))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    x, g = x[real].double(), g[real].double()
    size = g.square().sum(1, keepdim=True)
    mean = torch.cat([_tokens(layout, batch)[1] for batch in range(3)])[:100].square().sum(1).mean()
    exact = (x * (size / mean + gradient_sums.LEAST_WEIGHT)).t() @ x
    norms = exact.diagonal().sqrt()
    error = ((found[0][0] - exact) / norms / norms.unsqueeze(1)).abs()
    assert float(error.max()) < 0.02
    assert float(error.mean()) < 0.004
    assert torch.allclose(found[0][1] / found[0][1].sum(), g.square().sum(0) / g.square().sum(), rtol=1e-3)


def test_values_that_are_not_finite_and_layers_without_tokens_leave_finite_weights():
    """The engine skips such a step, but its sums remain."""
    model = _model("bert", 1)
    sums = GradientSums(model, torch.device("cpu"), by_token=True)
    for batch in range(BATCHES):
        for i, layer in enumerate(pst_layers(model).values()):
            x, g = _tokens(layer.layout, batch)
            if i:
                layer.listen(x, torch.full_like(g, torch.nan) if batch == 1 else g)
        sums.settle()
    solve_masks(model, sums, SPARSITY, 1.0)
    assert all(bool(layer.weight.isfinite().all()) for layer in pst_layers(model).values())
    sums.close()
    last = list(pst_layers(model).values())[-1]
    last.pst_U.data[0] = torch.inf
    with pytest.raises(InputError, match=r"output\.dense: weights are not finite\. Lower the learning rates"):
        solve_masks(model, sums, SPARSITY, 1.0)
    assert all(layer.listen is None for layer in pst_layers(model).values())
