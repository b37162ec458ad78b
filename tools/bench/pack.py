"""What a packed export costs a core: to merge, pack and hash one matrix, disk excluded.

The input is a bf16 base weight with its mask and rank-8 factors, as a checkpoint has them. The weights take turns, and
are twice as large together as the last-level cache, so that they come from memory. Merge is ``merged_weight``: packing
takes what the mask keeps, so nothing is masked before. Hash is SHA-256 of every part. MB/s count the bytes of the dense
matrix, by the wall clock and by the processor's, which other work on the machine disturbs less. One thread; medians,
and the formats take turns. The merge with its mask, as in the forward pass, the check and unpacking are timed beside,
and not counted.

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
from tools.bench.timing import conditions, print_json, progress, timed

DTYPE, RANK = torch.bfloat16, 8
BARS = {("bitmask", 0.5): 400.0, ("bitmask", 0.9): 800.0}
"""MB/s of dense input that are asked for."""
STAGES = ("merge", "pack", "hash")
BESIDE = ("masked_merge", "check", "unpack")
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True, slots=True)
class Case:
    """One format at one sparsity, with the mask to be packed."""

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
    stated = conditions(dtype="bfloat16", rank=RANK, repeats=arguments.repeats, bar="merge, pack and hash together")
    report = {"benchmark": "pack", "conditions": stated, "rows": rows}
    if arguments.json:
        print_json(report)
    else:
        _print(report)


def default_input_bytes() -> int:
    """Twice the last-level cache, where that is known, and at least 256 MB."""
    try:
        cache = int(CACHE_SIZE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        cache = 0
    return max(2 * cache, 256 << 20)


def base_weights(shape: tuple[int, int], total_bytes: int) -> list[Tensor]:
    """As many bf16 matrices as fill ``total_bytes``, at least two."""
    count = max(2, -(-total_bytes // (shape[0] * shape[1] * DTYPE.itemsize)))
    first = torch.randn(shape).to(DTYPE)
    return [first, *(first.roll(turn, 0) for turn in range(1, count))]


def cases(shape: tuple[int, int], sparsities: list[float]) -> list[Case]:
    """Random masks: each sparsity for bitmask and csr, and two of every four for 2:4."""
    drawn = torch.rand(shape)
    found = []
    for sparsity in sparsities:
        mask = pack_mask(drawn >= sparsity)
        found += [Case(name, sparsity, mask) for name in ("bitmask", "csr")]
    rank = drawn.view(-1, 4).argsort(1).argsort(1)
    return [*found, Case("2:4", 0.5, pack_mask(rank >= 2))]


def measure(weights: list[Tensor], found: list[Case], repeats: int) -> list[dict[str, Any]]:
    """A row for each case: median seconds of every stage, and MB/s of all that is counted."""
    outputs, inputs = weights[0].shape
    layout = WeightLayout(outputs, inputs)
    factors = Factors(U=(torch.randn(outputs, RANK) * 0.01).to(DTYPE), V=torch.randn(RANK, inputs).to(DTYPE))
    runs: list[list[dict[str, float]]] = [[] for _ in found]
    packed_bytes = [0] * len(found)
    turn = 0
    for round_number in range(-1, repeats):  # the first is not counted
        for index, case in enumerate(found):
            turn += 1
            seconds, packed_bytes[index] = export_once(weights[turn % len(weights)], case, layout, factors)
            if round_number >= 0:
                runs[index].append(seconds)
    rows = zip(found, runs, packed_bytes, strict=True)
    return [summary(case.name, case.sparsity, layout.shape, seconds, packed) for case, seconds, packed in rows]


def export_once(weight: Tensor, case: Case, layout: WeightLayout, factors: Factors) -> tuple[dict[str, float], int]:
    """Seconds of each stage, and the bytes of the parts."""
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
    """One row of the report; ``within_bar``, by the wall clock, is None where no bar is set."""
    dense = shape[0] * shape[1] * DTYPE.itemsize
    together = statistics.median(sum(run[stage] for stage in STAGES) for run in runs)
    on_cpu = statistics.median(sum(run[f"cpu_{stage}"] for stage in STAGES) for run in runs)
    speed, bar = dense / together / 1e6, BARS.get((name, sparsity))
    return {
        "format": name,
        "shape": list(shape),
        "sparsity": sparsity,
        "mb_per_second": speed,
        "mb_per_cpu_second": dense / on_cpu / 1e6,
        "bar_mb_per_second": bar,
        "within_bar": None if bar is None else speed >= bar,
        "seconds": {
            "together": together,
            **{stage: statistics.median(run[stage] for run in runs) for stage in STAGES + BESIDE},
        },
        "bytes_ratio": packed / dense,
    }


def _print(report: dict[str, Any]) -> None:
    stated = report["conditions"]
    print(f"{stated['hardware']}, one thread, bf16, rank {stated['rank']}, medians of {stated['repeats']}; times in ms")
    columns = ["format", "shape", "sparsity", "MB/s", "bar", "MB/cpu s", *STAGES, *BESIDE, "bytes/dense"]
    print("  ".join(f"{column:>{max(10, len(column))}}" for column in columns))
    for row in report["rows"]:
        bar = row["bar_mb_per_second"]
        cells = [
            row["format"],
            "x".join(map(str, row["shape"])),
            f"{row['sparsity']:.2f}",
            f"{row['mb_per_second']:.0f}",
            f"{bar:.0f}" if bar else "-",
            f"{row['mb_per_cpu_second']:.0f}",
            *(f"{row['seconds'][stage] * 1e3:.1f}" for stage in STAGES + BESIDE),
            f"{row['bytes_ratio']:.3f}",
        ]
        print("  ".join(f"{cell:>{max(10, len(column))}}" for cell, column in zip(cells, columns, strict=True)))


def shape_of(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    return int(outputs), int(inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(4096, 4096), (11008, 4096)], metavar="OxI")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--input-bytes", type=int, help="of the matrices together (default: twice the cache)")
    return parser


if __name__ == "__main__":
    main()
