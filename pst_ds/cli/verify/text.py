"""What ``pst-ds verify`` found, as lines of text."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from pst_ds.cli.export import rounding_text

Found: TypeAlias = dict[str, Any]
"""What a check or a comparison found, as JSON values."""


def lines_of_file(export: str, counts: Found) -> Iterator[str]:
    """Yield what the manifest and the file of ``export`` say of each other."""
    packed = f"{counts['packed_tensors']} packed as {counts['kind']}, " if counts["packed_tensors"] else ""
    requested = "unknown" if counts["sparsity_requested"] is None else counts["sparsity_requested"]
    yield (
        f"{export}: {counts['tensors']} tensors as in the manifest, {packed}sparsity "
        f"{counts['sparsity_measured']:.6f} measured in the file, {requested} requested"
    )
    if "rounded_tensors" in counts:
        yield rounding_text(counts)


def lines_of_comparison(split: str, compared: Found, *, on_grid: bool) -> Iterator[str]:
    """Yield how the reloaded export and the trained model compare on ``split``; ``on_grid``: the file has codes."""
    metrics, rounding, fewer = compared["metrics"], compared.get("rounding"), compared.get("vocabulary")
    if rounding is not None:
        yield (
            f"rounding changed {rounding['differing_predictions']} predictions, and a logit by at most "
            f"{rounding['max_logit_difference']:.3g}: {_before_and_after(rounding, metrics)}"
        )
    if fewer is not None:
        texts = f"{fewer.get('same_tokens')} of {compared['examples']} texts read as before"
        same = f", {texts}" if "same_tokens" in fewer else ""
        yield f"{fewer['tokens']} tokens{same}: {_before_and_after(fewer, metrics)}"
    as_in_file = " on the grid" if on_grid else "" if rounding is None else " cast as the file is"
    by = "pst_ds.hf, made dense," if "kept_sparse" in compared else "plain transformers"
    yield (
        f"reloaded with {by} against the masked model{as_in_file} on "
        f"{compared['examples']} {compared['unit']} of {split}: {compared['differing_weights']} of "
        f"{compared['compared_weights']} weight tensors differ, {compared['differing_predictions']} predictions "
        f"differ, largest logit difference {compared['max_logit_difference']:.3g}"
    )
    if "differing_texts" in compared:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in compared["text_metrics"].items()) or "not scored"
        yield f"of {compared['texts']} texts that both write {compared['differing_texts']} differ: {shown}"
    kept = compared.get("kept_sparse")
    if kept:
        yield (
            f"kept sparse: {kept['differing_weights']} of {kept['layers']} layers differ, "
            f"{kept['differing_predictions']} predictions differ, largest logit difference "
            f"{kept['max_logit_difference']:.3g}, allowed {kept['allowed_logit_difference']:.3g} ({kept['rule']})"
        )


def lines_of_inputs(compared: Found) -> Iterator[str]:
    """Yield what inputs of 8 bits change, if the run trained with them."""
    trained = compared.get("inputs")
    if trained:
        yield (
            f"inputs of 8 bits, as trained, change {trained['differing_predictions']} predictions, and a logit by at "
            f"most {trained['max_logit_difference']:.3g}: {metrics_text(trained['metrics_as_trained'])} with them, "
            f"{metrics_text(compared['metrics'])} without"
        )


def metrics_text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _before_and_after(changed: Found, after: dict[str, float]) -> str:
    return f"{metrics_text(changed['metrics_before'])} before, {metrics_text(after)} after"
