"""The sections of ``make gpu``. Each returns rows of measurements and predictions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.formats import QuantizedFormat
from pst_ds.inference.runtime import SparseLinear
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.machines import MACHINES, Machine
from pst_ds.planning.memory import ZeroSettings, memory_plan
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import COUNTS, Batch, TimePlan, time_plan
from tools.bench.timing import medians

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("matrix", "global", "row", "2:4", "16x1")
SPARSITIES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 2
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 4096
    updates: tuple[int, ...] = (1024, 4096, 8192)
    """Sides of the matrices whose masks are updated."""
    matrix: tuple[int, int] = (11008, 4096)
    """Shape of the matrix whose kernels and products are timed."""
    repeats: int = 20


TINY = Sizes(64, 96, 1, 4, 50, 16, (32, 48, 64), (96, 64), 2)


@dataclass(frozen=True)
class Bench:
    """Device, sizes and predicted machine of a section."""

    device: torch.device
    sizes: Sizes
    machine: Machine

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median seconds of ``run`` until the device is done, after two warm-up runs."""

        def until_done() -> None:
            run()
            self.wait()

        self.wait()
        return medians({"run": until_done}, self.sizes.repeats, warmup=2)["run"]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def llama(self) -> LlamaForCausalLM:
        """Return a Llama with random bf16 weights, the same in every call."""
        s = self.sizes
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers, use_cache=False,
            num_attention_heads=s.heads, num_key_value_heads=s.heads, vocab_size=s.vocabulary,
        )  # fmt: skip
        with self.device:
            return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def machine_of_card(name: str) -> Machine:
    """Return the predicted rates of a card by its name; those of an H100 for unknown cards."""
    low = name.lower()
    return next((machine for key, machine in MACHINES.items() if key in low), MACHINES["h100"])


def marked_tests(bench: Bench) -> list[Row]:
    """Run the tests marked gpu; without a GPU, only collect them."""
    collect = [] if bench.device.type == "cuda" else ["--collect-only"]
    files = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in p.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", *collect, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return [
        {"what": "tests marked gpu", "measured": (done.stdout.strip().splitlines() or [""])[-1], "rc": done.returncode}
    ]


def _layers(bench: Bench, side: int, pattern: str = "matrix", device: torch.device | None = None) -> nn.Module:
    """Return three bf16 layers of (side, side) with nonzero factors, the same on every device."""
    torch.manual_seed(3)
    model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(3)]).bfloat16()
    inject_pst(model, PSTConfig(pattern=pattern, modules_to_save=(), target_modules=("0", "1", "2")))
    for param in model.parameters():
        if param.requires_grad:
            param.data = (torch.randn(param.shape) * 0.2).to(param.dtype)
    return model.to(device or bench.device)


def bits(bench: Bench) -> list[Row]:
    """Check that masks chosen here and on the CPU are bit-identical."""
    rows = []
    for pattern in PATTERNS:
        here, there = (
            update_masks(_layers(bench, bench.sizes.updates[0], pattern, device), 0.5).checksum
            for device in (bench.device, torch.device("cpu"))
        )
        rows.append({"what": f"masks of {pattern!r} as on the CPU", "measured": here == there})
    return rows


def _trained(bench: Bench, kind: str) -> nn.Module:
    model: nn.Module = bench.llama()
    if kind == "pst":
        inject_pst(model, PSTConfig(modules_to_save=()))
    elif kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return model


def planned(bench: Bench) -> tuple[TimePlan, int]:
    """Return the predicted times and peak bytes of the training step of :func:`steps`."""
    model = inject_pst(nn.Module.to(bench.llama(), "meta"), PSTConfig(modules_to_save=(), relative_magnitude=False))
    numbers, zero = (
        model_numbers(model, device=bench.machine.device),
        ZeroSettings(stage=None, backend=bench.machine.backend),
    )
    tokens = bench.sizes.tokens
    trace = trace_micro_batch(model, batch=1, sequence=tokens, checkpointing=False)
    batch = Batch(tokens, tokens, moved=trace.moved, launches=trace.launches)
    memory = memory_plan(numbers, zero, activations=trace.activations, device=bench.machine.device)
    return time_plan(numbers, zero, batch, bench.machine), memory.peak


def steps(bench: Bench) -> list[Row]:
    """Time a step of PST, full fine-tuning and PEFT's LoRA with AdamW on one device, and measure PST's peak memory."""
    times, peak = planned(bench)
    predicted = {"pst": times.step, "full": times.full_step}
    found: dict[str, float] = {}
    rows: list[Row] = []
    for kind in ("pst", "full", "lora"):
        try:
            model = _trained(bench, kind)
        except ImportError:
            rows.append({"what": f"step, {kind}", "measured": None, "why": "peft is not installed"})
            continue
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        ids = torch.randint(0, bench.sizes.vocabulary, (1, bench.sizes.tokens), device=bench.device)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer, ids: Tensor = ids) -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[kind] = bench.seconds(step)
        rows.append({"what": f"step, {kind}, ms", "measured": found[kind] * 1e3,
                     "predicted": predicted[kind] * 1e3 if kind in predicted else None})  # fmt: skip
        if kind == "pst":
            used = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else None
            rows.append({"what": "peak memory, pst, GB", "measured": used, "predicted": peak / 1e9})
        del model, optimizer
    for kind in ("full", "lora"):
        if kind in found:
            rows.append({"what": f"step, pst / {kind}", "measured": found["pst"] / found[kind],
                         "predicted": predicted["pst"] / predicted[kind] if kind in predicted else None})  # fmt: skip
    return rows


def updates(bench: Bench) -> list[Row]:
    """Time mask updates of three matrices at three sizes."""
    rows = []
    for side in bench.sizes.updates:
        model = _layers(bench, side)
        shares = iter([0.3, 0.5] * bench.sizes.repeats * 2)
        measured = bench.seconds(lambda model=model, shares=shares: update_masks(model, next(shares)))  # type: ignore[misc]
        plan = time_plan(model_numbers(model), ZeroSettings(stage=None), Batch(1, 1), bench.machine)
        rows.append({"what": f"mask update, 3 x {side} x {side}, ms", "measured": measured * 1e3,
                     "predicted": plan.update * 1e3})  # fmt: skip
    return rows


def kernels(bench: Bench) -> list[Row]:
    """Time the merge, and the backward pass without its products, next to the predicted memory traffic."""
    outputs, inputs = bench.sizes.matrix
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False)).bfloat16()
    inject_pst(model, PSTConfig(modules_to_save=(), target_modules=("0",)))
    (layer,) = pst_layers(model.to(bench.device)).values()
    counts, weights = COUNTS[bench.machine.code], outputs * inputs
    few = 16
    x = torch.randn(few, inputs, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    merge = bench.seconds(layer.masked_weight)
    backward = bench.seconds(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    rate = bench.machine.memory_bytes
    return [
        {"what": "M . W, us", "measured": merge * 1e6, "predicted": weights * counts.merge_bytes / rate * 1e6},
        {"what": f"backward of {few} tokens, us", "measured": backward * 1e6,
         "predicted": weights * (counts.backward_bytes + 4) / rate * 1e6},
    ]  # fmt: skip


def decode(bench: Bench) -> list[Row]:
    """Time products of a few vectors with bf16 and quantised bitmask layers, relative to dense ones."""
    outputs, inputs = bench.sizes.matrix
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    there, rows = dense.to(bench.device), []
    for sparsity in SPARSITIES:
        kept = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(1)) >= sparsity
        for grid in (None, Grid(8), Grid(4)):
            form = "bitmask" if grid is None else QuantizedFormat("bitmask", grid)
            layer = SparseLinear.from_dense(dense * kept, None, form).to(bench.device)
            bytes_of_value = 2 if grid is None else grid.bits / 8
            for vectors in (1, 16):
                x = torch.randn(vectors, inputs, device=bench.device, dtype=torch.bfloat16)
                with torch.no_grad():
                    plain = bench.seconds(lambda x=x: torch.nn.functional.linear(x, there))  # type: ignore[misc]
                    packed = bench.seconds(lambda x=x, layer=layer: layer(x))  # type: ignore[misc]
                what = f"{vectors} x, dense / {'bf16' if grid is None else grid.values} bitmask at {sparsity:.0%}"
                bound = 2 / (bytes_of_value * (1 - sparsity) + 1 / 8)
                rows.append({"what": what, "measured": plain / packed, "predicted": bound})
    return rows


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "tests": marked_tests, "bits": bits, "steps": steps, "updates": updates, "kernels": kernels, "decode": decode,
}  # fmt: skip
