"""Write a text about structured data, which precedes it as one line; the loss is of the text only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import place_in_split, read_rows, values_of
from pst_ds.data.tasks.answers import AnswerTask
from pst_ds.data.tasks.task import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")
_PARTS = " | "


@dataclass(frozen=True, slots=True)
class Pairs:
    """Tokenised pairs of an input and a text. Inputs with several texts are stored, and generated from, once."""

    inputs: list[list[int]]
    """Tokens of each distinct input, in the order of their first examples."""
    references: list[list[str]]
    """All texts of each input."""
    input_of: list[int]
    """Index of the input of each example."""
    targets: list[list[int]]
    """Tokens of the text of each example, with the end-of-text token."""
    separator: list[int]
    """Tokens between input and text."""
    max_length: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = []
        for example in range(len(self)):
            prompt, target = self.tokens(example)
            lengths.append(len(prompt) + len(target))
        return lengths

    @property
    def digest(self) -> str:
        read = [self.inputs, self.input_of, self.targets, self.separator, self.max_length]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    def first(self, count: int) -> Pairs:
        """Return the first ``count`` examples, with all references of their inputs."""
        input_of = self.input_of[:count]
        targets = self.targets[:count]
        inputs = max(input_of, default=-1) + 1
        return replace(
            self, inputs=self.inputs[:inputs], references=self.references[:inputs], input_of=input_of, targets=targets
        )

    def tokens(self, example: int) -> tuple[list[int], list[int]]:
        """Return (prompt, target) of one example, together at most ``max_length`` tokens. The prompt is truncated
        first, to at least half of that, and keeps the separator at its end."""
        data = self.inputs[self.input_of[example]]
        target = self.targets[example]
        most_of_prompt = max(self.max_length - len(target), self.max_length // 2)
        prompt = self._prompt(data, most_of_prompt)
        return prompt, target[: self.max_length - len(prompt)]

    def row(self, example: int) -> tuple[list[int], list[int]]:
        prompt, target = self.tokens(example)
        # only the text is learned, not the data
        return [*prompt, *target], [IGNORED] * len(prompt) + target

    def prompts(self, most: int) -> list[list[int]]:
        """Return the prompt of each distinct input, at most ``most`` tokens."""
        return [self._prompt(data, min(most, self.max_length)) for data in self.inputs]

    def _prompt(self, data: list[int], most: int) -> list[int]:
        """Return the tokens of an input and the separator, at most ``most``; only the input is truncated."""
        return data[: max(0, most - len(self.separator))] + self.separator


def linearize(value: object) -> str | None:
    """Return data as a line of text, in the form used by LoRA (arXiv 2106.09685); None for an unknown shape.

    E2E: "name[The Vaults], eatType[pub]" becomes "name : The Vaults | eatType : pub". DART: triples [[s, p, o], ...]
    become "s : p : o | ...", with p in lower case. WebNLG: ["s | p | o", ...] becomes the same, with p unchanged; of
    several sets the first is used. Any other text is stripped only.
    """
    if isinstance(value, str):
        return _attributes(value) or value.strip() or None
    if not isinstance(value, list) or not value:
        return None
    if _are_texts(value):
        return _joined([triple.split(_PARTS) for triple in value])
    for part in value:
        if not isinstance(part, list) or not part or not _are_texts(part):
            return None
    # WebNLG: the first of several sets of triples
    if all(_PARTS in triple for triple in value[0]):
        return linearize(value[0])
    if any(len(triple) != 3 for triple in value):
        return None
    triples: list[list[str]] = []
    for subject, predicate, end in value:
        triples.append([subject, predicate.lower(), end])
    return _joined(triples)


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _joined(triples: Iterable[Sequence[str]]) -> str:
    """Return triples, or pairs, as a line: "s : p : o | s : p : o"."""
    lines: list[str] = []
    for triple in triples:
        lines.append(" : ".join(map(str.strip, triple)))
    return _PARTS.join(lines)


def _attributes(text: str) -> str:
    """Return a meaning representation of E2E as a line; "" for any other text."""
    attributes: list[Sequence[str]] = []
    position = 0
    while position < len(text):
        match = _ATTRIBUTE.match(text, position)
        # a text such as "see [1] and [2]" starts like an attribute, but does not consist of them
        if match is None:
            return ""
        attributes.append(match.groups())
        position = match.end()
    return _joined(attributes)


class _ObjectAmongTexts(Exception):
    """A value is an object where texts are expected; the argument is the object."""


def _texts_in(value: object) -> list[str]:
    """Return the text or texts in a value, which may be a nested list. Raises _ObjectAmongTexts."""
    if isinstance(value, list):
        texts: list[str] = []
        for item in value:
            texts += _texts_in(item)
        return texts
    if isinstance(value, dict):
        raise _ObjectAmongTexts(value)
    # no text: benchmarks have test sets without targets
    if value is None or not str(value).strip():
        return []
    return [str(value).strip()]


def _separator(data: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens between input and text. Raises ConfigError for a separator without tokens or a long one."""
    if not data.separator:
        return [tokenizer.eos_token_id]
    ids: list[int] = tokenizer(data.separator, add_special_tokens=False)["input_ids"]
    # the input, which is truncated to half of max_length, keeps the separator at its end
    if not 0 < len(ids) <= data.max_length // 4:
        raise ConfigError(
            f"data.separator = {data.separator!r} has {len(ids)} tokens. Choose one with at least one token, and at "
            f"most a quarter of data.max_length = {data.max_length}"
        )
    return ids


class DataToText(AnswerTask[Pairs]):
    """Write a text about structured data. An input with several texts is generated from once."""

    ends_with = "'data-to-text', which ends texts with it"

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Pairs:
        """Return an example for each text of each row. Rows without a text are omitted, as in some test sets."""
        texts_of_lines = _texts_of_lines(data, split)
        separator = _separator(data, tokenizer)
        end = tokenizer.eos_token_id
        input_of: list[int] = []
        texts_of_examples: list[str] = []
        for index, texts in enumerate(texts_of_lines.values()):
            for text in texts:
                input_of.append(index)
                # with a space, as after the separator in running text
                texts_of_examples.append(f" {text}")
        targets: list[list[int]] = []
        for ids in tokenizer(texts_of_examples, add_special_tokens=False)["input_ids"]:
            targets.append([*ids, end])
        inputs: list[list[int]] = []
        for ids in tokenizer(list(texts_of_lines))["input_ids"]:
            # Some tokenizers end a text with the end-of-text token, but here the answer follows.
            if ids[-1:] == [end]:
                ids = ids[:-1]
            inputs.append(ids)
        return Pairs(
            inputs=inputs,
            references=list(texts_of_lines.values()),
            input_of=input_of,
            targets=targets,
            separator=separator,
            max_length=data.max_length,
        )


def _texts_of_lines(data: DataConfig, split: str) -> dict[str, list[str]]:
    """Return all texts about each distinct input, by its line, in the order of the rows.

    Raises ConfigError for data of an unknown shape, for objects in place of texts, and for a split without texts.
    """
    column = data.text_columns[0]
    where = getattr(data, split)
    rows = read_rows(data, split, {column: "text_columns", data.label_column: "label_column"}, nested=True)
    texts_of_lines: dict[str, list[str]] = {}
    pairs = zip(values_of(rows, column), values_of(rows, data.label_column), strict=True)
    for row, (value, label) in enumerate(pairs):
        try:
            texts = _texts_in(label)
        except _ObjectAmongTexts as error:
            (names,) = error.args
            example = f"{data.label_column}.{next(iter(names), 'text')}"
            raise ConfigError(
                f"{where}: column {data.label_column!r} has an object in {place_in_split(data, split, rows, row)}, not "
                f"a text. Name a part of it, such as {example!r}, with data.label_column"
            ) from None
        if not texts:
            continue
        line = linearize(value)
        if line is None:
            place = place_in_split(data, split, rows, row)
            raise ConfigError(
                f"{where}: column {column!r} has {str(value)[:80]!r} in {place}, which is neither a text nor a "
                'list of triples, as ["subject | property | object"] or [["subject", "property", "object"]]'
            )
        texts_of_lines.setdefault(line, []).extend(texts)
    if not texts_of_lines:
        raise ConfigError(f"{where}: column {data.label_column!r} has no text in any row. Name another column")
    return texts_of_lines


TASK = DataToText
