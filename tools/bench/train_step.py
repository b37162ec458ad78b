"""Time and memory of a training step of PST, full fine-tuning, LoRA and the plain algorithm.

Every method has its own ranks. PST is started again for each baseline, and the two take steps in turn; where both do
not fit in memory (``--in-turn-below``, in GiB), PST takes all its steps first. Where the baseline alone does not fit,
both are measured at as many layers as do, and the pair says so. A ratio is of two medians of such a pair. Results are
merged into ``--results`` pair by pair, so that a long run can be done in parts with ``--methods``.

    python -m tools.bench.train_step --json
    python -m tools.bench.train_step --json --methods plain --repeats 3
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pst_ds.core.kernels.host import available_bytes
from tools.bench.ranks import Ranks, slowest
from tools.bench.timing import conditions, print_json, progress, rounded
from tools.bench.variants import METHODS, Shape, Variant, add_shape_options, shape_of

BASELINES = METHODS[1:]
NEEDED_BYTES_PER_WEIGHT = {"full_finetuning": 24, "lora": 8, "plain": 24}
"""About what all ranks of the baseline need together, activations of 2,048 tokens a rank with them."""
FREE_SHARE = 0.8
"""Of the free memory, how much a baseline may need."""
SELECTING = ("plain",)
"""Baselines that select their masks in every step, so PST does too."""
COLUMNS = ("forward", "backward", "optimizer", "mask_update", "step", "cpu_step")
"""Of the table; every part is measured in seconds and, as ``cpu_*``, in seconds of processor time."""


def main() -> None:
    arguments = _parser().parse_args()
    shape = shape_of(arguments, Shape)
    stated = conditions(shape=asdict(shape), dtype="bfloat16", ranks=arguments.ranks, zero_stage=3)
    results = _earlier(arguments.results, stated)
    for baseline in BASELINES:
        if baseline in arguments.methods:
            results["not_run"].pop(baseline, None)
            layers = fitting_layers(baseline, shape, free_gib())
            if layers:
                results["pairs"][baseline] = run_pair(baseline, replace(shape, layers=layers), arguments)
            else:
                needed = needed_gib(baseline, replace(shape, layers=1))
                results["not_run"][baseline] = f"needs about {needed:.0f} GiB at one layer"
            _write(arguments.results, results)
    report = summary(results)
    if arguments.json:
        print_json(report)
    else:
        _print_table(report)


def run_pair(baseline: str, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds and the facts of PST and of ``baseline``."""
    together = needed_gib(baseline, shape) <= arguments.in_turn_below
    groups = [["pst", baseline]] if together else [["pst"], [baseline]]
    found: dict[str, Any] = {"layers": shape.layers, "in_turn": together}
    found |= {"repeats": arguments.repeats, "warmup": arguments.warmup}
    for methods in groups:
        found |= run_group(methods, shape, arguments.ranks, arguments.repeats, arguments.warmup)
    return found


def needed_gib(baseline: str, shape: Shape) -> float:
    return NEEDED_BYTES_PER_WEIGHT[baseline] * weights_of(shape) / 2**30


def free_gib() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    free = available_bytes()
    return math.inf if free is None else free / 2**30


def fitting_layers(baseline: str, shape: Shape, free: float) -> int:
    """The most layers, up to those of ``shape``, at which the baseline fits in FREE_SHARE of ``free`` GiB; or 0."""
    needed = {n: needed_gib(baseline, replace(shape, layers=n)) for n in range(1, shape.layers + 1)}
    return max((n for n, gib in needed.items() if gib <= FREE_SHARE * free), default=0)


def weights_of(shape: Shape) -> int:
    block = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    return shape.layers * block + 2 * shape.vocabulary * shape.hidden


def run_group(
    methods: list[str], shape: Shape, num_ranks: int, repeats: int, warmup: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds and the facts of each of ``methods``; they take a step in turn."""
    steps: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    with ExitStack() as running:
        teams = {method: running.enter_context(Ranks(num_ranks, Variant, method, shape)) for method in methods}
        for turn in range(warmup + repeats):
            for method, team in teams.items():
                seconds = slowest(team.call("step"))
                progress(f"{method} step {turn}: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
                if turn >= warmup:
                    steps[method].append(seconds)
        facts = {method: slowest(team.call("facts")) for method, team in teams.items()}
    medians = {
        method: {part: statistics.median(step[part] for step in found) for part in found[0]}
        for method, found in steps.items()
    }
    return {method: {"seconds": medians[method], "bytes_per_rank": facts[method]} for method in methods}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The measured pairs, and ours over theirs in time and memory."""
    report = {**results, "ratios_without_update": {}, "ratios_with_update": {}, "memory_ratios": {}, "cpu_ratios": {}}
    for baseline, pair in results["pairs"].items():
        ours, theirs = pair["pst"], pair[baseline]
        seconds = ours["seconds"]
        report["ratios_without_update"][baseline] = seconds["step"] / theirs["seconds"]["step"]
        report["ratios_with_update"][baseline] = (seconds["step"] + seconds["mask_update"]) / theirs["seconds"]["step"]
        update = seconds["cpu_mask_update"] if baseline in SELECTING else 0.0
        report["cpu_ratios"][baseline] = (seconds["cpu_step"] + update) / theirs["seconds"]["cpu_step"]
        report["memory_ratios"][baseline] = ours["bytes_per_rank"]["memory"] / theirs["bytes_per_rank"]["memory"]
    report["ratios"] = {
        baseline: report["ratios_with_update" if baseline in SELECTING else "ratios_without_update"][baseline]
        for baseline in results["pairs"]
    }
    return report


def _earlier(path: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """Pairs measured before under the same conditions, or none."""
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["conditions"] == json.loads(json.dumps(stated)):
            return results
    return {"benchmark": "train_step", "conditions": stated, "pairs": {}, "not_run": {}}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def _print_table(report: dict[str, Any]) -> None:
    stated = report["conditions"]
    print(f"{stated['hardware']}, {stated['ranks']} ranks, {stated['shape']}")
    print(f"{'seconds':<16}" + "".join(f"{part:>12}" for part in COLUMNS) + "   GB above weights")
    for baseline, pair in report["pairs"].items():
        for method in ("pst", baseline):
            seconds, size = pair[method]["seconds"], pair[method]["bytes_per_rank"]["memory"] / 1e9
            numbers = "".join(f"{seconds[part]:>12.3f}" if part in seconds else f"{'-':>12}" for part in COLUMNS)
            print(f"{method:<16}{numbers}{size:>19.2f}")
        time, memory = report["ratios"][baseline], report["memory_ratios"][baseline]
        print(f"pst / {baseline}, {pair['layers']} layers: time {time:.3f}, memory {memory:.3f}")
    for baseline, reason in report["not_run"].items():
        print(f"{baseline}: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--methods", type=_methods, default=list(BASELINES), help=f"of {', '.join(BASELINES)}")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each method")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--in-turn-below", type=float, default=15.0, help="GiB that a baseline may need beside PST")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/train_step.json"))
    add_shape_options(parser, Shape)
    return parser


def _methods(text: str) -> list[str]:
    names = [name for name in text.split(",") if name not in ("", "pst")]
    if unknown := set(names) - set(BASELINES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(BASELINES)}")
    return names


if __name__ == "__main__":
    main()
