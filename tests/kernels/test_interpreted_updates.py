"""A mask update with kernels, on the pretended accelerator and in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from transformers import BertConfig, BertModel

from pst_ds.config.pst import PSTConfig
from pst_ds.core.kernels.triton import bit_sums, scan
from pst_ds.masks import layer_scores, update
from pst_ds.masks.layer_scores import LayerScores
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.planning.time import COUNTS
from tests.device.pretended import DEVICE, PretendedTensor, module_to_device, pretended, to_host
from tools.gpu import checks
from tools.gpu.bench import TINY, Bench

pytestmark = pytest.mark.interpreted
PLANNED = COUNTS["triton"].shared_launches


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
    for module in (layer_scores, bit_sums, update):
        monkeypatch.setattr(module, "serves", lambda device: device == DEVICE)
    return launched


def mid_ramp(pattern="matrix", dtype=torch.bfloat16, num_layers=1, width=20):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2, intermediate_size=width,
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
    assert set(kernels_on_device) == {
        "bracket_rows", "bracket_flat", "keys_at", "collect", "histogram", "mark", "finish", "place", "replace_bits"
    }  # fmt: skip


def test_make_gpu_compares_masks_and_scores_of_shards(kernels_on_device, monkeypatch):
    monkeypatch.setattr(checks, "serves", lambda device: device == DEVICE)
    monkeypatch.setattr(checks, "PATTERNS", ("matrix",))
    with pretended():
        rows = list(checks.bits(Bench(DEVICE, TINY)))
    assert [row["measured"] for row in rows] == [True, True]
    real = LayerScores.own_keys
    monkeypatch.setattr(LayerScores, "own_keys", lambda *args: replace(real(*args), weight_scale=9.0))
    with pretended():
        assert [row["measured"] for row in checks.bits(Bench(DEVICE, TINY))][-1] is False


@pytest.mark.parametrize("pattern", ["matrix", "global"])
def test_many_matrices_take_the_launches_and_waits_of_few(pattern, kernels_on_device, monkeypatch):
    """With masters at hand, as from ZeRO-3's one gather of all."""
    monkeypatch.setattr(layer_scores.zero3, "fp32_masters", lambda params, _: [param.detach() for param in params])
    found = []
    for num_layers in (1, 3):
        with pretended() as counts:
            model = module_to_device(mid_ramp(pattern, torch.float32, num_layers, width=24))
            before = counts.launches, counts.num_waits
            kernels_on_device.clear()
            update_masks(model, 0.5)
            found.append((counts.launches - before[0], counts.num_waits - before[1], len(kernels_on_device)))
    assert found[0] == found[1]
    launches, waits, by_triton = found[0]
    assert waits <= 8
    assert by_triton == PLANNED.triton
    assert launches + waits <= PLANNED.total <= 200
    assert pattern == "global" or launches + waits == PLANNED.total
