"""A training step with weights rounded to a grid against the same step without, and what a search for scales takes.

Both are PST with final masks, in ranks of their own that take steps in turn; the ratio is of two medians, with the
search's share where one is made every ``--interval`` steps: 18 is what a run of 600 steps has by default.
``*_cpu`` is of processor time, which other work on the machine disturbs less. With ``--activations int8`` a third team
rounds the inputs of its layers too, and ``inputs_*`` are its ratios to rounded weights alone.

    python -m tools.bench.rounding --json --values int4
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from pst_ds.config.pst import PSTConfig
from pst_ds.core.packings import VALUE_BITS
from pst_ds.core.quantization import grid_of
from pst_ds.masks.scales import update_scales
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import freeze_scores, inject_pst, round_weights
from pst_ds.parallel import ranks
from tools.bench.ranks import Ranks, slowest
from tools.bench.timing import conditions, print_json, progress, timed
from tools.bench.variants import Shape, Variant, add_shape_options, random_llama, reset_peak, resident_bytes, shape_of

NAMES = ("plain", "rounded", "inputs")
"""As it is, with rounded weights, and with rounded inputs beside."""


class FinalMasks(Variant):
    """PST on this rank once its masks are final; weights in int8 or int4, or for "" as they are."""

    def __init__(self, values: str, activation_bits: int, dtype: torch.dtype, shape: Shape):
        self._memory_at_start = resident_bytes()
        grid = grid_of(values) if values else None
        config = PSTConfig(score_rank=shape.rank, update_rank=shape.rank)
        model = inject_pst(random_llama(shape, dtype), config, grid=grid, activation_bits=activation_bits)
        self._begin("pst", shape, model)
        freeze_scores(self.engine.module)
        self.method = "final masks"  # which no mask update follows
        if grid is not None:
            self.search()
            round_weights(self.engine.module)
        reset_peak()

    def search(self) -> dict[str, float]:
        """Seconds of a search for the scales of all layers. Collective."""
        seconds: dict[str, float] = {}
        ranks.barrier()
        with timed(seconds, "search"):
            update_scales(self.engine.module)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--values", choices=tuple(VALUE_BITS), default="int4")
    parser.add_argument("--activations", choices=("int8",), help="measure rounded inputs too")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--interval", type=int, default=18, help="steps between two searches")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    add_shape_options(parser, Shape)
    arguments = parser.parse_args()
    shape = shape_of(arguments, Shape)
    found = measured(shape, arguments)
    stated = conditions(shape=asdict(shape), dtype=arguments.precision, ranks=arguments.ranks, zero_stage=3)
    report = {"benchmark": "rounding", "conditions": stated, "values": arguments.values, **found}
    report |= ratios(found, arguments.interval)
    if arguments.json:
        print_json(report)
        return
    for name, parts in found.items():
        print(f"{name:<10}" + ", ".join(f"{part} {value:.3f}" for part, value in parts.items()))
    print(f"rounded / plain {report['ratio']:.3f}, by processor time {report['ratio_cpu']:.3f}")
    if arguments.activations:
        print(f"inputs / rounded {report['inputs_ratio']:.3f}, by processor time {report['inputs_ratio_cpu']:.3f}")


def measured(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each part of the steps, and of a search."""
    kinds = dict(zip(NAMES, (("", 16), (arguments.values, 16), (arguments.values, 8)), strict=True))
    if not arguments.activations:
        del kinds["inputs"]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    dtype = DTYPES[arguments.precision]
    with ExitStack() as running:
        teams = {
            name: running.enter_context(Ranks(arguments.ranks, FinalMasks, *kind, dtype, shape))
            for name, kind in kinds.items()
        }
        for turn in range(arguments.warmup + arguments.repeats):
            for name, team in teams.items():
                seconds = slowest(team.call("step"))
                if name == "rounded":  # the others' takes as long, or there is none
                    seconds |= slowest(team.call("search"))
                progress(f"{name} step {turn}: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
                if turn >= arguments.warmup:
                    steps[name].append(seconds)
    return {
        name: {part: statistics.median(step[part] for step in found) for part in found[0]}
        for name, found in steps.items()
    }


def ratios(found: dict[str, Any], interval: int) -> dict[str, float]:
    """A rounded step with its share of a search, over a plain one; and one with rounded inputs over the rounded one."""
    together = {}
    for end, kind in (("", ""), ("_cpu", "cpu_")):
        share = found["rounded"][f"{kind}search"] / interval
        rounded = found["rounded"][f"{kind}step"] + share
        together[f"ratio{end}"] = rounded / found["plain"][f"{kind}step"]
        if "inputs" in found:
            together[f"inputs_ratio{end}"] = (found["inputs"][f"{kind}step"] + share) / rounded
    return together


if __name__ == "__main__":
    main()
