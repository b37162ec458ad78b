"""The README.md of an export: sparsity, size, metrics, and how to load and verify it."""

import json
from pathlib import Path

from pst_ds.core.quantization import Grid
from pst_ds.writing.encoding import encoding_of
from pst_ds.writing.manifest import Facts

_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def model_card(name: str, facts: Facts) -> str:
    """Return the text of the card for the folder ``name``, given the facts of its manifest."""
    from jinja2 import Environment, StrictUndefined

    encoding = encoding_of(facts["kind"], facts)
    grids: list[tuple[str, Grid]] = []
    if encoding.values:
        grids.append(("They", encoding.values))
    if encoding.embeddings:
        grids.append(("The embeddings", encoding.embeddings))
    tags = ["sparse", "pruned", "pst-ds"]
    if not encoding.is_plain:
        tags.append(f"format-{facts['kind'].replace(':', '-of-')}")
    for _, grid in grids:
        if grid.values not in tags:  # once if both are quantised to the same values
            tags.append(grid.values)
    model_class = "AutoModel"
    for task in _TASKS:
        if facts["architecture"].endswith(task):
            model_class = f"AutoModel{task}"
    metrics = {metric: value for metric, value in facts["metrics"].items() if value is not None}
    # StrictUndefined, because an unknown name in the template would otherwise become an empty text
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=name,
        facts=facts,
        base=facts.get("pruned_from") or facts.get("base_model") or "",
        tags=tags,
        grids=grids,
        encoding=encoding,
        is_packed=encoding.storage.marks_tensors,
        metrics=metrics,
        model_class=model_class,
        needs_compressed_tensors=not encoding.is_plain and not encoding.needs_pst_ds,
        to_json=json.dumps,
        max=max,
    )
