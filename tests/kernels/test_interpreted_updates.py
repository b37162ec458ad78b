"""A mask update with kernels, on the pretended accelerator and in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from transformers import BertConfig, BertModel

from pst_ds.config.pst import PSTConfig
from pst_ds.core import bracket
from pst_ds.core.kernels.triton import bit_sums, scan
from pst_ds.masks import layer_scores
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from tests.device.pretended import DEVICE, PretendedTensor, module_to_device, pretended, to_host
from tools.gpu import checks
from tools.gpu.bench import TINY, Bench

pytestmark = pytest.mark.interpreted


@pytest.fixture
def kernels_on_device(monkeypatch):
    """Kernels serve the pretended device, on which a launch is one launch, and nothing else."""
    from tests.device.pretended import counts

    real = scan.launch
    launched = []

    def launch(kernel, grid, *args, **constants):
        if 0 not in grid:
            counts.launches += 1
            launched.append(kernel.fn.__name__)
        assert all(isinstance(arg, PretendedTensor) for arg in args if isinstance(arg, torch.Tensor)), kernel
        real(kernel, grid, *(to_host(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), **constants)

    for module in (scan, bit_sums):
        monkeypatch.setattr(module, "launch", launch)
    for module in (layer_scores, bit_sums):
        monkeypatch.setattr(module, "serves", lambda device: device == DEVICE)
    return launched


def mid_ramp(pattern="matrix", dtype=torch.bfloat16, num_layers=1):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config).to(dtype)
    for param in model.parameters():
        param.data = (param.data * 200).round() / 200
    inject_pst(model, PSTConfig(pattern=pattern, score_rank=2, update_rank=1, modules_to_save=()))
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 0.3).to(param.dtype)
    return model


@pytest.mark.parametrize("pattern", ["matrix", "global"])
def test_masks_and_their_sums_are_those_of_the_cpu(pattern, kernels_on_device, monkeypatch):
    host_side = mid_ramp(pattern)
    expected = update_masks(host_side, 0.5)
    with pretended():
        model = module_to_device(mid_ramp(pattern))
        found = update_masks(model, 0.5)
        assert mask_stats(model).checksum == expected.checksum
    assert found == expected
    for here, there in zip(pst_layers(host_side).values(), pst_layers(model).values(), strict=True):
        assert torch.equal(here.pst_mask, to_host(there.pst_mask))
    assert {"bracket_rows", "bracket_flat", "keys_at", "collect", "histogram", "mark", "finish", "sum_bits"} == set(
        kernels_on_device
    )


def test_make_gpu_compares_masks_and_scores_of_shards(kernels_on_device, monkeypatch):
    monkeypatch.setattr(checks, "serves", lambda device: device == DEVICE)
    monkeypatch.setattr(checks, "PATTERNS", ("matrix",))
    with pretended():
        rows = list(checks.bits(Bench(DEVICE, TINY)))
    assert [row["measured"] for row in rows] == [True, True]
    real = scan.OwnKeys.sort
    monkeypatch.setattr(scan.OwnKeys, "sort", lambda own, *args: real(replace(own, weight_scale=9.0), *args))
    with pretended():
        assert [row["measured"] for row in checks.bits(Bench(DEVICE, TINY))][-1] is False


def test_five_launches_a_matrix_and_some_for_all(kernels_on_device, monkeypatch):
    """With masters at hand, as from ZeRO-3's one gather of all."""
    monkeypatch.setattr(layer_scores.zero3, "fp32_masters", lambda params, _: [param.detach() for param in params])
    with pretended() as counts:
        model = module_to_device(mid_ramp(dtype=torch.float32))
        layers = pst_layers(model).values()
        for layer in layers:
            bracket.sample_positions(
                layer.layout.numel, bracket.sample_size(layer.layout.numel), DEVICE
            )  # kept from one update to the next
        before = counts.launches
        update_masks(model, 0.5)
        launches = counts.launches - before
    launched = Counter(kernels_on_device)
    passes = launched["bracket_rows"] + launched["bracket_flat"]
    assert (passes, launched["keys_at"], launched["sum_bits"]) == (len(layers), 2 * len(layers), len(layers))
    shared = launches - 5 * len(layers)  # the four and the copy into the shard
    assert shared <= 32  # so at most 6 a matrix from 32 matrices on: a Llama of 7 billion has 224
