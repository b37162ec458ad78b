"""``pst-ds export SRC --format FORMAT --out DIR``: write a run or a model folder with dense or packed weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, add_shard_argument, load_run_or_folder
from pst_ds.config.targets import TARGETS
from pst_ds.core.packings import COMPRESSED_TENSORS, DENSE, GGUF, GROUPS, ONNX, VALUE_BITS, WHOLE_ROW
from pst_ds.errors import InputError, shortened
from pst_ds.storage_format import listed_formats, storage_format

if TYPE_CHECKING:
    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.export.export_run import ExportSettings
    from pst_ds.train.resolved import ResolvedRun
    from pst_ds.writing.manifest import Facts

FLAGS = flags_of_fields(
    ("format", "values", "embeddings", "group", "dtype", "vocabulary", "activation_bits", "plain", "shard_bytes", "out")
)
"""Flags for the settings that messages of this verb name."""
LARGE = 1.1
"""Bytes of an export, relative to dense bf16, above which a note says so; headers add a little."""
FEWEST_ZEROS = 0.1
"""Sparsity from which a bitmask makes a model smaller (1 bit per weight of 16)."""


class Option(NamedTuple):
    """An option of an export that ``--for`` chooses."""

    value: object
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="SRC", help="run folder, run file, or model folder with pruned weights")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of a run")
    add("--out", required=True, help="folder to write")
    formats = listed_formats()
    listed = "; ".join(f"{name}: {storage.purpose}" for name, storage in formats.items())
    escaped = listed.replace("%", "%%")  # argparse formats its help texts
    add("--format", choices=tuple(formats), metavar="FORMAT", help=f"default: {DENSE}. {escaped}")
    targets = ", ".join(TARGETS)
    text = f"choose format and types for where the model will run, and print the accuracy lost: {targets}"
    add("--for", choices=tuple(TARGETS), dest="target", metavar="TARGET", help=text)
    add("--plain", action="store_true", help="with onnx: dense fp32 weights and standard operators, for any runtime")
    text = "with onnx and --values, or compressed-tensors: bits of activations; 8 is faster (default: 16)"
    add("--activation-bits", type=int, choices=(8, 16), metavar="BITS", help=text)
    add("--values", choices=("bf16", *VALUE_BITS), help="quantise linear layers in the blocks; bf16 casts every tensor")
    add("--embeddings", choices=tuple(VALUE_BITS), help="quantise embeddings and output layer too (default: unchanged)")
    add("--group", choices=(*map(str, GROUPS), WHOLE_ROW), help="weights per scale (default: int8 row, int4 64)")
    add("--vocabulary", metavar="seen|FILE", help='keep only tokens "seen" in the run\'s data, or in a text FILE')
    add("--checkpoint", help='of a run: "best" (default), "final", or another in checkpoints/')
    add("--dtype", choices=("bf16", "fp32"), help="cast every tensor (default: unchanged)")
    add_shard_argument(parser)
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> Mapping[str, object]:
    from pst_ds.export.export_run import (
        ExportSettings,
        export_model_folder,
        export_run,
        is_model_folder,
        require_run_fits,
    )
    from pst_ds.train.run_folder import open_trained

    source = Path(args.run)
    is_folder = is_model_folder(source)
    lines_of_loss: list[str] = []
    if args.target is None:
        args.format = args.format or DENSE
    else:
        _choose(args, is_folder=is_folder)
    # not the parser's default, so that --for can tell whether the user gave it
    args.activation_bits = args.activation_bits or 16
    # settings and options have the same names
    given = {field.name: getattr(args, field.name) for field in fields(ExportSettings)}
    settings = ExportSettings(**given)
    if is_folder:
        if args.set or args.checkpoint:
            raise InputError(f"{source}: a model folder has no settings or checkpoints. Remove --set and --checkpoint")
        report = export_model_folder(source, args.out, settings)
    else:
        config = load_run_or_folder(args)
        # before the checkpoint is read, which takes long for a large model
        require_run_fits(config, args.out, settings)
        # opened once: a run that is training may have a newer checkpoint when the loss is measured
        resolved, checkpoint = open_trained(config, args.checkpoint or "best")
        report = export_run(resolved, args.out, settings, checkpoint=checkpoint)
        if args.target and (settings.values in VALUE_BITS or settings.embeddings):
            report["quantisation_loss"], lines_of_loss = _measured(args, resolved, checkpoint, settings)
    if args.vocabulary:
        print(f"embeds {report['tokens']} tokens")
    for line in lines_of_report(args, report) + lines_of_loss:
        print(line)
    note = target_note(args.target, report, settings)
    if note:
        report["note"] = note
        print(f"note: {note}", file=sys.stderr)
    return report


def _measured(
    args: argparse.Namespace, resolved: ResolvedRun, checkpoint: Checkpoint, settings: ExportSettings
) -> tuple[Facts | None, list[str]]:
    """Return the accuracy lost to quantisation, and lines about it; None and the reason if it cannot be measured."""
    from pst_ds.export.verify.against_run import quantisation_loss

    try:
        loss = quantisation_loss(Path(args.out), resolved, checkpoint, settings.options())
    # the export is written and valid: without validation data or ONNX Runtime only this number is missing
    except (InputError, ImportError, OSError) as error:
        return None, [f"accuracy lost to quantisation is unknown: {error}"]
    changes = []
    for (name, trained), exported in zip(loss["trained"].items(), loss["exported"].values(), strict=True):
        changes.append(f"{name} {trained:.4f} trained, {exported:.4f} exported ({exported - trained:+.4f})")
    place = f"the first {loss['examples']} {loss['unit']} of validation, by {loss['by']}"
    return loss, [f"accuracy lost to quantisation on {place}: {'; '.join(changes)}"]


def _choose(args: argparse.Namespace, *, is_folder: bool) -> None:
    """Set the options that ``--for`` chooses, except those given; print each with its reason. Raises InputError."""
    if args.format is not None:
        raise InputError(f"--for {args.target} chooses the format. Remove --format {args.format}, or --for")
    if is_folder:
        from pst_ds.hf.model_folder import open_model_folder

        folder = open_model_folder(args.run)
        is_causal = folder.is_causal
        is_sparse = folder.sparsity >= FEWEST_ZEROS
    else:
        run = load_run_or_folder(args)
        is_causal = run.task_facts.predicts_tokens
        # by the settings: the checkpoint is opened later
        is_sparse = run.mask_method.masks != "none" and run.schedule.final_sparsity >= FEWEST_ZEROS
    for name, option in chosen_options(args.target, is_causal=is_causal, is_sparse=is_sparse).items():
        # what the user gave stays; a flag without a value is False if it was not given
        if getattr(args, name) not in (None, False):
            continue
        setattr(args, name, option.value)
        flag = f"--{name.replace('_', '-')}"
        if option.value is not True:
            flag += f" {option.value}"
        print(f"{flag}: {option.reason}")


_INT8_VALUES = Option("int8", "half the bytes of bf16")
_INT8_EMBEDDINGS = Option("int8", "the same for the embeddings, often half of a small model")
_PLAIN = Option(True, "standard operators, without pst-ds")


def chosen_options(target: str, *, is_causal: bool, is_sparse: bool) -> dict[str, Option]:
    """Return the options of an export for ``target``, by their names, each with its reason."""
    small = {"values": _INT8_VALUES, "embeddings": _INT8_EMBEDDINGS}
    if target == "cpu" and is_causal:
        form = Option(DENSE, "the native decoder of pst-ds; nothing is pruned")
        if is_sparse:
            form = Option("bitmask", "the native decoder of pst-ds skips pruned weights")
        return {"format": form, **small}
    if target == "cpu" and not is_sparse:
        # a graph with the operators of pst-ds is made of packed weights, and nothing would be packed
        return {"format": Option(ONNX, "for ONNX Runtime; nothing is pruned"), "plain": _PLAIN}
    if target == "cpu":
        form = Option(ONNX, "for ONNX Runtime with the operators of pst-ds, which skip pruned weights")
        return {"format": form, "dtype": Option("bf16", "what is not quantised"), **small}
    if target == "llama.cpp":
        return {"format": Option(GGUF, "the file format of llama.cpp"), **small}
    if target == "vllm":
        # without embeddings: the layout has int8 linear layers only
        return {
            "format": Option(COMPRESSED_TENSORS, "the layout that vLLM reads"),
            "values": _INT8_VALUES,
            "activation_bits": Option(8, "vLLM has fast products of int8 weights with int8 inputs"),
        }
    if target == "onnxruntime":
        return {"format": Option(ONNX, "for any runtime of ONNX"), "plain": _PLAIN}
    if target == "openvino":
        return {"format": Option(ONNX, "for OpenVINO, which reads ONNX"), "plain": _PLAIN}
    if target == "gpu":
        form = Option(DENSE, "what every engine on GPUs reads")
        return {"format": form, "dtype": Option("bf16", "half the bytes of fp32")}
    return {"format": Option(DENSE, "transformers reads it without pst-ds")}


def target_note(target: str | None, report: Facts, settings: ExportSettings) -> str:
    """Return what the user of a sparse model in ``target`` should know: no gain in speed, or a large file; or ""."""
    if target is None or TARGETS[target].skips_pruned:
        return ""
    sparsity = float(report.get("sparsity_measured") or 0.0)
    notes = []
    if sparsity >= FEWEST_ZEROS:
        notes.append(
            f"{TARGETS[target].title} computes with dense weights: a sparsity of {sparsity:.2f} saves neither time nor "
            "memory there"
        )
    nbytes = int(report.get("file_bytes") or 0)
    dense = int(report.get("dense_bf16_bytes") or 0)
    # a report without sizes says nothing about them
    if nbytes > LARGE * dense > 0:
        note = f"the files have {nbytes:,} bytes, more than the {dense:,} of dense bf16"
        # a plain graph is always fp32
        is_cast = settings.dtype == "bf16" or settings.values == "bf16" or settings.plain
        if not is_cast:
            note += ". Add --dtype bf16, which casts what is not quantised"
        notes.append(note)
    return "; ".join(notes)


def lines_of_report(args: argparse.Namespace, report: Facts) -> list[str]:
    """Describe the written folder, in lines of text."""
    from pst_ds.writing.refilled import refilled_text

    lines_of_format = storage_format(args.format).export_lines(args.out, report, args)
    if lines_of_format is not None:
        return lines_of_format
    lines = []
    if report.get("refilled"):
        lines.append(refilled_text(report["refilled"]))
    if report["stay_dense"]:
        names = shortened(report["stay_dense"])
        lines.append(f"dense because {args.format} cannot hold them, or would make them larger: {names}")
    # a model folder may come without a record of the pruning
    requested = report["sparsity_requested"]
    if requested is None:
        requested = "unknown"
    share = report["file_bytes"] / max(report["dense_bf16_bytes"], 1)
    pruned = "tensors: "
    if report["pruned_tensors"]:
        pruned = f"{report['pruned_tensors']} pruned tensors of "
    lines.append(
        f"wrote {args.out}: {pruned}{report['tensors']}, sparsity "
        f"{report['sparsity_measured']:.6f} measured, {requested} requested; "
        f"{report['packed_tensors']} packed, {report['file_bytes']:,} bytes, {share:.3f} of dense bf16"
    )
    if "rounded_tensors" in report:
        lines.append(quantisation_text(report))
    return lines


def quantisation_text(report: Facts) -> str:
    """Describe the quantisation of an export in one sentence."""
    schemes = []
    # the names in a report of the quantised values, and of the weights that share a scale
    for values, group in (("values", "group"), ("embeddings", "embedding_group")):
        if not report.get(values):
            continue
        share = f"{report.get(group)} weights"
        if report.get(group) == WHOLE_ROW:
            share = "row"
        schemes.append(f"{values} {report[values]}, one scale per {share}")
    text = f"quantised {report['rounded_tensors']} tensors ({'; '.join(schemes)})"
    text += f": {report['bits_per_weight']:.2f} bits per weight"
    if "packed_bits_per_weight" in report:
        text += f", {report['packed_bits_per_weight']:.2f} in packed layers"
    return f"{text}; largest relative error {report['largest_rounding_error']:.2%}"
