"""The README.md of an export: sparsity, size, metrics, and how to load and verify it."""

import json
from pathlib import Path

from pst_ds.writing.encoding import encoding_of
from pst_ds.writing.manifest import Facts

_TASKS = ("ForCausalLM", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def model_card(name: str, facts: Facts) -> str:
    """Return the text of the card for the folder ``name``, given the facts of its manifest."""
    from jinja2 import Environment, StrictUndefined

    encoding = encoding_of(facts["kind"], facts)
    grids = [("They", encoding.values), ("The embeddings", encoding.embeddings)]
    formats = [] if encoding.is_plain else [f"format-{facts['kind'].replace(':', '-of-')}"]
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).render(
        name=name,
        facts=facts,
        base=facts.get("pruned_from") or facts.get("base_model") or "",
        tags=["sparse", "pruned", "pst-ds", *formats, *dict.fromkeys(grid.values for _, grid in grids if grid)],
        grids=[(what, grid) for what, grid in grids if grid],
        encoding=encoding,
        is_packed=encoding.storage.marks_tensors,
        metrics={metric: value for metric, value in facts["metrics"].items() if value is not None},
        model_class=next((f"AutoModel{task}" for task in _TASKS if facts["architecture"].endswith(task)), "AutoModel"),
        needs_compressed_tensors=not encoding.is_plain and not encoding.needs_pst_ds,
        to_json=json.dumps,
        max=max,
    )
