"""Sections of ``make gpu`` that compare a device with the CPU: kernels, masks, merges, gradients and a short run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_mask, pack_shard, shard_range
from pst_ds.core.coded_weight import OwnWeights
from pst_ds.core.experts.routing import Routing
from pst_ds.core.kernels.triton.launch import serves
from pst_ds.core.kernels.triton.scan import KernelScans
from pst_ds.core.layout import WeightLayout
from pst_ds.masks.layer_scores import LayerScores, whole_factors
from pst_ds.masks.update import update_masks
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.inject import pst_layers
from tools.gpu.bench import Bench, Row, pruned_layers
from tools.gpu.cards import checked

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHARDS = 504
"""Ranks of a large run; the shards of a matrix then start within rows and bytes."""
ROUNDING = 0.03
"""Largest relative difference of bf16 results, which devices sum in different orders."""
STEPS, STOP_AFTER = 40, 8
RUN = (
    'deepspeed_config="ds_configs/zero3.json"', 'model.attn_implementation="eager"', f"train.num_steps={STEPS}",
    'train.precision="bf16"', "schedule.initial_sparsity=0.3", "schedule.warmup_fraction=0",
    "schedule.cooldown_fraction=0",
)  # fmt: skip
"""Settings of the run: its last step updates the masks, and nothing in it adds in a random order."""


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compute as a CPU does: in a dry run, Triton's interpreter stands in for the device."""
    before = os.environ.get("PST_DS_TRITON")
    os.environ["PST_DS_TRITON"] = "0"
    try:
        yield
    finally:
        del os.environ["PST_DS_TRITON"]
        if before is not None:
            os.environ["PST_DS_TRITON"] = before


def smoke(bench: Bench) -> Iterator[Row]:
    """Run one kernel, and one collective of one rank."""
    if serves(bench.device):
        layer = pst_layers(pruned_layers(64).to(bench.device))["0"]
        ours = layer.masked_weight()
        with without_kernels():
            yield _close("a kernel computes what torch does", ours, layer.masked_weight())
    else:
        why = "kernels do not run on this card, or Triton is not installed. Install pst-ds[triton]"
        yield {"what": "a kernel computes what torch does", "measured": None, "why": why}
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(1 << 20, device=bench.device)
    dist.all_reduce(ones)
    yield {"what": f"{backend} sums over one rank", "measured": bool((ones == 1).all())}
    dist.destroy_process_group()


def bits(bench: Bench) -> Iterator[Row]:
    """Check that masks chosen here and on the CPU are bit-identical, and scores of shards of a large run."""
    side = bench.sizes.updates[0]
    for pattern in bench.sizes.patterns:
        here, there = pruned_layers(side, pattern).to(bench.device), pruned_layers(side, pattern)
        found = [update_masks(here, sparsity).checksum for sparsity in (0.25, 0.5)]
        with without_kernels():
            expected = [update_masks(there, sparsity).checksum for sparsity in (0.25, 0.5)]
        yield {"what": f"masks of {pattern!r} as on the CPU", "measured": found == expected}
    what = f"scores of shards of {SHARDS} ranks as on the CPU"
    if not serves(bench.device):
        yield {"what": what, "measured": None, "why": "kernels do not run on this card"}
        return
    shards = (0, 1, SHARDS // 2, SHARDS - 1)
    yield {"what": what, "measured": all(_same_scores(bench, side, shard) for shard in shards)}


def _same_scores(bench: Bench, side: int, shard: int) -> bool:
    """Return whether the kernels sort the weights of a shard around its median score as the CPU does."""
    start, stop = shard_range(side * side, SHARDS, shard)
    if start == stop:
        return True
    here, there = (_scores(side, start, stop, device) for device in (bench.device, CPU))
    (matrix,) = here.matrices
    with without_kernels():
        keys = torch.cat([there.keys(matrix, rect).flatten() for rect in there.own_rects(matrix)])
    own, median, num_bytes = here.own_keys(matrix), int(keys.median()), -(-keys.numel() // 8)
    assert own is not None
    scans = KernelScans([own], [(median, median)], [own.count])
    expected = (pack_shard(mask, num_bytes) for mask in (keys > median, keys == median))
    found = (scans.bits_of(words)[0].cpu() for words in (scans.above, scans.inside))
    return all(map(torch.equal, found, expected))


def _scores(side: int, start: int, stop: int, device: torch.device) -> LayerScores:
    layer = pst_layers(pruned_layers(side).to(device))["0"]
    (factors,) = whole_factors([layer])
    assert layer.weight is not None
    values = layer.weight.detach().flatten()[start:stop].clone()
    return LayerScores("0", layer, factors, OwnWeights(values, start, layer.layout.shape[1]))


def merge(bench: Bench) -> Iterator[Row]:
    """Compare merged weights, outputs and gradients with the CPU's: of layers in one shard and many, of experts."""
    side = bench.sizes.updates[0]
    for num_shards in (1, SHARDS):
        here = _computed(side, num_shards, bench.device)
        with without_kernels():
            there = _computed(side, num_shards, CPU)
        pruned = here.pop("pruned")
        yield {"what": f"pruned weights are 0, num_shards = {num_shards}", "measured": not pruned.any()}
        for name, ours in here.items():
            yield _close(f"{name} as on the CPU, num_shards = {num_shards}", ours, there[name])
    here = _of_experts(side, bench.device)
    with without_kernels():
        there = _of_experts(side, CPU)
    for name, ours in here.items():
        yield _close(f"{name} as on the CPU, experts", ours, there[name])


def _of_experts(side: int, device: torch.device) -> dict[str, Tensor]:
    """Return on the host the outputs and gradients of a stack of experts, of which two have no tokens."""
    experts, config = 8, PSTConfig()
    layout = WeightLayout(experts * side, side, num_matrices=2 * experts, num_experts=experts)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(experts, side, side, generator=generator).bfloat16() * 0.02
    own = torch.nn.Parameter(weight, requires_grad=False), None, layout, config.rule_for("experts"), config.of_experts
    stack = PSTExpertStack("experts", *own, SHARDS, (0.016,) * layout.num_matrices)
    stack.pst_mask.data = pack_mask(torch.rand(layout.numel, generator=generator) < 0.5, SHARDS)
    for _, param in stack.factor_parameters():
        param.data = torch.randn(param.shape, generator=generator).bfloat16() * 0.1
    index = torch.tensor([0, 2, 3, 4, 5, 6])[torch.rand(96, 6, generator=generator).topk(2).indices].to(device)
    x = torch.randn(96, side, generator=generator).bfloat16().to(device).requires_grad_()
    grad = torch.randn(192, side, generator=generator).bfloat16().to(device)
    y = stack.to(device)(x, Routing.of(index, torch.ones(index.shape, device=device), experts), by_token=True)
    y.backward(grad)
    found = {"outputs": y, "gradient of x": x.grad}
    found |= {f"gradient of {name}": param.grad for name, param in stack.factor_parameters()}
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def _computed(side: int, num_shards: int, device: torch.device) -> dict[str, Tensor]:
    """Return on the host the merged weight, its pruned part, outputs and gradients of a layer with a random mask."""
    layer = pst_layers(pruned_layers(side, num_shards=num_shards))["0"]
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(side, side, generator=generator) < 0.5
    layer.pst_mask.data.copy_(pack_mask(keep, num_shards))
    x, grad = (torch.randn(64, side, generator=generator).bfloat16().to(device) for _ in range(2))
    layer.to(device)
    y = layer(x.requires_grad_())
    y.backward(grad)
    merged = layer.masked_weight().detach().cpu()
    found = {"merged": merged, "pruned": merged[~keep], "outputs": y, "gradient of x": x.grad}
    found |= {f"gradient of {name}": param.grad for name, param in layer.factor_parameters()}
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def _close(what: str, ours: Tensor, reference: Tensor) -> Row:
    one, other = ours.detach().cpu().double(), reference.detach().cpu().double()
    off = float((one - other).norm() / other.norm())
    return checked(what, "" if off <= ROUNDING else f"relative difference {off:.3g}, more than {ROUNDING}")


def train(bench: Bench) -> Iterator[Row]:
    """Train with ``pst-ds train`` on ZeRO-3 and one rank: against the CPU's masks, and stopped and resumed."""
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="pst-ds-gpu-") as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        _train(whole)
        yield {"what": f"pst-ds train, ZeRO-3, {backend}, steps", "measured": STEPS}
        masks = _checksums(whole)
        yield {"what": "masks of the last step as on the CPU", "measured": masks[-1] == _checksum_on_cpu(whole)}
        _train(stopped, stop=True)
        yield {"what": "steps until it was stopped", "measured": _steps(stopped)}
        _train(stopped, "--resume")
        yield {"what": "same masks when stopped and resumed", "measured": _checksums(stopped) == masks}


def _train(folder: Path, *options: str, stop: bool = False) -> None:
    """Run ``pst-ds train`` into ``folder``; ``stop``: end it by SIGTERM after some steps. Raises RuntimeError."""
    settings = [option for text in (f"output_dir={json.dumps(str(folder))}", *RUN) for option in ("--set", text)]
    command = [sys.executable, "-m", "pst_ds", "train", "tests/data/causal_lm.toml", *settings, *options]
    with subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stderr is not None
        last = ""
        for line in child.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
            if stop and line.startswith(f"step {STOP_AFTER}/"):
                child.terminate()
    expected = 75 if stop else 0
    if child.returncode != expected:
        raise RuntimeError(f"pst-ds train ended with {child.returncode} instead of {expected}: {last}")


def _lines(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _checksums(folder: Path) -> list[str]:
    return [line["mask_checksum"] for line in _lines(folder) if line["event"] == "mask_update"]


def _steps(folder: Path) -> int:
    return max(line["step"] for line in _lines(folder))


def _checksum_on_cpu(folder: Path) -> str:
    """Return the checksum of the masks that the CPU chooses from the fp32 masters of the run's last checkpoint."""
    from pst_ds.checkpoint.format import read_checkpoint
    from pst_ds.checkpoint.restore import load_into, trainable
    from pst_ds.config.toml import load_run_folder
    from pst_ds.train.model import build_model
    from pst_ds.train.resolved import load_tokenizer

    run = load_run_folder(folder)
    model = build_model(run, [], load_tokenizer(run), zero3_config=None).module
    for _, param in trainable(model):
        param.data = param.data.float()
    load_into(model, read_checkpoint((folder / "checkpoints" / "final").resolve()))
    with without_kernels():
        return update_masks(model, run.schedule.final_sparsity).checksum


def tests(bench: Bench) -> Iterator[Row]:
    """Run the tests marked gpu; without a GPU, only collect them."""
    collect = [] if bench.device.type == "cuda" else ["--collect-only"]
    files = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in p.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", *collect, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    sys.stderr.write(done.stdout + done.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    yield {"what": "tests marked gpu", "measured": last}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    yield checked("they pass", (", ".join(failed) or last) if done.returncode else "")
