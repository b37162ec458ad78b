"""``pst-ds verify DIR [--against RUN]``: check an export against its manifest and against the trained model."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from pst_ds.cli.main import add_quiet_argument, count, load_run_or_folder
from pst_ds.cli.verify.text import Found, lines_of_comparison, lines_of_file, lines_of_inputs, metrics_text
from pst_ds.config.run import RunConfig
from pst_ds.core.packings import ONNX_FILE


class VerificationError(RuntimeError):
    """A well-formed export that is not the trained model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", help="export folder")
    parser.add_argument("--against", dest="run", metavar="RUN", help="run folder the export came from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the run")
    parser.add_argument("--checkpoint", default="best", help="checkpoint that was exported (default: best)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--limit", type=count, metavar="N", help="compare on the first N examples only")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.export.check import check_export, check_model

    folder = Path(args.export)
    config = load_run_or_folder(args) if args.run is not None else None
    if (folder / ONNX_FILE).is_file():
        return _verify_onnx(args, folder, config)
    counts = check_export(folder)
    check_model(folder)
    _say(lines_of_file(args.export, counts))
    if config is None:
        return {**counts, "export_dir": args.export}
    from pst_ds.cli.verify.against_run import compare_with_run

    compared = compare_with_run(args, config)
    _say(lines_of_comparison(args.split, compared, on_grid="rounded_tensors" in counts))
    _require_equal(args, compared, compared.get("kept_sparse"))
    _say(lines_of_inputs(compared))
    return {**counts, **compared, "reloaded_equal": True, "export_dir": args.export}


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _verify_onnx(args: argparse.Namespace, folder: Path, config: RunConfig | None) -> dict[str, object]:
    from pst_ds.cli.verify.onnx import compare_onnx_with_run, facts_of_file

    facts = facts_of_file(folder)
    print(f"{folder / ONNX_FILE}: {facts['file_bytes']:,} bytes, ONNX Runtime opens it; outputs {facts['outputs']}")
    if config is None:
        return facts
    compared = compare_onnx_with_run(args, config)
    apart = compared.get("max_logit_difference_in_8_bits")
    rounded = "" if apart is None else f"{apart:.3g} with inputs of 8 bits, as it runs; "
    print(
        f"against the masked model in fp32 on {compared['examples']} {compared['unit']} of {args.split}: "
        f"{compared['differing_predictions']} predictions differ, largest logit difference "
        f"{compared['max_logit_difference']:.3g}, allowed {compared['allowed_logit_difference']:.3g}; {rounded}"
        f"{metrics_text(compared['metrics'])}"
    )
    if not compared["max_logit_difference"] <= compared["allowed_logit_difference"]:
        raise VerificationError(f"{args.export} is not the model in {args.run}, checkpoint {args.checkpoint}")
    return {**facts, **compared, "reloaded_equal": True}


def _require_equal(args: argparse.Namespace, compared: Found, kept: Found | None) -> None:
    what = f"{args.export} is not the model in {args.run}, checkpoint {args.checkpoint}"
    if compared["differing_predictions"] or compared["differing_weights"]:
        raise VerificationError(what)
    if kept and kept["differing_weights"]:
        raise VerificationError(f"{what}: kept sparse, its weights differ")
    for how, result in (("", compared), ("kept sparse, ", kept)):
        # written so that a NaN fails
        if result and not result["max_logit_difference"] <= result["allowed_logit_difference"]:
            raise VerificationError(f"{what}: {how}its logits differ by more than rounding explains")
