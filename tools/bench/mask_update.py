"""Time of a mask update under ZeRO-3, compared with gather + torch.topk, a read of the shard, and a training step.

For 1, 2 and 4 ranks and 1x, 4x and 16x parameters: ``update_masks``; the obvious implementation of the same selection
(every rank gathers each weight and its fp32 factors, scores it and calls ``torch.topk``); and a streaming read of the
rank's weight shard as lower bound. All three take turns in the same processes. Between two rounds the masters change as
in a training step and the sparsity follows its schedule.

The share of a step is extrapolated to all layers from a PST step and a mask update with 1 and with 3 layers.

    python -m tools.bench.mask_update --json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_shard
from pst_ds.core.schedule import CubicSchedule
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import ranks, sharding
from tools.bench.ranks import Ranks, slowest
from tools.bench.timing import benchmark_parser, conditions, medians_of, print_result, progress, timed
from tools.bench.variants import LEARNING_RATE, Shape, Variant, add_shape_options, shape_of, zero3_engine

MATRICES = 8
RAMP = CubicSchedule(final_sparsity=0.9, num_steps=1000)
FIRST_STEP = 400
SHARE_LAYERS = (1, 3)
PICKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "gather_topk": lambda scores, keep: _mask_at(scores, scores.topk(keep, sorted=False).indices),
    "gather_kthvalue": lambda scores, keep: scores > scores.kthvalue(scores.numel() - keep).values,
}


def _mask_at(scores: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, kept, True)


class MaskUpdates:
    """Mask updates of ``MATRICES`` bf16 matrices of width x width under ZeRO-3, on this rank."""

    def __init__(self, width: int):
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(width, width, bias=False).bfloat16() for _ in range(MATRICES))
        inject_pst(model, PSTConfig(modules_to_save=()), num_shards=ranks.world_size())
        for layer in pst_layers(model).values():
            for _, param in layer.factor_parameters():
                nn.init.normal_(param, std=0.1)
        self.engine = zero3_engine(model)
        self.layers = list(pst_layers(self.engine.module).values())
        self.weights = [weight for layer in self.layers if (weight := layer.weight) is not None]
        self.step = FIRST_STEP

    def round(self, steps: int, warmup: bool = False) -> dict[str, float]:
        """Return the seconds of each candidate, ``steps`` training steps after the last round. Collective."""
        self._move(steps)
        sparsity = RAMP.sparsity_at(self.step)
        candidates: dict[str, Callable[[], object]] = {
            "ours": partial(update_masks, self.engine.module, sparsity),
            "read": partial(_read, [sharding.shard_of(weight).values for weight in self.weights]),
        }
        if not warmup:
            candidates |= {name: partial(gathered_update, self.layers, sparsity, pick) for name, pick in PICKS.items()}
        seconds: dict[str, float] = {}
        for name, run in candidates.items():
            ranks.barrier()
            with timed(seconds, name):
                run()
        return seconds

    def agreement(self) -> float:
        """Return the share of this rank's mask bits that the gathered update chooses too; scores at the cut may tie."""
        sparsity = RAMP.sparsity_at(self.step)
        update_masks(self.engine.module, sparsity)
        whole = gathered_update(self.layers, sparsity, PICKS["gather_topk"])
        equal = count = 0
        for layer, mask in zip(self.layers, whole, strict=True):
            start, stop = layer.own_range()
            own = unpack_shard(sharding.shard_of(layer.pst_mask).values, stop - start)
            equal += int((own.bool() == mask[start:stop]).sum())
            count += own.numel()
        return equal / count

    def _move(self, steps: int) -> None:
        """Change every master as Adam does, by about its learning rate per step in one direction."""
        self.step += steps
        for masters in self.engine.optimizer.fp32_partitioned_groups_flat:
            masters.data.add_(torch.randn_like(masters), alpha=100 * LEARNING_RATE * steps)


def gathered_update(layers: list[PSTLayer], sparsity: float, pick: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """Return a bool mask of shape (numel,) per layer, scored and selected on every rank. Collective."""
    masks = []
    with torch.no_grad():
        for layer in layers:
            names, params = zip(*layer.factor_parameters(), strict=True)
            factors = dict(zip(names, sharding.fp32_masters(params), strict=True))
            constants = layer.constants
            assert layer.weight is not None
            with sharding.gathered([layer.weight]):
                weight = layer.weight.float() + constants.beta * (factors["U"] @ factors["V"])
            scores = weight.abs() / layer.magnitude_scales[0] + constants.alpha1 * (factors["A"] @ factors["B"])
            scores = scores + constants.alpha2 * (factors["R"].unsqueeze(1) + factors["C"])
            keep = scores.numel() - int(sparsity * scores.numel())
            masks.append(pick(scores.flatten(), keep))
    return masks


def _read(shards: list[Tensor]) -> None:
    """Read every byte once, as fp32 words, since torch reduces bf16 values slower than memory delivers them."""
    for shard in shards:
        words = shard[: shard.numel() // 2 * 2].view(torch.float32)
        words.amax()


def main() -> None:
    arguments = _parser().parse_args()
    stated = conditions(
        dtype="bfloat16 weights, fp32 masters of the factors",
        matrices=MATRICES,
        ranks=arguments.ranks,
        widths=arguments.widths,
        repeats=arguments.repeats,
        zero_stage=3,
    )
    sizes = [size for width in arguments.widths for size in measure(width, arguments.ranks, arguments.repeats)]
    result = {"benchmark": "mask_update", "conditions": stated, "sizes": sizes, **ratios(sizes)}
    if not arguments.no_share:
        result["share_of_step"] = share_of_step(
            shape_of(arguments, Shape), arguments.repeats, result.get("after_10_steps", 1.0)
        )
    print_result(result, as_json=arguments.json)


def measure(width: int, rank_counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Return medians for one model size. The teams of ranks, one per count, take turns."""
    with ExitStack() as running:
        teams = {count: running.enter_context(Ranks(count, MaskUpdates, width)) for count in rank_counts}
        found: dict[int, list[dict[str, float]]] = {count: [] for count in teams}
        late: dict[int, list[float]] = {count: [] for count in teams}
        first = {count: slowest(team.call("round", 1, True))["ours"] for count, team in teams.items()}
        for turn in range(repeats):
            for count, team in teams.items():
                found[count].append(slowest(team.call("round", 1)))
                late[count].append(slowest(team.call("round", 10, True))["ours"])
                told = ", ".join(f"{name} {value:.4f}" for name, value in found[count][-1].items())
                progress(f"width {width}, {count} ranks, round {turn}: {told}")
        agreement = {count: min(team.call("agreement")) for count, team in teams.items()}
    weights = MATRICES * width * width
    sizes = []
    for count, rounds in found.items():
        seconds = medians_of(rounds)
        seconds |= {"ours_first": first[count], "ours_after_10_steps": statistics.median(late[count])}
        sizes.append(
            {
                "ranks": count,
                "weights": weights,
                "seconds": seconds,
                "ns_per_weight_of_a_rank": seconds["ours"] / weights * count * 1e9,
                "over_gather_topk": seconds["ours"] / seconds["gather_topk"],
                "over_gather_kthvalue": seconds["ours"] / seconds["gather_kthvalue"],
                "over_read": seconds["ours"] / seconds["read"],
                "agreement": agreement[count],
            }
        )
    return sizes


def ratios(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return our time over the others' on two ranks, and our time on two ranks over one, at the largest size.

    "ratios" are of wall time, "cpu_ratios" of CPU time, which excludes waiting for another rank.
    """
    largest = max(size["weights"] for size in sizes)
    at = {size["ranks"]: size["seconds"] for size in sizes if size["weights"] == largest}
    result: dict[str, Any] = {"ratios": {}, "cpu_ratios": {}}
    if two := at.get(2):
        for kind, found in (("", result["ratios"]), ("cpu_", result["cpu_ratios"])):
            for name in (*PICKS, "read"):
                found[name] = two[f"{kind}ours"] / two[f"{kind}{name}"]
            if one := at.get(1):
                found["two_ranks_over_one"] = two[f"{kind}ours"] / one[f"{kind}ours"]
        result["after_10_steps"] = two["ours_after_10_steps"] / two["ours"]
    return result


def share_of_step(shape: Shape, repeats: int, after_10_steps: float) -> dict[str, Any]:
    """Measure steps and updates with a few layers of ``shape`` on two ranks, and extrapolate to all of its layers."""
    points = {}
    for layers in SHARE_LAYERS:
        with Ranks(2, Variant, "pst", replace(shape, layers=layers)) as team:
            team.call("step")
            steps = [slowest(team.call("step")) for _ in range(repeats)]
        points[layers] = medians_of(steps)
        progress(f"{layers} layers: " + ", ".join(f"{name} {value:.4f}" for name, value in points[layers].items()))
    return {**share_at(shape.layers, points, after_10_steps), "measured": points, "shape": asdict(shape)}


def share_at(layers: int, points: dict[int, dict[str, float]], after_10_steps: float) -> dict[str, float]:
    """Return the share of an update in a step at interval 1 and 10, extrapolated from ``points`` by layers.

    Args:
        after_10_steps: Seconds of an update 10 steps after the last one, over those 1 step after it.
    """
    few, many = sorted(points)

    def whole(name: str) -> float:
        a_layer = (points[many][name] - points[few][name]) / (many - few)
        return points[few][name] + a_layer * (layers - few)

    share = whole("mask_update") / whole("step")
    return {
        "interval_1": share,
        "interval_10": share * after_10_steps / 10,
        "cpu_interval_1": whole("cpu_mask_update") / whole("cpu_step"),
        "step_seconds": whole("step"),
        "mask_update_seconds": whole("mask_update"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4], help="comma-separated")
    parser.add_argument("--widths", type=_numbers, default=[1024, 2048, 4096], help=f"sides of the {MATRICES} matrices")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-share", action="store_true", help="skip the share of a training step")
    add_shape_options(parser, Shape)
    parser.set_defaults(layers=24)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
