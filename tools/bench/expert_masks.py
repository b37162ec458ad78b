"""A mask update of many small matrices, as stacks of experts have them, against one of a single matrix as large.

One process, one thread; both take turns. ``exchanged``: bytes that a rank of ``--ranks`` would send for selection, from
the sizes alone: keys and counts of the matrices that a border between two shards cuts, and a number for each.

    python -m tools.bench.expert_masks --json
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import shard_numel
from pst_ds.core.bracket import NUM_COUNTS, sample_size
from pst_ds.core.layout import WeightLayout
from pst_ds.core.select import DIGIT_BITS
from pst_ds.masks.update import update_masks
from pst_ds.nn.linear import PSTLinear
from tools.bench.timing import conditions, medians, print_json, rounded

_MOST_HISTOGRAMS = 3


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "expert_masks",
        "conditions": conditions(
            dtype="bfloat16", experts=arguments.experts, outputs=arguments.outputs, inputs=arguments.inputs,
            pattern=arguments.pattern, repeats=arguments.repeats,
        ),
        **measure(arguments),
        "exchanged": exchanged(arguments.experts, arguments.outputs * arguments.inputs, arguments.ranks),
    }  # fmt: skip
    if arguments.json:
        print_json(result)
    else:
        print(rounded(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nanoseconds a weight of an update of ``experts`` matrices, and of one."""
    models = {"experts": _model(arguments, arguments.experts), "one_matrix": _model(arguments, 1)}
    share = 0.5
    seconds = medians(
        {name: partial(update_masks, model, share) for name, model in models.items()},
        repeats=arguments.repeats, warmup=1,
    )  # fmt: skip
    weights = arguments.experts * arguments.outputs * arguments.inputs
    return {"ns_per_weight": {name: value / weights * 1e9 for name, value in seconds.items()}}


def _model(arguments: argparse.Namespace, matrices: int) -> nn.Module:
    torch.manual_seed(0)
    outputs = arguments.experts * arguments.outputs
    weight = nn.Parameter(torch.empty(outputs, arguments.inputs, dtype=torch.bfloat16).normal_(), requires_grad=False)
    layout = WeightLayout(outputs, arguments.inputs, num_matrices=matrices)
    model = nn.Module()
    config = PSTConfig(pattern=arguments.pattern, modules_to_save=())
    model.layer = PSTLinear("layer", weight, None, layout, config, 1, (1.0,) * matrices)
    for _, param in model.layer.factor_parameters():
        nn.init.normal_(param, std=0.1)
    return model


def exchanged(matrices: int, numel: int, ranks: int) -> int:
    """Bytes that selection in a stack of so many matrices of ``numel`` weights sends at most, of one rank."""
    share = shard_numel(matrices * numel, ranks)
    cut = len({border // numel for border in range(share, matrices * numel, share) if border % numel})
    counts = NUM_COUNTS + _MOST_HISTOGRAMS * (1 << DIGIT_BITS) + ranks
    return 8 * matrices + cut * (4 * sample_size(numel) + 8 * counts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--experts", type=int, default=128, help="matrices")
    parser.add_argument("--outputs", type=int, default=768)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--pattern", default="matrix")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
