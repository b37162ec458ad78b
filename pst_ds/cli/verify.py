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
    from pst_ds.export.verify.against_run import Comparison, KeptSparse, Rounding
    from pst_ds.export.verify.masked_run import FewerTokens
    from pst_ds.export.verify.onnx import OnnxComparison

FLAGS = flags_of_fields(["against", "reference"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pst-ds verify``."""
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
    """Verify an export, print what was compared and return it.

    Raises InputError, and VerificationError for an export that is not the trained model.
    """
    # it imports torch, for which --help must not wait
    from pst_ds.export.verify import verify

    if args.reference and args.run is None:
        raise InputError(f"--reference {args.reference} needs the data of a run. Add --against RUN")
    config = None
    if args.run is not None:
        config = load_run_or_folder(args)
    report = verify(
        args.export, config, checkpoint=args.checkpoint, split=args.split, limit=args.limit, reference=args.reference
    )
    for line in _lines(report, args.split, args.reference):
        print(line)
    # after the lines, which show what differs
    report.require_equal()
    return report.to_json()


def _lines(report: VerifyReport, split: str, reference: str | None) -> Iterator[str]:
    """Yield what was verified. ``split`` and ``reference`` as in the arguments."""
    from pst_ds.export.verify.against_run import Comparison

    # some formats have facts of other kinds, such as a GGUF file, whose tensors are not listed in a manifest
    lines_of_format = storage_format(str(report.file["kind"])).verify_lines(report.export_dir, report.file)
    if lines_of_format is None:
        yield from _lines_of_file(report)
    else:
        yield from lines_of_format
    compared = report.comparison
    if compared is None:
        return
    if isinstance(compared, Comparison):
        yield from _lines_of_comparison(split, compared, quantised="rounded_tensors" in report.file)
    else:
        yield _line_of_onnx_comparison(split, compared)
    # without quantisation or a cast there is no divergence to measure
    if compared.kl:
        yield f"from the trained model: {KL_FORMAT.format(**compared.kl)}"
    if compared.kl_from_reference:
        yield f"from {reference}: {KL_FORMAT.format(**compared.kl_from_reference)}"


def _lines_of_file(report: VerifyReport) -> Iterator[str]:
    """Yield the counts of the files."""
    from pst_ds.writing.refilled import refilled_text

    file: dict[str, Any] = dict(report.file)
    packed = ""
    if file["packed_tensors"]:
        packed = f"{file['packed_tensors']} packed as {file['kind']}, "
    requested = file["sparsity_requested"]
    if requested is None:
        # in the export of a model folder that another program has pruned, if any
        requested = "unknown"
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
    # first what the export changes on purpose, then what may not differ from the masked model changed in the same way
    rounding = compared.rounding
    if rounding is not None:
        yield _line_of_rounding(rounding, compared.metrics, quantised=quantised)
    if compared.vocabulary is not None:
        yield _line_of_vocabulary(compared.vocabulary, compared)
    as_exported = ""
    if quantised:
        as_exported = ", quantised,"
    elif rounding is not None:
        as_exported = ", cast,"
    kept_sparse = compared.kept_sparse
    # a plain folder is one that users load without this package, so that is what has been compared
    loader = "plain transformers" if kept_sparse is None else "pst_ds.hf, made dense,"
    yield (
        f"reloaded with {loader} against the masked model{as_exported} on "
        f"{compared.examples} {compared.unit} of {split}: {compared.differing_weights} of "
        f"{compared.compared_weights} weight tensors differ, {compared.differing_predictions} predictions "
        f"differ, largest logit difference {compared.max_logit_difference:.3g}"
    )
    if kept_sparse is not None:
        yield _line_of_kept_sparse(kept_sparse)


def _line_of_rounding(rounding: Rounding, metrics: Mapping[str, float], *, quantised: bool) -> str:
    """Describe the loss by a narrower dtype or by quantisation. ``metrics``: of the export."""
    cause = "quantisation" if quantised else "the cast"
    return (
        f"{cause} changed {rounding.differing_predictions} predictions, and "
        f"a logit by at most {rounding.max_logit_difference:.3g}: "
        f"{_before_and_after(rounding.metrics_before, metrics)}"
    )


def _line_of_vocabulary(fewer: FewerTokens, compared: Comparison) -> str:
    """Describe the loss by removed tokens."""
    unchanged = ""
    if fewer.same_tokens is not None:
        unchanged = f", {fewer.same_tokens} of {compared.examples} texts unchanged"
    return f"{fewer.tokens} tokens{unchanged}: {_before_and_after(fewer.metrics_before, compared.metrics)}"


def _line_of_kept_sparse(kept_sparse: KeptSparse) -> str:
    """Describe the model that computes with packed weights, compared with the same model made dense."""
    return (
        f"kept sparse: {kept_sparse.differing_weights} of {kept_sparse.layers} layers differ, "
        f"{kept_sparse.differing_predictions} predictions differ, largest logit difference "
        f"{kept_sparse.max_logit_difference:.3g}, allowed {kept_sparse.allowed_logit_difference:.3g}"
    )


def _line_of_onnx_comparison(split: str, compared: OnnxComparison) -> str:
    """Describe how an ONNX file compares with the masked model."""
    difference = compared.max_logit_difference_in_8_bits
    with_int8 = ""
    if difference is not None:
        # not compared with a limit: how much int8 activations may change depends on the model
        with_int8 = f"{difference:.3g} with int8 activations, as it runs; "
    return (
        f"against the masked model in fp32 on {compared.examples} {compared.unit} of {split}: "
        f"{compared.differing_predictions} predictions differ, largest logit difference "
        f"{compared.max_logit_difference:.3g}, allowed {compared.allowed_logit_difference:.3g}; {with_int8}"
        f"{_metrics_text(compared.metrics)}"
    )


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    return f"{_metrics_text(before)} before, {_metrics_text(after)} after"
