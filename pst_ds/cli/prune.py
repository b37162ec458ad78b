"""``pst-ds prune RUN_FILE --method METHOD --out DIR``: prune a run's pretrained model once, on calibration data."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, get_args

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import above, add_quiet_argument, add_run_arguments, add_shard_argument, count, load_run_or_folder
from pst_ds.config.one_shot import CHANNELS, ENGINES, REAP, Budgets, PruneConfig
from pst_ds.core.experts.tokens import unused_experts
from pst_ds.core.packings import GROUPS, VALUE_BITS, WHOLE_ROW
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from pst_ds.config.run import RunConfig
    from pst_ds.train.one_shot.pruning import PruneReport
    from pst_ds.writing.manifest import Facts


PRUNING_METHODS = {
    "magnitude": "smallest weights, no data",
    "wanda": "weights times norms of their inputs",
    "sparsegpt": "second-order, updates kept weights; also quantises (--bits)",
    "alps": "as sparsegpt, more accurate and slower",
    REAP: "whole experts",
    CHANNELS: "channels of feed-forward layers (--ffn): a smaller dense model",
}
"""Purpose of each method, for the help."""
FLAGS = flags_of_fields([*(field.name for field in fields(PruneConfig)), "out", "speedup"])
"""Flags for the settings that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML) that names the model, the layers and the calibration data")
    listed = "; ".join(f"{name}: {purpose}" for name, purpose in PRUNING_METHODS.items())
    add("--method", required=True, choices=tuple(PRUNING_METHODS), metavar="METHOD", help=listed)
    add("--out", required=True, metavar="DIR", help="model folder to write, dense with zeros")
    add("--sparsity", type=float, metavar="S", help="sparsity, or fraction of experts (default: the run file's)")
    add("--ffn", type=float, metavar="S", help="channels: share of feed-forward channels that stay, such as 0.25")
    add("--speedup", type=above(1), metavar="X", help="channels: find --ffn for a model X times as fast in --target")
    add("--target", choices=ENGINES, help="channels: where --speedup counts")
    add("--pattern", default="", metavar="P", help="row, matrix, N:M or blocks (default: pst.pattern, or row)")
    add("--keep-zeros", action="store_true", help="prune exactly the weights that are zero already")
    add("--bits", type=int, choices=sorted(VALUE_BITS.values()), help="quantise the kept weights too (sparsegpt)")
    add("--group", choices=(*map(str, GROUPS), WHOLE_ROW), help="weights per scale (default: row for 8 bits, 64 for 4)")
    add("--budgets", choices=get_args(Budgets), default="equal", help="distribution of sparsity over layers")
    add("--reconstruct", type=count, default=0, metavar="N", help="epochs that fit kept weights to dense outputs")
    add("--samples", type=count, default=128, metavar="N", help="calibration examples from data.train (default: 128)")
    add("--seed", type=int, default=0, help="seed of the choice of examples (default: 0)")
    add_shard_argument(parser)
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> Facts:
    start = time.perf_counter()
    run = load_run_or_folder(args)
    speedup = _with_share(run, args)
    # settings and options have the same names
    settings = {field.name: getattr(args, field.name) for field in fields(PruneConfig)}
    # the parser has texts, among which "row" is one
    if args.group not in (None, WHOLE_ROW):
        settings["group"] = int(args.group)
    config = PruneConfig(**settings)
    # torch is imported only now: settings that conflict are reported at once
    from pst_ds.parallel.launch import init_distributed, launch_environment
    from pst_ds.parallel.ranks import is_main
    from pst_ds.train.one_shot.pruning import prune_model

    launch = launch_environment()
    if launch.world_size > 1:
        init_distributed(launch)
    report = prune_model(run, args.out, config, shard_bytes=args.shard_bytes)
    result: Facts = {**report.facts, "out": args.out}
    # methods that remove experts or channels change modules and have no list of layers
    if report.layers:
        result["num_layers"] = len(report.layers)
    result |= speedup
    result["seconds"] = time.perf_counter() - start
    # all ranks have the same report
    if is_main():
        _print_report(config, report, result)
    return result


def _print_report(config: PruneConfig, report: PruneReport, result: Facts) -> None:
    """Print the line about the written folder, and a warning about experts that no token reached."""
    if config.method == CHANNELS:
        print(_line_of_channels(report, result))
    elif config.method == REAP:
        print(_line_of_experts(report, result))
    else:
        print(_line_of_weights(config, report, result))
    tokens = {}
    for layer in report.layers:
        if layer.expert_tokens:
            # by module: both of its stacks saw the same tokens
            tokens[layer.name.rpartition(".")[0]] = layer.expert_tokens
    unused = unused_experts(tokens)
    if unused:
        print(f"{unused}, and were pruned by magnitude. Add --samples", file=sys.stderr)


def _with_share(run: RunConfig, args: argparse.Namespace) -> dict[str, object]:
    """Set ``args.ffn`` to what ``args.speedup`` asks for; return facts for the result. Raises InputError."""
    if args.speedup is None and args.target is None:
        return {}
    if args.speedup is None or args.target is None or args.method != CHANNELS:
        raise InputError(f"--speedup and --target need each other and --method {CHANNELS}. Add what is missing")
    if args.ffn is not None:
        raise InputError(f"--speedup {args.speedup} chooses --ffn itself. Remove --ffn {args.ffn}")
    from pst_ds.planning.speedup import share_for

    args.ffn, expected = share_for(run, args.speedup, args.target)
    # two digits: it is a prediction, not a measurement
    return {"target": args.target, "speedup_expected": round(expected, 2)}


def _line_of_weights(config: PruneConfig, report: PruneReport, result: Facts) -> str:
    line = f"wrote {report.out}: {config.method}, pattern {result['pattern']}, {len(report.layers)} layers"
    if "values" in result:
        line += f" quantised to {result['values']}, group {result['group']}"
    line += f", sparsity {result['sparsity_measured']:.6f} measured"
    # with --keep-zeros the model decides how many weights are zero, and nothing was requested
    line += ", unchanged" if config.keep_zeros else f", {result['sparsity_requested']} requested"
    # magnitudes need no data
    if "tokens" in result:
        line += f", on {result['samples']} examples of {result['tokens']:,} tokens"
    return f"{line}; {result['seconds']:.1f} s in total"


def _line_of_experts(report: PruneReport, result: Facts) -> str:
    record: Facts = report.record
    return (
        f"wrote {report.out}: reap, {result['experts']} of {result['experts_before']} experts in each of "
        f"{len(record['modules'])} modules, on {result['samples']} examples of {result['tokens']:,} "
        f"tokens; {result['seconds']:.1f} s in total"
    )


def _line_of_channels(report: PruneReport, result: Facts) -> str:
    # of the model's config.json: what differs from the model before
    settings = ", ".join(f"{name} = {value}" for name, value in result["config"].items())
    expected = ""
    if "target" in result:
        expected = f", {result['speedup_expected']} times as fast in {result['target']}"
    return (
        f"wrote {report.out}: channels, {settings}; {result['parameters']:,} of {result['parameters_before']:,} "
        f"parameters, on {result['samples']} examples{expected}; {result['seconds']:.1f} s in total"
    )
