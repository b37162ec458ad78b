"""The README.md of an export: sparsity, size, metrics, and how to load and verify it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pst_ds.core.packings import DENSE, FOR_COMPRESSED_TENSORS
from pst_ds.export.encoding import Encoding, encoding_of
from pst_ds.export.manifest import Facts

CARD_FILE = "README.md"
_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def model_card(name: str, facts: Facts) -> str:
    """Return the text of the card for the folder ``name``, given the facts of its manifest."""
    encoding = encoding_of(facts["kind"], facts)
    sections = (_summary(name, facts, encoding), _size(facts), _metrics(facts["metrics"]))
    return "\n".join([*(line for lines in sections for line in lines), *_use(facts, encoding)])


def _summary(name: str, facts: Facts, encoding: Encoding) -> Iterator[str]:
    """Yield the front matter for the hub, and what the model is."""
    yield from ("---", "library_name: transformers")
    base = facts.get("pruned_from") or facts.get("base_model") or ""
    if base and not base.startswith((".", "/", "~")):  # probably a name on the hub
        yield f"base_model: {json.dumps(base)}"
    grids = (("They", encoding.values), ("The embeddings", encoding.embeddings))
    formats = [] if encoding.is_plain else [f"format-{facts['kind'].replace(':', '-of-')}"]
    tags = ["sparse", "pruned", "pst-ds", *formats, *dict.fromkeys(grid.values for _, grid in grids if grid)]
    yield from ("tags:", *(f"- {tag}" for tag in tags), "---", "")
    how = "stored as dense tensors with exact zeros" if facts["kind"] == DENSE else f"packed as {facts['kind']}"
    quantised = "".join(
        f" {what} are quantised to {grid.values}, with a bf16 scale per "
        f"{'row' if grid.group is None else f'{grid.group} weights of a row'}."
        for what, grid in grids
        if grid is not None
    )
    sparsity = f"The pruned layers have {facts['sparsity_measured']:.2%} sparsity and are {how}."
    yield from (f"# {name}", "", f"A sparse version{f' of {base}' if base else ''}. {sparsity}{quantised}")
    if facts.get("step") is not None:
        yield from ("", f"Trained by pst-ds for {facts['step']} steps, computed in {facts['computed_in']}.")
    yield ""


def _size(facts: Facts) -> list[str]:
    size, dense = facts["file_bytes"], facts["dense_bf16_bytes"]
    compared = f"That is {size / max(dense, 1):.3f} of the dense size in bfloat16, {dense:,} bytes."
    if "bits_per_weight" in facts:
        packed = facts.get("packed_bits_per_weight")
        compared += f" Including scales, the model has {facts['bits_per_weight']:.2f} bits per weight"
        compared += "." if packed is None else f", {packed:.2f} in packed layers."
    return ["## Size", "", f"The weight files have {size:,} bytes. {compared}", ""]


def _metrics(metrics: dict[str, float | None]) -> list[str]:
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if value is not None]
    if not rows:
        return ["## Metrics", "", "No metrics were recorded for this model.", ""]
    return ["## Metrics", "", "On the validation data of the run:", "", "| metric | value |", "|---|---|", *rows, ""]


def _use(facts: Facts, encoding: Encoding) -> Iterator[str]:
    kind = next((f"AutoModel{task}" for task in _TASKS if facts["architecture"].endswith(task)), "AutoModel")
    yield from ("## Load it", "", "```python")
    if encoding.needs_pst_ds:
        yield from ("import pst_ds.hf  # registers the packed formats with transformers", "")
    yield from (f"from transformers import {kind}", "")
    yield from (f'model = {kind}.from_pretrained("path/to/this/folder")', "```", "")
    if encoding.needs_pst_ds:
        yield from ("Without the import, transformers fails because it finds no weights.", "")
    if facts["kind"] in FOR_COMPRESSED_TENSORS:
        yield from ("Requires the package compressed-tensors. vLLM reads the folder if it has a kernel for it.", "")
    yield from ("## Verify it", "", "```bash", "pst-ds verify path/to/this/folder", "```", "")
    yield from ("pst_manifest.json lists tensors and hashes.", "")
