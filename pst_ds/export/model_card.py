"""README.md of an export: what it is, how sparse and how large, how it did, how to load and check it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pst_ds.core.packings import FOR_COMPRESSED_TENSORS
from pst_ds.export.manifest import DENSE, About, TensorEntry, encoding_by

CARD_FILE = "README.md"
_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def model_card(name: str, entries: Sequence[TensorEntry], about: About) -> str:
    """The text of the card of the export in the folder ``name``; ``about`` is what its manifest says."""
    return "\n".join([*_front_matter(about), *_summary(name, about), *_sparsity(entries, about), *_size(about),
                      *_metrics(about), *_use(about)])  # fmt: skip


def _front_matter(about: About) -> list[str]:
    encoding = encoding_by(about)
    base = _base(about)
    grids = dict.fromkeys(grid.values for grid in (encoding.values, encoding.embeddings) if grid)
    formats = [] if encoding.is_plain else [f"format-{about['kind'].replace(':', '-of-')}"]
    tags = ["sparse", "pruned", "pst-ds", *formats, *grids]
    lines = ["---", "library_name: transformers"]
    if base and not base.startswith((".", "/", "~")):  # a name on the hub, as far as one can see
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _base(about: About) -> str:
    """The pretrained model: where the run's base was pruned from, if it was; "" where that is not known."""
    return about.get("pruned_from") or about.get("base_model") or ""


def _summary(name: str, about: About) -> list[str]:
    how = "stored densely, with exact zeros" if about["kind"] == DENSE else f"packed as {about['kind']}"
    base = f" of {_base(about)}" if _base(about) else ""
    zeros = f"{about['sparsity_measured']:.2%} of the weights in its pruned layers are zero; they are {how}."
    lines = [f"# {name}", "", f"A sparse version{base}. {zeros}{_grids(about)}"]
    if about.get("step") is not None:
        lines += ["", f"Trained by pst-ds for {about['step']} steps, computed in {about['computed_in']}."]
    return [*lines, ""]


def _grids(about: About) -> str:
    """Sentences on what is rounded; "" where nothing is."""
    encoding = encoding_by(about)
    said = [
        f"{whose} values are {grid.values}, with a bf16 scale for "
        f"{'every row' if grid.group is None else f'every {grid.group} weights of a row'}."
        for whose, grid in (("Their", encoding.values), ("The embeddings'", encoding.embeddings))
        if grid is not None
    ]
    return "".join(f" {sentence}" for sentence in said)


def kind_of_layer(name: str) -> str:
    """A tensor's name with a star for the number of its block: "model.layers.*.mlp.up_proj"."""
    return re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))


def _sparsity(entries: Sequence[TensorEntry], about: About) -> list[str]:
    kinds: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        if entry.origin == "pruned" or entry.pattern != DENSE or entry.values:
            kinds.setdefault(kind_of_layer(entry.name), []).append(entry)
    is_rounded = any(entry.values for entry in entries)
    more = [" rounding changed |", "---|", " |"] if is_rounded else ["", "", ""]
    lines = ["## Sparsity", "", f"| layer | tensors | weights | zeros | pattern found | stored |{more[0]}"]
    lines.append(f"|---|---|---|---|---|---|{more[1]}")
    for kind, found in kinds.items():
        weights, nonzero = sum(e.numel for e in found), sum(e.nonzero for e in found)
        patterns = sorted({e.pattern for e in found})
        packings = sorted({" ".join(filter(None, (e.packing, e.values))) for e in found})
        changed = f" {max(e.rounding_error for e in found):.2%} |" if is_rounded else ""
        lines.append(
            f"| `{kind}` | {len(found)} | {weights:,} | {1 - nonzero / max(weights, 1):.2%} | {', '.join(patterns)} | "
            f"{', '.join(packings)} |{changed}"
        )
    weights = sum(entry.numel for entry in entries)
    zeros = sum(entry.numel - entry.nonzero for entry in entries)
    lines.append(f"| whole model | {len(entries)} | {weights:,} | {zeros / max(weights, 1):.2%} | | |{more[2]}")
    asked = about.get("sparsity_requested")
    said = [f"{asked:.2%} zeros were asked of every pruned matrix.", ""] if asked is not None else []
    if is_rounded:
        said += ["What rounding changed is the norm of the change over that of the weights, the largest of a kind.", ""]
    return [*lines, "", *said]


def _size(about: About) -> list[str]:
    size, dense = about["file_bytes"], about["dense_bf16_bytes"]
    compared = f"Dense in bfloat16 they would have {dense:,}: {size / max(dense, 1):.3f} of it."
    if "bits_per_weight" in about:
        packed = about.get("packed_bits_per_weight")
        packed = "" if packed is None else f", {packed:.2f} in its packed layers"
        compared += f" With scales and all else the model takes {about['bits_per_weight']:.2f} bits a weight{packed}."
    return ["## Size", "", f"The weight files have {size:,} bytes. {compared}", ""]


def _metrics(about: About) -> list[str]:
    metrics = {name: value for name, value in about["metrics"].items() if value is not None}
    if not metrics:
        return ["## Metrics", "", "None were recorded for this model.", ""]
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return ["## Metrics", "", "On the validation data of the run:", "", "| metric | value |", "|---|---|", *rows, ""]


def _use(about: About) -> list[str]:
    kind = next((f"AutoModel{task}" for task in _TASKS if about["architecture"].endswith(task)), "AutoModel")
    is_ours = encoding_by(about).is_ours
    first = [] if not is_ours else ["import pst_ds.hf  # teaches transformers the packed format", ""]
    lines = ["## Load it", "", "```python", *first, f"from transformers import {kind}", ""]
    lines += [f'model = {kind}.from_pretrained("path/to/this/folder")', "```", ""]
    if is_ours:
        lines += ["Without the import transformers finds no weights here, and says so.", ""]
    if about["kind"] in FOR_COMPRESSED_TENSORS:
        lines += [
            "It takes the package compressed-tensors. vLLM reads the folder as it is, where it has a kernel for it.",
            "",
        ]
    checks = "pst-ds verify path/to/this/folder"
    return [*lines, "## Check it", "", "```bash", checks, "```", "", "Tensors and hashes are in pst_manifest.json.", ""]
