"""Trim a masked training model as an export for fewer tokens is, to hold the one against the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pst_ds.data.tasks import ExampleSet
from pst_ds.export.manifest import ExportError, read_manifest
from pst_ds.export.vocabulary import take_rows
from pst_ds.train.run import RunContext


def tokens_of_folder(folder: str) -> list[int]:
    """Return the old id of each token that an export embeds; [] where it embeds all. Raises ExportError."""
    return list(read_manifest(Path(folder))[1].get("tokens_kept") or [])


def trim_model(masked: nn.Module, context: RunContext, folder: str, kept: list[int]) -> RunContext:
    """Leave ``masked`` the rows of the tokens ``kept``; return ``context`` with the tokenizer of the export.

    Raises ExportError for a tokenizer with other tokens.
    """
    tokenizer = type(context.tokenizer).from_pretrained(folder)
    if max(tokenizer.get_vocab().values()) >= len(kept):
        raise ExportError(f"{folder}: the manifest knows {len(kept)} tokens, and the tokenizer has more")
    take_rows(masked, kept)
    return replace(context, tokenizer=tokenizer)


def same_tokens(
    before: RunContext, whole: ExampleSet, after: RunContext, examples: ExampleSet, kept: list[int]
) -> dict[str, Any]:
    """Count the texts whose tokens are those that they were; nothing for texts that are packed into sequences."""
    if before.run.task_facts.packs_text or len(whole) != len(examples):
        return {}

    def ids(context: RunContext, of: ExampleSet, index: int) -> list[int]:
        found: list[int] = context.task.collate(of, [index], context.tokenizer)["input_ids"].flatten().tolist()
        return found

    same = sum([kept[new] for new in ids(after, examples, i)] == ids(before, whole, i) for i in range(len(examples)))
    return {"same_tokens": same}
