"""The vocabulary of ``pst-ds export --vocabulary``: the tokens of a run's training data, or of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.config.run import RunConfig
from pst_ds.data.tasks import task_of
from pst_ds.data.tokens.identity import open_tokenizer
from pst_ds.data.vocabulary import Vocabulary, trim
from pst_ds.errors import InputError
from pst_ds.export.from_folder import model_of
from pst_ds.export.vocabulary import ids_of_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

SEEN = "seen"
_AT_A_TIME = 1024


def vocabulary_of_run(
    asked: str, run: RunConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase, model: nn.Module
) -> Vocabulary:
    """Return the vocabulary that ``asked`` names for a run's model. Raises InputError."""
    seen = _of_splits(run, labels, tokenizer) if asked == SEEN else _of_file(asked, tokenizer)
    return trim(tokenizer, seen | ids_of_model(model))


def vocabulary_of_folder(asked: str, folder: Path) -> dict[str, object]:
    """Return the tokenizer of a model folder, and the vocabulary that ``asked`` names for it. Raises InputError."""
    if asked == SEEN:
        raise InputError(f"--vocabulary seen: {folder} is a model folder without training data. Name a text file")
    tokenizer = open_tokenizer(folder, str(folder), "Name a folder with a tokenizer")
    vocabulary = trim(tokenizer, _of_file(asked, tokenizer) | ids_of_model(model_of(folder)))
    return {"tokenizer": tokenizer, "vocabulary": vocabulary}


def _of_splits(run: RunConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens of the training and validation data of a run, truncated as in training."""
    task, found = task_of(run), set[int]()
    for split in ("train", "validation") if run.data.validation else ("train",):
        examples = task.load(run.data, split, tokenizer, labels)
        for first in range(0, len(examples), _AT_A_TIME):
            indices = range(first, min(first + _AT_A_TIME, len(examples)))
            found.update(task.collate(examples, indices, tokenizer)["input_ids"].unique().tolist())
    return found


def _of_file(name: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = set[int]()
    for texts in _lines(Path(name)):
        found.update(token for ids in tokenizer(texts)["input_ids"] for token in ids)
    return found


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield batches of lines of a text file. Raises InputError."""
    try:
        with path.open(encoding="utf-8") as file:
            while texts := [line.rstrip("\n") for _, line in zip(range(_AT_A_TIME), file, strict=False)]:
                yield texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'--vocabulary {path} cannot be read: {error}; name a UTF-8 file with a text a line, or "seen"'
        ) from None
