"""Text for language modelling: one stream of tokens, cut into sequences of equal length."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pst_ds.train.config import ConfigError, DataConfig
from pst_ds.train.rows import read_rows, texts_of

_ROWS_AT_A_TIME = 100


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Consecutive pieces of a token stream; sequence i starts at token ``i * (length - overlap)``.

    Without ``overlap`` (for training) every sequence has ``length`` tokens, and what is left at the end, less than
    ``length``, is in none. With an overlap of 1 (for evaluation) a sequence begins with the last token of the one
    before, so that each token but the stream's first is predicted in exactly one; the last may be shorter, down to 2.
    """

    tokens: np.ndarray
    """(tokens of the stream,) int32."""
    length: int
    overlap: int = 0

    def __len__(self) -> int:
        if self.overlap:
            return max(0, -(-(len(self.tokens) - 1) // self._stride))
        return len(self.tokens) // self.length

    @property
    def _stride(self) -> int:
        return self.length - self.overlap

    @property
    def digest(self) -> str:
        about = f"{self.length} {self.overlap} ".encode()
        return hashlib.sha256(about + np.ascontiguousarray(self.tokens).tobytes()).hexdigest()

    @property
    def lengths(self) -> list[int]:
        starts = range(0, len(self) * self._stride, self._stride)
        return [min(self.length, len(self.tokens) - start) for start in starts]

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of one sequence, a view."""
        start = index * self._stride
        return self.tokens[start : start + self.length]

    def first(self, count: int) -> Sequences:
        """The first ``count`` sequences."""
        return replace(self, tokens=self.tokens[: min(count, len(self)) * self._stride + self.overlap])


def load_sequences(data: DataConfig, split: str, tokenizer: Any) -> Sequences:
    """The sequences of one split: for "train" without overlap, for others with one of a token.

    Raises ConfigError for a missing file or column, a row without text, and too little text for one sequence.
    """
    column, where = data.text_columns[0], getattr(data, split)
    rows = read_rows(data, split, {column: "text_columns"})
    tokens = token_stream(_batches_of_texts(rows, column, where), tokenizer)
    sequences = Sequences(tokens, data.max_length, overlap=0 if split == "train" else 1)
    if not len(sequences):
        needed = f"one sequence of data.max_length = {data.max_length}" if split == "train" else "2, a token to predict"
        raise ConfigError(
            f"{where}: the text of column {column!r} has {len(tokens)} tokens in all, fewer than {needed}"
            + ("; lower it, or give more text" if split == "train" else "; give more text")
        )
    return sequences


def token_stream(batches: Iterable[Sequence[str]], tokenizer: Any) -> np.ndarray:
    """The tokens of all texts one after another, with the end-of-text token between two: (tokens,) int32.

    A text is tokenised with the special tokens that the tokenizer adds by itself; where that puts the end-of-text token
    at the end of a text already, no second one follows. Texts of white space alone are left out. 4 bytes a token are
    held, and some 6 % to spare.
    """
    end = tokenizer.eos_token_id
    stream = array("i")
    assert stream.itemsize == 4
    for texts in batches:
        texts = [text for text in texts if text.strip()]
        if not texts:
            continue
        for ids in tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]:
            if stream and stream[-1] != end:
                stream.append(end)
            stream.extend(ids)
    return np.frombuffer(stream, dtype=np.int32) if stream else np.empty(0, dtype=np.int32)


def collate_sequences(sequences: Sequences, indices: Sequence[int]) -> dict[str, Tensor]:
    """Model inputs of sequences of equal length: input_ids and labels, (len(indices), length) int64.

    Labels are the input: the model predicts each from those before it. There is no padding, so no attention mask.
    """
    rows = [sequences[i] for i in indices]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def _batches_of_texts(rows: Any, column: str, where: str) -> Iterable[list[str]]:
    rows = rows.select_columns([column])
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        yield texts_of(rows[start : start + _ROWS_AT_A_TIME][column], column, where, first_row=start)
