"""The text that tells some data, after the data in a line: a language model scored on the text alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data import generation
from pst_ds.data.dataset import read_rows, values_of
from pst_ds.data.model_limits import check_causal_model, positions_of
from pst_ds.data.tasks.causal_lm import CausalTask, language_model_metrics
from pst_ds.data.tasks.task import IGNORED
from pst_ds.data.text_metrics import text_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*(?:,|$)")
_PARTS = " | "


@dataclass(frozen=True, slots=True)
class Pairs:
    """Tokenised pairs of data and a text. Data that several texts tell stands once, so it can be written from once."""

    inputs: list[list[int]]
    """Tokens of each distinct piece of data, in the order of their first examples."""
    references: list[list[str]]
    """All texts that tell each of them."""
    input_of: list[int]
    """Which of the inputs each example has."""
    targets: list[list[int]]
    """Tokens of the text of each example, with the end-of-text token."""
    separator: list[int]
    """Tokens between the two."""
    max_length: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(target) for prompt, target in map(self.tokens, range(len(self)))]

    @property
    def digest(self) -> str:
        read = [self.inputs, self.input_of, self.targets, self.separator, self.max_length]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    def first(self, count: int) -> Pairs:
        """Return the first ``count`` examples, with all references of their data."""
        input_of, targets = self.input_of[:count], self.targets[:count]
        inputs = max(input_of, default=-1) + 1
        return replace(
            self, inputs=self.inputs[:inputs], references=self.references[:inputs], input_of=input_of, targets=targets
        )

    def tokens(self, example: int) -> tuple[list[int], list[int]]:
        """Return (prompt, target) of one example, together at most ``max_length``. The prompt is cut first, to no less
        than half of that, and keeps the separator at its end."""
        data, target = self.inputs[self.input_of[example]], self.targets[example]
        prompt = self._prompt(data, max(self.max_length - len(target), self.max_length // 2))
        return prompt, target[: self.max_length - len(prompt)]

    def num_targets(self, example: int) -> int:
        """Count the tokens of one example that are predicted: those of its text, but never the first of all."""
        prompt, target = self.tokens(example)
        return len(target) - (not prompt)

    def prompts(self, most: int) -> list[list[int]]:
        """Return what a text is written after, at most ``most`` tokens, for each distinct piece of data."""
        return [self._prompt(data, min(most, self.max_length)) for data in self.inputs]

    def _prompt(self, data: list[int], most: int) -> list[int]:
        return data[: max(0, most - len(self.separator))] + self.separator


def load_pairs(data: DataConfig, split: str, tokenizer: Tokenizer) -> Pairs:
    """Return the pairs of one split: an example for each text of each row.

    A row without a text is left out, as are those of test sets that have none. Raises ConfigError for a missing file or
    column, and for data of no known shape.
    """
    column, where = data.text_columns[0], getattr(data, split)
    rows = read_rows(data, split, {column: "text_columns", data.label_column: "label_column"}, nested=True)
    references: dict[str, list[str]] = {}
    for row, (value, label) in enumerate(zip(values_of(rows, column), values_of(rows, data.label_column), strict=True)):
        texts = [text.strip() for text in _flat(label) if text and text.strip()]
        if texts:
            references.setdefault(_line_of(value, column, row, where), []).extend(texts)
    if not references:
        raise ConfigError(f"{where}: column {data.label_column!r} has no text in any row")
    separator = _separator(data, tokenizer)
    lines = list(references)
    flat = [(i, text) for i, line in enumerate(lines) for text in references[line]]
    targets = tokenizer([f" {text}" for _, text in flat], add_special_tokens=False)["input_ids"]
    return Pairs(
        inputs=[_without_end(ids, tokenizer) for ids in tokenizer(lines)["input_ids"]],
        references=list(references.values()),
        input_of=[i for i, _ in flat],
        targets=[[*target, tokenizer.eos_token_id] for target in targets],
        separator=separator,
        max_length=data.max_length,
    )


def collate_pairs(pairs: Pairs, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return model inputs of some pairs, padded on the right to the longest: all (len(indices), length) int64.

    ``labels`` are the tokens of the texts, and -100 elsewhere.
    """
    tokens = [pairs.tokens(i) for i in indices]
    length = max(len(prompt) + len(target) for prompt, target in tokens)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, target in tokens:
        real = len(prompt) + len(target)
        batch["input_ids"].append([*prompt, *target, *[padding] * (length - real)])
        batch["attention_mask"].append([1] * real + [0] * (length - real))
        batch["labels"].append([IGNORED] * len(prompt) + target + [IGNORED] * (length - real))
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def linearize(value: object) -> str | None:
    """Write data as a line of text, as GPT-2 is tuned on it (LoRA, arXiv 2106.09685); None for data of no known shape.

    "name[The Vaults], eatType[pub]" (E2E) becomes "name : The Vaults | eatType : pub"; the triples [[s, p, o], ...]
    (DART) "s : p : o | ...", with p in small letters; ["s | p | o", ...] (WebNLG) the same, as it is written there; of
    several sets of such the first counts. Another text stays as it is.
    """
    if isinstance(value, str):
        return _attributes(value) or value.strip() or None
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(triple, str) for triple in value):
        return _joined(triple.split(_PARTS) for triple in value)
    if not all(isinstance(part, list) and part and all(isinstance(x, str) for x in part) for part in value):
        return None
    if all(_PARTS in triple for triple in value[0]):
        return linearize(value[0])
    if all(len(triple) == 3 for triple in value):
        return _joined([subject, predicate.lower(), end] for subject, predicate, end in value)
    return None


def _joined(triples: Iterable[Sequence[str]]) -> str:
    return _PARTS.join(" : ".join(part.strip() for part in triple) for triple in triples)


def _attributes(text: str) -> str:
    """Write a meaning representation of E2E as a line; "" for any other text."""
    attributes, position = [], 0
    while position < len(text):
        match = _ATTRIBUTE.match(text, position)
        if match is None:
            return ""
        attributes.append(match.groups())
        position = match.end()
    return _joined(attributes)


def _line_of(value: object, column: str, row: int, where: str) -> str:
    line = linearize(value)
    if line is None:
        raise ConfigError(
            f"{where}: column {column!r} has {str(value)[:80]!r} in row {row}, which is neither a text nor a list of "
            'triples, as ["subject | property | object"] or [["subject", "property", "object"]]'
        )
    return line


def _flat(value: object) -> list[str]:
    """Return the texts in a value: one, or those of a list."""
    if isinstance(value, list):
        return [text for item in value for text in _flat(item)]
    return [] if value is None else [str(value)]


def _separator(data: DataConfig, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer(data.separator, add_special_tokens=False)["input_ids"] if data.separator else []
    if data.separator and not 0 < len(ids) <= data.max_length // 4:
        raise ConfigError(
            f"data.separator = {data.separator!r} has {len(ids)} tokens; it must have at least one, and at most a "
            f"quarter of data.max_length = {data.max_length}"
        )
    return ids or [tokenizer.eos_token_id]


def _without_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Drop the end-of-text token that some tokenizers add by themselves."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


class DataToText(CausalTask[Pairs]):
    """Outcomes are the sum of the losses of the tokens of a text, and how many these are: (examples, 2) float64.

    ``pst-ds eval`` and ``verify`` also have texts written, and score them.
    """

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, "'data-to-text', which ends texts with it", pads=self.pads)
        positions = positions_of(config)
        if 0 < positions <= self.evaluation.max_new_tokens + 1:
            raise ConfigError(
                f"eval.max_new_tokens = {self.evaluation.max_new_tokens} leaves no room for data in the {positions} "
                "positions of the model (max_position_embeddings); lower it"
            )

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Pairs:
        return load_pairs(data, split, tokenizer)

    def collate(self, examples: Pairs, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        return collate_pairs(examples, indices, tokenizer)

    def num_targets(self, examples: Pairs, indices: Sequence[int]) -> int:
        return sum(examples.num_targets(i) for i in indices)

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        predicted = (batch["labels"] != IGNORED).sum(1).tolist()
        sums = super().outcomes(logits, batch)[:, 0]
        return np.array([*zip(sums, predicted, strict=True)], dtype=np.float64)

    def metrics(self, outcomes: np.ndarray, examples: Pairs) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], int(outcomes[:, 1].sum()))

    def write(self, model: Any, examples: Pairs, tokenizer: Tokenizer, batch_size: int, device: str) -> list[str]:
        """Return what a whole ``model`` of transformers writes for each distinct piece of data."""
        positions = positions_of(model.config)
        room = positions - self.evaluation.max_new_tokens if positions else examples.max_length
        return generation.write_texts(model, examples.prompts(room), tokenizer, self.evaluation, batch_size, device)

    def text_metrics(self, written: Sequence[str], examples: Pairs) -> dict[str, float]:
        """Return BLEU, ROUGE-L and chrF of the texts that :meth:`write` returned."""
        return text_metrics(written, examples.references)


TASK = DataToText
