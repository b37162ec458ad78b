"""Time and memory of a training step of PST, full fine-tuning, LoRA and the plain algorithm.

Every method has its own ranks. For each baseline, PST is started again and the two take steps in turn. If both do not
fit in memory together (``--in-turn-below``, in GiB), PST takes all its steps first. If the baseline does not fit, both
are measured with fewer layers, which the pair reports. Ratios are of medians of such a pair. Results are merged into
``--results`` pair by pair, so that a long run can be split with ``--methods``.

    python -m tools.bench.train_step --json
    python -m tools.bench.train_step --json --methods plain --repeats 3
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from tools.bench.ranks import Ranks, slowest
from tools.bench.timing import benchmark_parser, conditions, medians_of, print_result, progress, rounded
from tools.bench.variants import METHODS, Shape, Variant, add_shape_options, shape_of

BASELINES = METHODS[1:]
NEEDED_BYTES_PER_WEIGHT = {"full_finetuning": 24, "lora": 8, "plain": 24}
"""Approximate memory of all ranks of a baseline, including activations of 2,048 tokens per rank."""
FREE_SHARE = 0.8
"""Share of the free memory that a baseline may need."""
SELECTING = ("plain",)
"""Baselines that select their masks in every step, so PST does too."""


def main() -> None:
    arguments = _parser().parse_args()
    shape = shape_of(arguments, Shape)
    stated = conditions(shape=asdict(shape), dtype="bfloat16", ranks=arguments.ranks, zero_stage=3)
    results = _earlier(arguments.results, stated)
    for baseline in BASELINES:
        if baseline in arguments.methods:
            results["not_run"].pop(baseline, None)
            layers = fitting_layers(baseline, shape, psutil.virtual_memory().available / 2**30)
            if layers:
                results["pairs"][baseline] = run_pair(baseline, replace(shape, layers=layers), arguments)
            else:
                needed = needed_gib(baseline, replace(shape, layers=1))
                results["not_run"][baseline] = f"needs about {needed:.0f} GiB at one layer"
            _write(arguments.results, results)
    report = summary(results)
    print_result(report, as_json=arguments.json)


def run_pair(baseline: str, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds and the memory of PST and of ``baseline``."""
    together = needed_gib(baseline, shape) <= arguments.in_turn_below
    groups = [["pst", baseline]] if together else [["pst"], [baseline]]
    found: dict[str, Any] = {"layers": shape.layers, "in_turn": together}
    found |= {"repeats": arguments.repeats, "warmup": arguments.warmup}
    for methods in groups:
        found |= run_group(methods, shape, arguments.ranks, arguments.repeats, arguments.warmup)
    return found


def needed_gib(baseline: str, shape: Shape) -> float:
    return NEEDED_BYTES_PER_WEIGHT[baseline] * weights_of(shape) / 2**30


def fitting_layers(baseline: str, shape: Shape, free: float) -> int:
    """Return the most layers, up to those of ``shape``, with which the baseline fits in FREE_SHARE of ``free`` GiB."""
    needed = {n: needed_gib(baseline, replace(shape, layers=n)) for n in range(1, shape.layers + 1)}
    return max((n for n, gib in needed.items() if gib <= FREE_SHARE * free), default=0)


def weights_of(shape: Shape) -> int:
    block = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    return shape.layers * block + 2 * shape.vocabulary * shape.hidden


def run_group(
    methods: list[str], shape: Shape, num_ranks: int, repeats: int, warmup: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the median seconds and the memory of each of ``methods``, which take steps in turn."""
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
    return {method: {"seconds": medians_of(steps[method]), "bytes_per_rank": facts[method]} for method in methods}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return the measured pairs with the ratios of PST over the baseline in time and memory."""
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
    """Return the pairs measured before under the same conditions."""
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["conditions"] == json.loads(json.dumps(stated)):
            return results
    return {"benchmark": "train_step", "conditions": stated, "pairs": {}, "not_run": {}}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--methods", type=_methods, default=list(BASELINES), help=f"of {', '.join(BASELINES)}")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per method")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--in-turn-below", type=float, default=15.0, help="GiB that a baseline may need while PST runs")
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
