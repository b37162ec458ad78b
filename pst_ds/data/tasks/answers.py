"""What tasks have in common whose model is scored on the tokens of an answer, and writes answers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data import generation
from pst_ds.data.model_limits import check_causal_model, positions_of
from pst_ds.data.tasks.causal_lm import CausalTask, language_model_metrics
from pst_ds.data.tasks.task import IGNORED, ExampleSet
from pst_ds.data.text_metrics import text_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer


class AnsweredExamples(ExampleSet, Protocol):
    """Examples of which a part is the answer."""

    @property
    def references(self) -> list[list[str]]:
        """The answers that are right, for each prompt."""
        ...

    @property
    def max_length(self) -> int: ...

    def num_targets(self, example: int) -> int:
        """Count the tokens of one example that are predicted."""
        ...

    def prompts(self, most: int) -> list[list[int]]:
        """Return the tokens, at most ``most``, that each answer is written after."""
        ...


A = TypeVar("A", bound=AnsweredExamples)


class AnswerTask(CausalTask[A]):
    """Outcomes are the sum of the losses of the tokens of an answer, and how many these are: (examples, 2) float64.

    ``pst-ds eval`` and ``verify`` also have answers written, and score them.
    """

    ends_with = ""
    """The task's name, and what it needs the end-of-text token for."""

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, self.ends_with, pads=self.pads)
        positions = positions_of(config)
        if 0 < positions <= self.evaluation.max_new_tokens + 1:
            raise ConfigError(
                f"eval.max_new_tokens = {self.evaluation.max_new_tokens} leaves no room for data in the {positions} "
                "positions of the model (max_position_embeddings); lower it"
            )

    def num_targets(self, examples: A, indices: Sequence[int]) -> int:
        return sum(examples.num_targets(i) for i in indices)

    def outcomes_of_sums(self, sums: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        predicted = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        return np.array([*zip(sums, predicted, strict=True)], dtype=np.float64)

    def metrics(self, outcomes: np.ndarray, examples: A) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], int(outcomes[:, 1].sum()))

    def write(self, model: Any, examples: A, tokenizer: Tokenizer, batch_size: int, device: str) -> list[str]:
        """Return what a whole ``model`` of transformers writes after each prompt."""
        positions = positions_of(model.config)
        room = positions - self.evaluation.max_new_tokens if positions else examples.max_length
        prompts, ends = examples.prompts(room), self.ends_of(examples)
        return generation.write_texts(model, prompts, tokenizer, self.evaluation, batch_size, device, ends)

    def ends_of(self, examples: A) -> Sequence[int]:
        """Return tokens besides the end-of-text token that an answer ends with."""
        return ()

    def text_metrics(self, written: Sequence[str], examples: A) -> dict[str, float]:
        """Return BLEU, ROUGE-L and chrF of the texts that :meth:`write` returned."""
        return text_metrics(written, examples.references)


def padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return model inputs of (tokens, labels), padded on the right to the longest: all (len(rows), length) int64."""
    length = max(len(tokens) for tokens, _ in rows)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, labels in rows:
        more = length - len(tokens)
        batch["input_ids"].append([*tokens, *[padding] * more])
        batch["attention_mask"].append([1] * len(tokens) + [0] * more)
        batch["labels"].append([*labels, *[IGNORED] * more])
    return {name: torch.tensor(values) for name, values in batch.items()}
