"""``pst-ds prune RUN_FILE --method METHOD --out DIR``: prune a run's pretrained model once, on calibration text."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from pst_ds.cli.main import add_quiet_argument, add_run_arguments, add_shard_argument, count, load_run_or_folder
from pst_ds.cli.prune.whole_experts import REAP, drop, require_fit
from pst_ds.config.methods import OneShotMethod
from pst_ds.core.experts.tokens import unused_experts
from pst_ds.core.packings import GROUPS, VALUE_BITS, WHOLE_ROW
from pst_ds.errors import InputError

_BITS = tuple(str(bits) for bits in sorted(VALUE_BITS.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML) that names the model, the layers and the text")
    parser.add_argument("--method", required=True, choices=(*get_args(OneShotMethod), REAP))
    parser.add_argument("--out", required=True, metavar="DIR", help="model folder to write, dense with zeros")
    zeros = "fraction of zeros, or of experts for reap (default: schedule.final_sparsity, or 1 - N/M)"
    parser.add_argument("--sparsity", type=float, metavar="S", help=zeros)
    pattern = "row, matrix, N:M or blocks (default: pst.pattern, but row instead of matrix with calibration text)"
    parser.add_argument("--pattern", default="", metavar="P", help=pattern)
    parser.add_argument("--keep-zeros", action="store_true", help="prune what is zero already, and nothing else")
    text = "round what is kept to so many bits in the same pass (sparsegpt)"
    parser.add_argument("--bits", type=int, choices=sorted(VALUE_BITS.values()), help=text)
    text = "weights of a row that share a scale (default: row for 8 bits, 64 for 4)"
    parser.add_argument("--group", choices=(*map(str, GROUPS), WHOLE_ROW), help=text)
    text = "refine the masks in up to N passes of swaps: a kept weight for a pruned one where outputs then change less"
    parser.add_argument("--swaps", type=count, metavar="N", help=text)
    text = "as many zeros in each layer, fewer in blocks where weights stand out, or where the loss loses most (equal)"
    parser.add_argument("--budgets", choices=("equal", "owl", "saliency"), help=text)
    text = "how far a block's share of zeros may be from the mean of all, with --budgets owl (default: 0.08)"
    parser.add_argument("--spread", type=float, metavar="L", help=text)
    text = "then fit the kept weights of each block to the dense block's outputs, in N passes of the text"
    parser.add_argument("--reconstruct", type=count, metavar="N", help=text)
    samples = "examples of data.train to calibrate on (default: 128)"
    parser.add_argument("--samples", type=count, default=128, metavar="N", help=samples)
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of examples (default: 0)")
    add_shard_argument(parser)
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    if args.method == REAP:
        require_fit(args)
    _require_rounding(args)
    _require_refinement(args)
    start, config, out = time.perf_counter(), load_run_or_folder(args), Path(args.out)
    from pst_ds.core.quantization import grid_of
    from pst_ds.train.one_shot.pruning import Pruning, prune_to_folder

    if args.method == REAP:
        return drop(config, args)
    asked = Pruning(
        method=args.method, sparsity=args.sparsity, pattern=args.pattern, keep_zeros=args.keep_zeros,
        grid=grid_of(f"int{args.bits}", args.group) if args.bits else None, swaps=args.swaps or 0,
        budgets=args.budgets or "equal", spread=args.spread, reconstruct=args.reconstruct or 0, samples=args.samples,
        seed=args.seed,
    )  # fmt: skip
    record, layers = prune_to_folder(config, asked, out, shard_bytes=args.shard_bytes)
    result = {key: value for key, value in record.items() if key not in ("format", "layers")}
    result |= {"out": args.out, "num_layers": len(layers), "seconds": time.perf_counter() - start}
    text = f", on {result['samples']} examples of {result['tokens']:,} tokens" if "tokens" in result else ""
    requested = "as it was" if args.keep_zeros else f"{result['sparsity_requested']} requested"
    rounded = f" on a grid of {result['values']}, group {result['group']}" if "values" in result else ""
    print(
        f"wrote {args.out}: {args.method}, pattern {result['pattern']}, {len(layers)} layers{rounded}, "
        f"sparsity {result['sparsity_measured']:.6f} measured, {requested}{text}; {result['seconds']:.1f} s in all"
    )
    tokens = {layer.name.rpartition(".")[0]: layer.expert_tokens for layer in layers if layer.expert_tokens}
    if unused := unused_experts(tokens):  # both stacks of a module saw the same
        print(f"{unused}, and were pruned by the size of their weights. Add --samples", file=sys.stderr)
    return result


def _require_rounding(args: argparse.Namespace) -> None:
    """Refuse arguments of rounding that do not go together. Raises InputError."""
    if args.bits and args.method != "sparsegpt":
        raise InputError(
            f"--bits {args.bits} makes kept weights make up for what rounding takes, as sparsegpt does: with --method "
            f"{args.method} prune first, and then round the folder with --method sparsegpt --keep-zeros"
        )
    if args.group and not args.bits:
        raise InputError(f"--group {args.group} is for rounded weights: add --bits {' or '.join(_BITS)}")
    if not args.keep_zeros:
        return
    if not args.bits:
        raise InputError(
            f"--keep-zeros prunes nothing more, so there is nothing to do: add --bits {' or '.join(_BITS)}"
        )
    given = [
        f"--{name} {value}"
        for name in ("sparsity", "pattern", "budgets")
        if (value := getattr(args, name)) not in (None, "")
    ]
    if given:
        raise InputError(f"--keep-zeros keeps the mask that the folder has: leave out {' and '.join(given)}")


def _require_refinement(args: argparse.Namespace) -> None:
    """Refuse what changes masks or weights after they were rounded. Raises InputError."""
    for name in ("swaps", "reconstruct"):
        if args.bits and (passes := getattr(args, name)):
            raise InputError(
                f"--{name} {passes} would move what --bits {args.bits} has rounded: prune with --{name} first, and "
                "then round the folder with --method sparsegpt --keep-zeros"
            )
    if args.bits and args.budgets == "saliency":
        raise InputError(
            f"--bits {args.bits} rounds as it prunes, which --budgets saliency does not go with: prune first, and then "
            "round the folder with --method sparsegpt --keep-zeros"
        )
    if args.spread is not None and args.budgets != "owl":
        raise InputError(f"--spread {args.spread} is for zeros by block: add --budgets owl, or leave it out")
