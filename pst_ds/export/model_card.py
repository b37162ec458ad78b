"""The README.md of an export: sparsity, size, metrics, and how to load and verify it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pst_ds.core.packings import DENSE, FOR_COMPRESSED_TENSORS
from pst_ds.export.manifest import ExportedTensor, ExportFacts, encoding_by

CARD_FILE = "README.md"
_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def model_card(name: str, tensors: Sequence[ExportedTensor], facts: ExportFacts) -> str:
    """Return the text of the card.

    Args:
        name: name of the folder.
        tensors: its tensors.
        facts: the facts of its manifest.
    """
    lines = [*_front_matter(facts), *_summary(name, facts), *_sparsity(tensors, facts), *_size(facts)]
    return "\n".join([*lines, *_metrics(facts), *_use(facts)])


def _front_matter(facts: ExportFacts) -> list[str]:
    encoding, base = encoding_by(facts), _base(facts)
    grids = dict.fromkeys(grid.values for grid in (encoding.values, encoding.embeddings) if grid)
    formats = [] if encoding.is_plain else [f"format-{facts['kind'].replace(':', '-of-')}"]
    tags = ["sparse", "pruned", "pst-ds", *formats, *grids]
    lines = ["---", "library_name: transformers"]
    if base and not base.startswith((".", "/", "~")):  # probably a name on the hub
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _base(facts: ExportFacts) -> str:
    """Return the pretrained model; if the run's base was pruned, the model that it was pruned from; "" if unknown."""
    return facts.get("pruned_from") or facts.get("base_model") or ""


def _summary(name: str, facts: ExportFacts) -> list[str]:
    how = "stored as dense tensors with exact zeros" if facts["kind"] == DENSE else f"packed as {facts['kind']}"
    base = f" of {_base(facts)}" if _base(facts) else ""
    sparsity = f"The pruned layers have {facts['sparsity_measured']:.2%} sparsity and are {how}."
    lines = [f"# {name}", "", f"A sparse version{base}. {sparsity}{_quantisation(facts)}"]
    if facts.get("step") is not None:
        lines += ["", f"Trained by pst-ds for {facts['step']} steps, computed in {facts['computed_in']}."]
    return [*lines, ""]


def _quantisation(facts: ExportFacts) -> str:
    """Return sentences on what is quantised; "" if nothing is."""
    encoding = encoding_by(facts)
    return "".join(
        f" {what} are quantised to {grid.values}, with a bf16 scale per "
        f"{'row' if grid.group is None else f'{grid.group} weights of a row'}."
        for what, grid in (("They", encoding.values), ("The embeddings", encoding.embeddings))
        if grid is not None
    )


def kind_of_layer(name: str) -> str:
    """Return a tensor's name with a star for the number of its block: "model.layers.*.mlp.up_proj"."""
    return re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))


def _sparsity(tensors: Sequence[ExportedTensor], facts: ExportFacts) -> list[str]:
    kinds: dict[str, list[ExportedTensor]] = {}
    for tensor in tensors:
        if tensor.origin == "pruned" or tensor.pattern != DENSE or tensor.grid:
            kinds.setdefault(kind_of_layer(tensor.name), []).append(tensor)
    is_quantised = any(tensor.grid for tensor in tensors)
    more = [" quantisation error |", "---|", " |"] if is_quantised else ["", "", ""]
    lines = ["## Sparsity", "", f"| layer | tensors | weights | sparsity | pattern found | stored |{more[0]}"]
    lines.append(f"|---|---|---|---|---|---|{more[1]}")
    for kind, found in kinds.items():
        weights, nonzero = sum(t.numel for t in found), sum(t.nonzero for t in found)
        patterns = sorted({t.pattern for t in found})
        packings = sorted({" ".join(filter(None, (t.packing, t.values))) for t in found})
        error = f" {max(t.rounding_error for t in found):.2%} |" if is_quantised else ""
        lines.append(
            f"| `{kind}` | {len(found)} | {weights:,} | {1 - nonzero / max(weights, 1):.2%} | {', '.join(patterns)} | "
            f"{', '.join(packings)} |{error}"
        )
    weights = sum(tensor.numel for tensor in tensors)
    zeros = sum(tensor.numel - tensor.nonzero for tensor in tensors)
    lines.append(f"| whole model | {len(tensors)} | {weights:,} | {zeros / max(weights, 1):.2%} | | |{more[2]}")
    requested = facts["sparsity_requested"]
    notes = [f"The requested sparsity of every pruned matrix is {requested:.2%}.", ""] if requested is not None else []
    if is_quantised:
        notes += ["The quantisation error is relative to the norm of the weights; the largest of each kind.", ""]
    return [*lines, "", *notes]


def _size(facts: ExportFacts) -> list[str]:
    size, dense = facts["file_bytes"], facts["dense_bf16_bytes"]
    compared = f"That is {size / max(dense, 1):.3f} of the dense size in bfloat16, {dense:,} bytes."
    if "bits_per_weight" in facts:
        packed = facts.get("packed_bits_per_weight")
        compared += f" Including scales, the model has {facts['bits_per_weight']:.2f} bits per weight"
        compared += "." if packed is None else f", {packed:.2f} in packed layers."
    return ["## Size", "", f"The weight files have {size:,} bytes. {compared}", ""]


def _metrics(facts: ExportFacts) -> list[str]:
    metrics = {name: value for name, value in facts["metrics"].items() if value is not None}
    if not metrics:
        return ["## Metrics", "", "No metrics were recorded for this model.", ""]
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return ["## Metrics", "", "On the validation data of the run:", "", "| metric | value |", "|---|---|", *rows, ""]


def _use(facts: ExportFacts) -> list[str]:
    kind = next((f"AutoModel{task}" for task in _TASKS if facts["architecture"].endswith(task)), "AutoModel")
    needs_pst_ds = encoding_by(facts).needs_pst_ds
    first = ["import pst_ds.hf  # registers the packed formats with transformers", ""] if needs_pst_ds else []
    lines = ["## Load it", "", "```python", *first, f"from transformers import {kind}", ""]
    lines += [f'model = {kind}.from_pretrained("path/to/this/folder")', "```", ""]
    if needs_pst_ds:
        lines += ["Without the import, transformers fails because it finds no weights.", ""]
    if facts["kind"] in FOR_COMPRESSED_TENSORS:
        lines += [
            "Requires the package compressed-tensors. vLLM reads the folder if it has a kernel for it.",
            "",
        ]
    checks = "pst-ds verify path/to/this/folder"
    return [*lines, "## Verify it", "", "```bash", checks, "```", "", "pst_manifest.json lists tensors and hashes.", ""]
