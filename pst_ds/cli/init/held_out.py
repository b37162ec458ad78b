"""Rows of the training file that ``pst-ds init`` holds out for validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pst_ds.cli.init.start import Settings
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.data.dataset import file_and_slice
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PERCENT = 10


def with_validation(table: Settings, tokenizer: Tokenizer, labels: list[str]) -> tuple[Settings, str]:
    """Return ``table`` with the last rows of data.train held out for validation, and a sentence on it. Where that is
    not possible, return it unchanged, and the sentence says why."""
    where, share = table["data"]["train"], 100 - PERCENT
    file, piece = file_and_slice(where)
    if piece:
        return table, f"no validation data: {where} is a slice, and --validation may name the rest of {file}"
    sliced = {"train": f"{where}[:{share}%]", "validation": f"{where}[{share}%:]"}
    held = {**table, "data": sliced | {name: of for name, of in table["data"].items() if name != "train"}}
    try:
        examples = _require_fair(run_from_table(held), tokenizer, labels)
    except InputError as error:
        return table, f"no validation data: {error}. Name a file with --validation"
    return held, f"held out for validation: the last {PERCENT} % of {where}, {examples}"


def _require_fair(run: RunConfig, tokenizer: Tokenizer, labels: list[str]) -> str:
    """Return the number of held-out examples, with their unit.

    Raises InputError if the rest cannot be trained on, or if the rows are in the order of their classes.
    """
    task, data = task_of(run), run.data
    if task.label_names(data) != labels:
        raise InputError(f"{data.train} lacks some classes, so its rows may be in their order")
    task.load(data, "train", tokenizer, labels)
    examples = task.load(data, "validation", tokenizer, labels)
    if labels and task.num_labels(examples) == 1:
        raise InputError(f"{data.validation} has one class only, so its rows may be in the order of classes")
    return f"{len(examples)} {task.unit}"
