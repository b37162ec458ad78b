"""Cost of a packed export on one core: merge, pack and hash one matrix, without disk access.

The input is a bf16 base weight with its mask and rank-8 factors, as in a checkpoint. The weights take turns and are
together twice as large as the last-level cache, so that they come from memory. Merge is ``merged_weight``; packing uses
only what the mask keeps. Hash is SHA-256 of every part. MB/s are dense bytes per second of wall time and of CPU time.
One thread, medians; the formats take turns. The masked merge of the forward pass, the check and unpacking are timed
too, but do not count.

    python -m tools.bench.pack --json
    python -m tools.bench.pack --shapes 4096x4096 --sparsity 0.5 0.9 --repeats 15
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.bits import pack_mask
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.scores import masked_weight, merged_weight
from pst_ds.formats import FORMATS, mask_row_bits
from tools.bench.timing import benchmark_parser, conditions, medians_of, print_result, progress, timed

DTYPE, RANK = torch.bfloat16, 8
STAGES = ("merge", "pack", "hash")
"""Stages that count. The others, for comparison, are "masked_merge", "check" and "unpack"."""
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True, slots=True)
class Case:
    """A format at a sparsity, with the mask to pack."""

    name: str
    sparsity: float
    mask: Tensor


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        weights = base_weights(shape, arguments.input_bytes or default_input_bytes())
        progress(f"{shape[0]} x {shape[1]}: {len(weights)} matrices take turns")
        rows += measure(weights, cases(shape, arguments.sparsity), arguments.repeats)
    stated = conditions(dtype="bfloat16", rank=RANK, repeats=arguments.repeats)
    print_result({"benchmark": "pack", "conditions": stated, "rows": rows}, as_json=arguments.json)


def default_input_bytes() -> int:
    """Return twice the size of the last-level cache, and at least 256 MB."""
    try:
        cache = int(CACHE_SIZE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 0
    return max(2 * cache, 256 << 20)


def base_weights(shape: tuple[int, int], total_bytes: int) -> list[Tensor]:
    """Return bf16 matrices of ``total_bytes`` together, at least two."""
    count = max(2, -(-total_bytes // (shape[0] * shape[1] * DTYPE.itemsize)))
    first = torch.randn(shape).to(DTYPE)
    return [first, *(first.roll(turn, 0) for turn in range(1, count))]


def cases(shape: tuple[int, int], sparsities: list[float]) -> list[Case]:
    """Return random masks: bitmask and csr at each sparsity, and 2:4."""
    drawn = torch.rand(shape)
    found = []
    for sparsity in sparsities:
        mask = pack_mask(drawn >= sparsity)
        found += [Case(name, sparsity, mask) for name in ("bitmask", "csr")]
    rank = drawn.view(-1, 4).argsort(1).argsort(1)
    return [*found, Case("2:4", 0.5, pack_mask(rank >= 2))]


def measure(weights: list[Tensor], found: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Return a row per case: median seconds of every stage, and MB/s."""
    outputs, inputs = weights[0].shape
    layout = WeightLayout(outputs, inputs)
    factors = Factors(U=(torch.randn(outputs, RANK) * 0.01).to(DTYPE), V=torch.randn(RANK, inputs).to(DTYPE))
    runs: list[list[dict[str, float]]] = [[] for _ in found]
    packed_bytes = [0] * len(found)
    turn = 0
    for round_number in range(-1, repeats):  # the first is a warm-up
        for index, case in enumerate(found):
            turn += 1
            seconds, packed_bytes[index] = export_once(weights[turn % len(weights)], case, layout, factors)
            if round_number >= 0:
                runs[index].append(seconds)
    rows = zip(found, runs, packed_bytes, strict=True)
    return [summary(case.name, case.sparsity, layout.shape, seconds, packed) for case, seconds, packed in rows]


def export_once(weight: Tensor, case: Case, layout: WeightLayout, factors: Factors) -> tuple[dict[str, float], int]:
    """Return the seconds of each stage, and the bytes of the parts."""
    seconds: dict[str, float] = {}
    form = FORMATS[case.name]
    with timed(seconds, "merge"):
        merged = merged_weight(weight, layout, factors, Constants())
    with timed(seconds, "pack"):
        parts = form.pack(merged, mask_row_bits(case.mask, layout))
    with timed(seconds, "hash"):
        for tensor in parts.values():
            hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()
    with timed(seconds, "masked_merge"):
        masked_weight(weight, case.mask, 1, layout, factors, Constants())
    with timed(seconds, "check"):
        form.check("weight", parts, layout.shape)
    with timed(seconds, "unpack"):
        form.unpack(parts)
    return seconds, sum(tensor.nbytes for tensor in parts.values())


def summary(
    name: str, sparsity: float, shape: tuple[int, int], runs: list[dict[str, float]], packed: int
) -> dict[str, Any]:
    """Return one row of the report from the seconds of all stages in ``runs`` and the bytes of the parts."""
    dense = shape[0] * shape[1] * DTYPE.itemsize
    together = statistics.median(sum(run[stage] for stage in STAGES) for run in runs)
    on_cpu = statistics.median(sum(run[f"cpu_{stage}"] for stage in STAGES) for run in runs)
    return {
        "format": name,
        "shape": list(shape),
        "sparsity": sparsity,
        "mb_per_second": dense / together / 1e6,
        "mb_per_cpu_second": dense / on_cpu / 1e6,
        "seconds": {"together": together, **medians_of(runs)},
        "bytes_ratio": packed / dense,
    }


def shape_of(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    return int(outputs), int(inputs)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(4096, 4096), (11008, 4096)], metavar="OxI")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--input-bytes", type=int, help="bytes of all matrices (default: twice the cache)")
    return parser


if __name__ == "__main__":
    main()
