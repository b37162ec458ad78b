"""A mask update with kernels, on the pretended accelerator and in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from transformers import BertConfig, BertModel

from pst_ds.config.pst import PSTConfig
from pst_ds.masks import layer_scores
from pst_ds.masks.layer_scores import LayerScores
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.planning.time import COUNTS
from tests.device.pretended import DEVICE, module_to_device, pretended, to_host
from tests.kernels.kernels_on_device import LAUNCHED, serve_the_device
from tools.gpu import checks
from tools.gpu.bench import TINY, Bench

pytestmark = pytest.mark.interpreted
PLANNED = COUNTS["triton"].shared_launches


@pytest.fixture
def kernels_on_device(monkeypatch):
    """Names of the kernels that are launched on the pretended device."""
    serve_the_device(monkeypatch.setattr)
    return LAUNCHED


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


PLACED = {"place", "replace_bits"}
CUT = {"keys_at", "bracket_flat", "collect", "histogram", "mark", "finish", *PLACED}
KERNELS = {
    "matrix": {"bracket_rows", *CUT}, "global": {"bracket_rows", *CUT}, "row": {"keep_in_rows", *PLACED},
    "2:4": {"unit_keys", "keep_n_of_m", *CUT}, "1:2": {"keep_n_of_m", *PLACED}, "4x4": {"unit_keys", *CUT},
}  # fmt: skip


@pytest.mark.parametrize("pattern", KERNELS)
def test_masks_and_their_sums_are_those_of_the_cpu(pattern, kernels_on_device):
    width, progress = 20 if pattern in ("matrix", "global") else 24, 0.6 if pattern == "2:4" else 1.0
    host_side = mid_ramp(pattern, width=width)
    expected = update_masks(host_side, 0.5, progress=progress)
    with pretended():
        model = module_to_device(mid_ramp(pattern, width=width))
        found = update_masks(model, 0.5, progress=progress)
        assert mask_stats(model).checksum == expected.checksum
    assert found == expected
    for here, there in zip(pst_layers(host_side).values(), pst_layers(model).values(), strict=True):
        assert torch.equal(here.pst_mask, to_host(there.pst_mask))
    assert set(kernels_on_device) == KERNELS[pattern]


def test_make_gpu_compares_masks_and_scores_of_shards(kernels_on_device, monkeypatch):
    monkeypatch.setattr(checks, "serves", lambda device: device == DEVICE)
    with pretended():
        rows = list(checks.bits(Bench(DEVICE, TINY)))
    assert [row["measured"] for row in rows] == [True, True]
    real = LayerScores.own_keys
    monkeypatch.setattr(LayerScores, "own_keys", lambda *args: replace(real(*args), weight_scale=9.0))
    with pretended():
        assert [row["measured"] for row in checks.bits(Bench(DEVICE, TINY))][-1] is False


@pytest.mark.parametrize("pattern", ["matrix", "global", "2:4", "4x4"])
def test_many_matrices_take_the_launches_and_waits_of_few(pattern, kernels_on_device, monkeypatch):
    """With masters at hand, as from ZeRO-3's one gather of all."""
    monkeypatch.setattr(layer_scores.sharding, "fp32_masters", lambda params, _: [param.detach() for param in params])
    found = []
    for num_layers in (1, 3):
        with pretended() as counts:
            model = module_to_device(mid_ramp(pattern, torch.float32, num_layers, width=24))
            before = counts.launches, counts.num_waits
            kernels_on_device.clear()
            update_masks(model, 0.5, progress=0.6)
            found.append((counts.launches - before[0], counts.num_waits - before[1], len(kernels_on_device)))
    assert found[0] == found[1]
    launches, waits, by_triton = found[0]
    assert waits <= 8
    assert launches <= 200
    assert pattern != "matrix" or (launches + waits, by_triton) == (PLANNED.total, PLANNED.triton)
