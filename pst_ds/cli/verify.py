"""``pst-ds verify DIR [--against RUN]``: check an export against its manifest and against the trained model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pst_ds.cli.eval import KL_FORMAT
from pst_ds.cli.export import quantisation_text
from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count, load_run_or_folder
from pst_ds.errors import InputError, shortened
from pst_ds.storage_format import storage_format

if TYPE_CHECKING:
    from pst_ds.export.verify import VerifyReport
    from pst_ds.export.verify.against_run import Comparison
    from pst_ds.export.verify.onnx import OnnxComparison


FLAGS = flags_of_fields(["against", "reference"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("export", help="export folder, or GGUF file")
    add("--against", dest="run", metavar="RUN", help="run folder the export came from")
    add("--reference", metavar="DIR", help="with --against: also measure the KL divergence from this model folder")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the run")
    add("--checkpoint", default="best", help="checkpoint that was exported (default: best)")
    add("--split", choices=("train", "validation", "test"), default="test")
    add("--limit", type=count, metavar="N", help="compare on the first N examples only")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.export.verify import verify
    from pst_ds.export.verify.against_run import Comparison

    if args.reference and args.run is None:
        raise InputError(f"--reference {args.reference} needs the data of a run. Add --against RUN")
    config = load_run_or_folder(args) if args.run is not None else None
    report = verify(
        args.export, config, checkpoint=args.checkpoint, split=args.split, limit=args.limit, reference=args.reference
    )
    compared = report.comparison
    shown = storage_format(str(report.file["kind"])).verify_lines(report.export_dir, report.file)
    lines = list(_lines_of_file(report) if shown is None else shown)
    if isinstance(compared, Comparison):
        lines += _lines_of_comparison(args.split, compared, quantised="rounded_tensors" in report.file)
    elif compared is not None:
        lines.append(_line_of_onnx_comparison(args.split, compared))
    if compared is not None:
        measured = (("the trained model", compared.kl), (args.reference, compared.kl_from_reference))
        lines += [f"from {model}: {KL_FORMAT.format(**kl)}" for model, kl in measured if kl]
    print("\n".join(lines))
    report.require_equal()
    return report.to_json()


def _lines_of_file(report: VerifyReport) -> Iterator[str]:
    """Yield the counts of the files."""
    from pst_ds.writing.refilled import refilled_text

    file: dict[str, Any] = dict(report.file)
    packed = f"{file['packed_tensors']} packed as {file['kind']}, " if file["packed_tensors"] else ""
    requested = "unknown" if file["sparsity_requested"] is None else file["sparsity_requested"]
    yield (
        f"{report.export_dir}: {file['tensors']} tensors as in the manifest, {packed}sparsity "
        f"{file['sparsity_measured']:.6f} measured in the file, {requested} requested"
    )
    if file["refilled"]:
        yield refilled_text(file["refilled"])
    if file["without_sha256"]:
        yield (
            f"NOT VERIFIED: the header of {shortened(file['without_sha256'])}, of which the manifest of an older "
            "version has no SHA-256; every tensor in it was compared. Export the model again"
        )
    if "rounded_tensors" in file:
        yield quantisation_text(file)


def _lines_of_comparison(split: str, compared: Comparison, *, quantised: bool) -> Iterator[str]:
    """Yield how the reloaded export compares with the trained model; ``quantised``: whether the export is."""
    rounding, fewer, kept = compared.rounding, compared.vocabulary, compared.kept_sparse
    if rounding is not None:
        yield (
            f"{'quantisation' if quantised else 'the cast'} changed {rounding.differing_predictions} predictions, and "
            f"a logit by at most {rounding.max_logit_difference:.3g}: "
            f"{_before_and_after(rounding.metrics_before, compared.metrics)}"
        )
    if fewer is not None:
        same = "" if fewer.same_tokens is None else f", {fewer.same_tokens} of {compared.examples} texts unchanged"
        yield f"{fewer.tokens} tokens{same}: {_before_and_after(fewer.metrics_before, compared.metrics)}"
    as_exported = ", quantised," if quantised else "" if rounding is None else ", cast,"
    by = "pst_ds.hf, made dense," if kept else "plain transformers"
    yield (
        f"reloaded with {by} against the masked model{as_exported} on "
        f"{compared.examples} {compared.unit} of {split}: {compared.differing_weights} of "
        f"{compared.compared_weights} weight tensors differ, {compared.differing_predictions} predictions "
        f"differ, largest logit difference {compared.max_logit_difference:.3g}"
    )
    if kept:
        yield (
            f"kept sparse: {kept.differing_weights} of {kept.layers} layers differ, "
            f"{kept.differing_predictions} predictions differ, largest logit difference "
            f"{kept.max_logit_difference:.3g}, allowed {kept.allowed_logit_difference:.3g}"
        )


def _line_of_onnx_comparison(split: str, compared: OnnxComparison) -> str:
    apart = compared.max_logit_difference_in_8_bits
    rounded = "" if apart is None else f"{apart:.3g} with int8 activations, as it runs; "
    return (
        f"against the masked model in fp32 on {compared.examples} {compared.unit} of {split}: "
        f"{compared.differing_predictions} predictions differ, largest logit difference "
        f"{compared.max_logit_difference:.3g}, allowed {compared.allowed_logit_difference:.3g}; {rounded}"
        f"{_metrics_text(compared.metrics)}"
    )


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    return f"{_metrics_text(before)} before, {_metrics_text(after)} after"
