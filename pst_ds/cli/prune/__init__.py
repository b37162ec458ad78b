"""``pst-ds prune RUN_FILE --method METHOD --out DIR``: prune a run's pretrained model once, on calibration text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pst_ds.cli.main import add_quiet_argument, add_run_arguments, add_shard_argument, count, load_run_or_folder
from pst_ds.cli.prune.whole_experts import REAP, drop, require_fit
from pst_ds.config.methods import OneShotMethod
from pst_ds.core.experts.tokens import unused_experts
from pst_ds.core.packings import GROUPS, VALUE_BITS, WHOLE_ROW
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pst_ds.config.run import RunConfig
    from pst_ds.core.quantization import Grid
    from pst_ds.prune.layer import PrunedLayer
    from pst_ds.prune.replay import Batch


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
    start, config = time.perf_counter(), load_run_or_folder(args)
    import torch

    from pst_ds.export.base_weights import BaseWeights
    from pst_ds.export.from_folder import copy_beside
    from pst_ds.export.plan import require_space
    from pst_ds.parallel.launch import LaunchEnvironment, device_of
    from pst_ds.prune.folder import load_base, record_of, require_free, scales_of, write_folder
    from pst_ds.train.model import attention_options

    out, path, device = Path(args.out), config.model.path, device_of(LaunchEnvironment(0, 1, 0))
    require_free(out, path)
    model, base = load_base(path, **attention_options(config)), BaseWeights(path, "").folder
    require_space(out, sum(param.nbytes for param in model.parameters()))
    if args.method == REAP:
        batches = _calibration(config, model.config, args)
        about = {"method": REAP, **_of_base(config), **_of_text(config, args, batches)}
        return drop(model, base, config, args, batches, about, torch.device(device))
    layers, about, seconds = _pruned(model, config, args, device)
    record, scales = record_of(layers, about), scales_of(layers)
    write_folder(model, record, scales, out, shard_bytes=args.shard_bytes, copy_beside=lambda to: copy_beside(base, to))
    result = {key: value for key, value in record.items() if key not in ("format", "layers")}
    result |= {"out": args.out, "num_layers": len(layers)}
    result |= {"prune_seconds": seconds, "seconds": time.perf_counter() - start}
    text = f", on {result['samples']} examples of {result['tokens']:,} tokens" if "tokens" in result else ""
    asked = "as it was" if args.keep_zeros else f"{result['sparsity_requested']} requested"
    rounded = f" on a grid of {result['values']}, group {result['group']}" if "values" in result else ""
    print(
        f"wrote {args.out}: {args.method}, pattern {result['pattern']}, {len(layers)} layers{rounded}, "
        f"sparsity {result['sparsity_measured']:.6f} measured, {asked}{text}; "
        f"pruned in {seconds:.1f} s, {result['seconds']:.1f} s in all"
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


def _grid(args: argparse.Namespace) -> Grid | None:
    if not args.bits:
        return None
    from pst_ds.core.quantization import grid_of

    return grid_of(f"int{args.bits}", args.group)


def _pruned(
    model: PreTrainedModel, config: RunConfig, args: argparse.Namespace, device: str
) -> tuple[list[PrunedLayer], dict[str, object], float]:
    """Prune ``model`` in place; return (its layers, the record's facts, seconds)."""
    import torch

    from pst_ds.core.one_shot import SPREAD
    from pst_ds.nn.base_model import DTYPES
    from pst_ds.nn.targets import find_targets
    from pst_ds.prune.budgets import require_movable, require_room, rules_by_outliers
    from pst_ds.prune.model import prune_model
    from pst_ds.prune.rules import layer_rules, settings_for, share_of_zeros
    from pst_ds.prune.saliency import rules_by_saliency

    by_saliency = args.budgets == "saliency"
    by_rows = args.pattern or not by_saliency or config.pst.pattern != "matrix"
    settings = settings_for(model, config.pst, args.method, args.pattern if by_rows else "matrix")
    share = 0.0 if args.keep_zeros else share_of_zeros(settings, args.sparsity, config.schedule.final_sparsity)
    grid, keeps, swaps = _grid(args), args.keep_zeros, args.swaps or 0
    targets = find_targets(model, settings)
    rules = layer_rules(targets, settings, args.method, share, grid=grid, keeps_zeros=keeps, swaps=swaps)
    by_outliers, spread = args.budgets == "owl", SPREAD if args.spread is None else args.spread
    if by_outliers:
        require_room(rules, spread)
    if by_saliency:
        require_movable(rules, "saliency")
    needs_text = args.method != "magnitude" or swaps or by_outliers or by_saliency or args.reconstruct
    batches = _calibration(config, model.config, args) if needs_text else []
    start, outliers = time.perf_counter(), list[float]()
    place, dtype, gated = torch.device(device), DTYPES[config.train.precision], settings.gated_norms
    if by_outliers:
        rules, outliers = rules_by_outliers(model, rules, batches, device=place, dtype=dtype, spread=spread)
    if by_saliency:
        rules = rules_by_saliency(model, rules, batches, device=place, dtype=dtype)
    layers = prune_model(
        model, rules, args.method, batches, device=place, dtype=dtype, gated=gated, reconstruct=args.reconstruct or 0
    )
    seconds = time.perf_counter() - start
    about: dict[str, object] = {
        "method": args.method,
        "pattern": "zeros" if keeps else settings.pattern,
        "sparsity_requested": None if keeps else share,
        **_of_base(config),
    }
    if grid is not None:
        about |= {"values": grid.values, "group": grid.group or WHOLE_ROW}
    if swaps:
        about |= {"swaps": swaps}
    if args.reconstruct:
        about |= {"reconstruct": args.reconstruct}
    if by_outliers:
        about |= {"budgets": "owl", "spread": spread, "outliers": outliers}
    if by_saliency:
        about |= {"budgets": "saliency"}
    if batches:
        about |= _of_text(config, args, batches)
        about |= {"gated_norms": gated} if any(target.is_stack for target in targets) else {}
    return layers, about, seconds


def _of_base(config: RunConfig) -> dict[str, object]:
    """What the record says of the base model."""
    from pst_ds.checkpoint.restore import base_fingerprint

    return {"base_model": config.model.path, "base_fingerprint": base_fingerprint(config.model.path)}


def _of_text(config: RunConfig, args: argparse.Namespace, batches: Sequence[Batch]) -> dict[str, object]:
    """What the record says of the text."""
    tokens = (b["attention_mask"].sum() if "attention_mask" in b else b["input_ids"].numel() for b in batches)
    return {
        "data": config.data.train,
        "max_length": config.data.max_length,
        "samples": args.samples,
        "tokens": sum(map(int, tokens)),
        "seed": args.seed,
        "precision": config.train.precision,
    }


def _calibration(config: RunConfig, model_config: PretrainedConfig, args: argparse.Namespace) -> list[Batch]:
    """Batch inputs of some examples of data.train, drawn without repetition, sorted by length. Raises InputError."""
    from pst_ds.data.tasks import task_of
    from pst_ds.train.model import load_tokenizer

    task, tokenizer = task_of(config), load_tokenizer(config)
    task.check_model(config.data, model_config, tokenizer)
    examples = task.load(config.data, "train", tokenizer, task.label_names(config.data))
    if len(examples) < args.samples:
        raise InputError(
            f"data.train has {len(examples)} {task.unit}, fewer than --samples {args.samples}; lower it"
            + (f", or data.max_length = {config.data.max_length}" if not task.pads else "")
        )
    sample, drawn = task.sample(examples, args.samples, args.seed)
    lengths, size = sample.lengths, config.eval_batch_size
    drawn.sort(key=lambda i: lengths[i])
    batches = [task.collate(sample, drawn[at : at + size], tokenizer) for at in range(0, len(drawn), size)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
