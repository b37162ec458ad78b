"""Forward and backward of one linear layer: PST against full fine-tuning's and LoRA's, as ratios of medians.

For the Llama shapes (hidden 2048, intermediate 5504, bf16) also where the time goes, in nanoseconds a weight, beside
the matrix products alone: forward, dX and dW of the whole matrix, which are all that full fine-tuning does. LoRA needs
no dW, so 1.5 is the least that the ratio to it can be, but for LoRA's own small products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core import masked_linear
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.layer import PSTLayer
from tools.bench.timing import hardware, medians

SMALL_SHAPES = ((384, 384), (1536, 384), (384, 1536), (1024, 1024))
SMALL_TOKENS = (256, 1024, 4096)
LLAMA_SHAPES = ((2048, 2048), (5504, 2048), (2048, 5504))
LLAMA_TOKENS = 2048
RANK, SPARSITY = 8, 0.9
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS = ("_weight_gradient", "_merge", "_band_backward", "_input_gradient")
"""Parts of the backward pass of a tile, functions of pst_ds.core.masked_linear."""


@dataclass(frozen=True)
class Case:
    outputs: int
    inputs: int
    tokens: int
    dtype: torch.dtype


class LoRALinear(nn.Module):
    """y = x W0' + scale (x A') B', W0 frozen: what peft's layer computes, without dropout."""

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.A, self.B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x)) * self.scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=("llama", "small", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tile-bytes", type=int, default=0, help="pst.tile_bytes; 0 is the default")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: time on a processor, for a machine others use too"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(hardware())
    print(f"forward + backward of one layer without bias, ranks {RANK} and {RANK}, sparsity {SPARSITY}; ns a weight")
    rows = []
    if args.shapes in ("llama", "all"):
        for outputs, inputs in LLAMA_SHAPES:
            rows.append(_measure(Case(outputs, inputs, LLAMA_TOKENS, torch.bfloat16), args, breakdown=True))
    if args.shapes in ("small", "all"):
        for dtype in (torch.float32, torch.bfloat16):
            for outputs, inputs in SMALL_SHAPES:
                for tokens in SMALL_TOKENS:
                    rows.append(_measure(Case(outputs, inputs, tokens, dtype), args, breakdown=False))
    if args.json:
        about = {"bench": "step", "hardware": hardware(), "threads": args.threads, "ranks": 1, "repeats": args.repeats}
        about["clock"] = args.clock
        print(json.dumps({**about, "rank": RANK, "sparsity": SPARSITY, "tile_bytes": args.tile_bytes, "layers": rows}))


def _measure(case: Case, args: argparse.Namespace, *, breakdown: bool) -> dict[str, Any]:
    """Medians of turns, in ns a weight, and their ratios."""
    dense = nn.Linear(case.inputs, case.outputs, bias=False).to(case.dtype)
    lora = LoRALinear(case.outputs, case.inputs, RANK).to(case.dtype)
    layer = _pst_layer(case, args.tile_bytes)
    x = torch.randn(case.tokens, case.inputs, dtype=case.dtype, requires_grad=True)
    grad = torch.randn(case.tokens, case.outputs, dtype=case.dtype)
    clock = CLOCKS[args.clock]
    parts: list[dict[str, float]] = []

    def pst() -> None:
        with _timed(STEPS, clock) as seconds:
            _step(layer, x, grad)
        parts.append(seconds)

    candidates: dict[str, Callable[[], object]] = {
        "full_finetuning": lambda: _step(dense, x, grad),
        "lora": lambda: _step(lora, x, grad),
        "pst": pst,
    }
    if breakdown:
        candidates |= _products(dense.weight.detach(), x.detach(), grad)
        candidates["merge_forward"] = layer.masked_weight
    to_ns = 1e9 / (case.outputs * case.inputs)
    found = {name: seconds * to_ns for name, seconds in medians(candidates, args.repeats, 1, clock).items()}
    ratios = {name: found["pst"] / found[name] for name in ("full_finetuning", "lora")}
    print(
        f"{case.outputs:>6} x {case.inputs:<5} {str(case.dtype).removeprefix('torch.'):>9} {case.tokens:>5} tokens: "
        + ", ".join(f"{name} {found[name]:.2f}" for name in ("full_finetuning", "lora", "pst"))
        + "".join(f"; PST / {name} {ratio:.3f}" for name, ratio in ratios.items()),
        flush=True,
    )
    row: dict[str, Any] = {
        "outputs": case.outputs, "inputs": case.inputs, "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ns_a_weight": found, "ratios": ratios,
    }  # fmt: skip
    if breakdown:
        timed = parts[-args.repeats :]
        medians_of_parts = {name: statistics.median(run[name] for run in timed) * to_ns for name in STEPS}
        row["backward_ns_a_weight"] = {name.strip("_"): value for name, value in medians_of_parts.items()}
        floor = sum(found[name] for name in ("product_forward", "product_dx", "product_dw"))
        merge = f"merge_forward {found['merge_forward']:.2f}"
        print(f"{'':15}products alone: {floor:.2f} ({_listed(found, 'product_')}); {merge}")
        print(f"{'':15}backward by step: {_listed(row['backward_ns_a_weight'])}")
    return row


def _listed(numbers: dict[str, float], prefix: str = "") -> str:
    return ", ".join(f"{n.removeprefix(prefix)} {v:.2f}" for n, v in numbers.items() if n.startswith(prefix))


def _pst_layer(case: Case, tile_bytes: int) -> PSTLayer:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(case.inputs, case.outputs, bias=False).to(case.dtype)])
    inject_pst(model, PSTConfig(modules_to_save=(), score_rank=RANK, update_rank=RANK, tile_bytes=tile_bytes))
    update_masks(model, SPARSITY)
    (layer,) = pst_layers(model).values()
    return layer


def _step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(grad)


def _products(weight: Tensor, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    return {
        "product_forward": lambda: nn.functional.linear(x, weight),
        "product_dx": lambda: grad @ weight,
        "product_dw": lambda: grad.t() @ x,
    }


@contextmanager
def _timed(names: tuple[str, ...], clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    seconds = dict.fromkeys(names, 0.0)
    own = {name: getattr(masked_linear, name) for name in names}

    def timed(name: str) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            start = clock()
            result = own[name](*args, **kwargs)
            seconds[name] += clock() - start
            return result

        return run

    for name in names:
        setattr(masked_linear, name, timed(name))
    try:
        yield seconds
    finally:
        for name, function in own.items():
            setattr(masked_linear, name, function)


if __name__ == "__main__":
    main()
