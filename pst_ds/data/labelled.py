"""Labelled examples: read, check and tokenise them, and order batches independently of the world size."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import appearance, place_in_split, read_rows, text_column
from pst_ds.errors import shortened

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

_LENGTH_WINDOW_BATCHES = 50
"""Batches whose examples are sorted by length together; more of them pad less, and mix less."""
_FEW_ROWS = 20
"""Rows up to which every row may have a different label."""
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_ROWS_AT_A_TIME = 256
"""Rows per tokenizer call, which holds truncated text until it returns."""
_MORE_TOKENS = 32
"""Extra tokens of a text that is cut before tokenisation, so that the kept tokens do not change."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples with their labels."""

    features: list[dict[str, list[int]]]
    """input_ids, attention_mask and, for some tokenizers, token_type_ids of each example."""
    labels: list[int] | list[float]
    """Class ids, or numbers."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        return [len(feature["input_ids"]) for feature in self.features]

    @property
    def digest(self) -> str:
        # fp64 numbers, or int64 class ids
        kind = "d" if isinstance(self.labels[0], float) else "q"
        digest = hashlib.sha256(array(kind, self.labels))
        for feature in self.features:
            for key, values in feature.items():
                digest.update(f"{key} {len(values)}".encode())
                digest.update(array("q", values))
        return digest.hexdigest()

    def first(self, count: int) -> Examples:
        return Examples(self.features[:count], self.labels[:count])


def read_labelled(data: DataConfig, split: str) -> Dataset:
    """Read the rows of a split, and check its text and label columns. Raises ConfigError."""
    setting_of_column = dict.fromkeys(data.text_columns, "text_columns")
    setting_of_column[data.label_column] = "label_column"
    return read_rows(data, split, setting_of_column)


def label_names(data: DataConfig) -> list[str]:
    """Return the class names by id: ``data.label_names``, the dataset's class names, or the sorted training labels.
    Raises ConfigError."""
    names = _names_in_training(data)
    wanted = data.label_names
    if set(names) == set(wanted):
        return list(wanted)
    # Names that have nothing in common are those of a preset for the hub's classes; files may number them instead.
    if not set(names).isdisjoint(wanted):
        raise ConfigError(
            f"data.label_names = {list(wanted)} do not match column {data.label_column!r} of {data.train}, which has "
            f"the labels {shortened(names, 12)}. Name exactly these, or none"
        )
    return names


def _names_in_training(data: DataConfig) -> list[str]:
    """Return the class names of the training data by id. Raises ConfigError for labels that are not classes."""
    rows = read_labelled(data, "train")
    feature = rows.features[data.label_column]
    # the order of a dataset's classes is that of their ids
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = set(rows.unique(data.label_column))
    if any(map(_is_empty, labels)):
        _refuse_empty(data, rows)
    _require_distinct(data, rows)
    if holds_fractions(labels):
        raise ConfigError(
            f'{data.train}: column {data.label_column!r} holds fractions, which is regression. Set task = "regression"'
        )
    if len(labels) < 2:
        raise ConfigError(
            f"{data.train}: column {data.label_column!r} has {len(labels)} class, but at least 2 are needed. "
            "Name another data.label_column, or add examples of another class"
        )
    if len(labels) == len(rows) > _FEW_ROWS:
        raise ConfigError(
            f"{data.train}: column {data.label_column!r} has a different value in each of its {len(rows)} rows, so "
            "it does not hold classes. Name the column that does with data.label_column"
        )
    in_order = sorted(labels)
    if all(map(_is_integer, labels)):
        # by number, so that class 10 follows class 9
        in_order = sorted(labels, key=int)
    return [str(label) for label in in_order]


def _is_empty(label: object) -> bool:
    """Return whether a label is missing, or an empty field of a CSV file."""
    return label is None or (isinstance(label, str) and not label.strip())


def _refuse_empty(data: DataConfig, rows: Dataset) -> NoReturn:
    """Raise ConfigError, which names the first row of the training data with an empty label."""
    empty: list[int] = []
    for row, label in enumerate(rows[data.label_column]):
        if _is_empty(label):
            empty.append(row)
    others = ""
    if len(empty) > 1:
        others = f" and {len(empty) - 1} more"
    raise ConfigError(
        f"{data.train}: column {data.label_column!r} has empty values, in "
        f"{place_in_split(data, 'train', rows, empty[0])}{others}. Give every example a label"
    )


def _require_distinct(data: DataConfig, rows: Dataset) -> None:
    """Raise ConfigError for classes of the training data that look the same, such as "a" and "a "."""
    class_of: dict[str, str] = {}
    for label in rows.unique(data.label_column):
        if not isinstance(label, str):
            continue
        first = class_of.setdefault(appearance(label), label)
        if first == label:
            continue
        row = list(rows[data.label_column]).index(label)
        place = place_in_split(data, "train", rows, row)
        # escaped, since two accents may be printed alike
        difference = f"{first!a} and {label!a}, which look the same"
        if first.split() == label.split():
            difference = f"{first!r} and {label!r}, which differ in white space only"
        raise ConfigError(
            f"{data.train}: column {data.label_column!r} has the classes {difference}, in {place}. Write each class in "
            "one way"
        )


def _is_integer(label: object) -> bool:
    """Return whether a label is an integer, or text that writes one in the usual way: "7", but not "007"."""
    return isinstance(label, int) or (isinstance(label, str) and _INTEGER.fullmatch(label) is not None)


def holds_fractions(labels: Iterable[object]) -> bool:
    """Return whether labels are numbers, or texts that write numbers, of which one at least has a fraction."""
    fractions = False
    for label in labels:
        if isinstance(label, str) and _NUMBER.fullmatch(label) is None:
            return False
        if not isinstance(label, int | float | str) or isinstance(label, bool):
            return False
        fractions = fractions or not _is_integer(label)
    return fractions


def load_examples(data: DataConfig, split: str, tokenizer: Tokenizer, names: Sequence[str]) -> Examples:
    """Return the examples of one split. Raises ConfigError, also for a label not in ``names``."""
    rows = read_labelled(data, split)
    # splits may use different ids for the same names
    names_in_split = dict(enumerate(getattr(rows.features[data.label_column], "names", ())))
    ids = {name: number for number, name in enumerate(names)}
    labels: list[int] = []
    for row, value in enumerate(rows[data.label_column]):
        label = names_in_split.get(value, value)
        if str(label) not in ids:
            place = place_in_split(data, split, rows, row)
            refuse_hidden(label, place, getattr(data, split))
            raise ConfigError(
                f"{getattr(data, split)}: label {label!r} in {place} is not one of the training labels "
                f"{shortened(names, 12)}"
            )
        labels.append(ids[str(label)])
    return Examples(tokenized_texts(rows, data, split, tokenizer), labels)


def refuse_hidden(label: object, place: str, where: str) -> None:
    """Raise ConfigError for -1 in ``place``, which represents a hidden label in benchmarks such as GLUE."""
    if label in (-1, "-1"):
        raise ConfigError(
            f"{where}: label {label!r} in {place} stands for a hidden label, as in the test sets of GLUE. Name a "
            'split that has labels, such as "validation"'
        )


def tokenized_texts(rows: Dataset, data: DataConfig, split: str, tokenizer: Tokenizer) -> list[dict[str, list[int]]]:
    """Tokenise the text, or pair of texts, of each row. Raises ConfigError for a row without text."""

    def place(row: int) -> str:
        return place_in_split(data, split, rows, row)

    texts_of_columns: list[list[str]] = []
    for column in data.text_columns:
        texts_of_columns.append(text_column(rows[column], column, where=getattr(data, split), place=place))
    return tokenized_columns(texts_of_columns, data.max_length, tokenizer)


def tokenized_columns(
    columns: Sequence[Sequence[str]], max_length: int | None, tokenizer: Tokenizer
) -> list[dict[str, list[int]]]:
    """Tokenise texts (one column) or pairs of texts (two), truncated to ``max_length`` tokens unless that is None."""
    features: list[dict[str, list[int]]] = []
    for start in range(0, len(columns[0]), _ROWS_AT_A_TIME):
        texts_of_columns = [list(column[start : start + _ROWS_AT_A_TIME]) for column in columns]
        if len(texts_of_columns) > 1 and tokenizer.is_fast and max_length:
            texts_of_columns = _as_far_as_needed(texts_of_columns, max_length, tokenizer)
        encoded = tokenizer(*texts_of_columns, truncation=max_length is not None, max_length=max_length)
        for index in range(len(texts_of_columns[0])):
            # which inputs there are depends on the tokenizer: some have token_type_ids
            features.append({key: values[index] for key, values in encoded.items()})
    return features


def _as_far_as_needed(pairs: list[list[str]], max_length: int, tokenizer: Tokenizer) -> list[list[str]]:
    """Return both columns of pairs, with long texts cut to slightly more than ``max_length`` tokens.

    When a fast tokenizer truncates a pair, it also creates every combination of parts of both texts: memory grows with
    the product of their lengths, to gigabytes for two texts of 10,000 tokens. The longer of two long texts keeps more,
    because it may keep one token more after truncation.
    """
    limit = max_length + _MORE_TOKENS
    spans = [_token_spans(column, limit, tokenizer) for column in pairs]
    shortened_pairs = [list(column) for column in pairs]
    for row in range(len(pairs[0])):
        for side, other in ((0, 1), (1, 0)):
            # texts of few characters have no spans: they are short enough in any case
            spans_of_text = spans[side].get(row, [])
            if len(spans_of_text) <= limit:
                continue
            most = limit
            if len(spans_of_text) > len(spans[other].get(row, ())):
                most += _MORE_TOKENS
            text = pairs[side][row]
            if tokenizer.truncation_side == "left":
                start, _ = spans_of_text[-most:][0]
                shortened_pairs[side][row] = text[start:]
            else:
                _, end = spans_of_text[:most][-1]
                shortened_pairs[side][row] = text[:end]
    return shortened_pairs


def _token_spans(texts: list[str], limit: int, tokenizer: Tokenizer) -> dict[int, list[tuple[int, int]]]:
    """Return the (start, end) offsets of the tokens of each text of more than ``limit`` characters, by its index."""
    long_texts: dict[int, str] = {}
    for index, text in enumerate(texts):
        # a token has at least one character
        if len(text) > limit:
            long_texts[index] = text
    if not long_texts:
        return {}
    # verbose warns of texts longer than the model's positions, which these are before they are cut
    encoded = tokenizer(list(long_texts.values()), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return dict(zip(long_texts, encoded["offset_mapping"], strict=True))


def collate(examples: Examples, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return model inputs of some examples, padded to the longest; ``labels`` is (len(indices),), int64 or fp32."""
    features = [examples.features[index] for index in indices]
    labels = [examples.labels[index] for index in indices]
    return {**tokenizer.pad(features, return_tensors="pt"), "labels": torch.tensor(labels)}


@dataclass(frozen=True, slots=True)
class GlobalBatches:
    """Examples of each optimizer step: a pure function of the step, equal for every world size. An epoch is a seeded
    permutation cut into whole batches; the remaining examples are skipped in this epoch."""

    lengths: Sequence[int] | np.ndarray
    batch_size: int
    seed: int
    group_by_length: bool = False

    @property
    def batches_per_epoch(self) -> int:
        return len(self.lengths) // self.batch_size

    def epoch(self, number: int) -> list[list[int]]:
        """Return the batches of epoch ``number``, each a list of example indices."""
        # seeded by the epoch, so that a resumed run continues with the same order without the epochs before
        shuffle = random.Random(f"{self.seed}/{number}")
        order = list(range(len(self.lengths)))
        shuffle.shuffle(order)
        order = order[: self.batches_per_epoch * self.batch_size]
        if not self.group_by_length:
            return _cut(order, self.batch_size)
        batches = []
        for window in _cut(order, self.batch_size * _LENGTH_WINDOW_BATCHES):
            batches += _cut(sorted(window, key=lambda i: self.lengths[i]), self.batch_size)
        # otherwise training would see short examples first, in every window
        shuffle.shuffle(batches)
        for batch in batches:
            # mix short and long examples over ranks
            shuffle.shuffle(batch)
        return batches

    def after(self, first: int) -> Iterator[list[int]]:
        """Yield batches from number ``first`` of the run on, without end."""
        epoch, done = divmod(first, self.batches_per_epoch)
        while True:
            yield from self.epoch(epoch)[done:]
            epoch += 1
            # only the first epoch is entered in the middle
            done = 0

    def micro_batches(self, batch: Sequence[int], rank: int, world_size: int, accumulation: int) -> list[Sequence[int]]:
        """Return this rank's examples of a global ``batch``, one list for each accumulation step; where they cannot all
        have as many, the first ones have one more."""
        size, num_larger = divmod(len(batch), world_size * accumulation)
        micro_batches = []
        for step in range(accumulation):
            # shares are numbered by step, then by rank
            share = step * world_size + rank
            start = share * size + min(share, num_larger)
            end = start + size
            if share < num_larger:
                end += 1
            micro_batches.append(batch[start:end])
        return micro_batches


def _cut(items: list[int], size: int) -> list[list[int]]:
    """Return ``items`` in lists of ``size``, of which the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
