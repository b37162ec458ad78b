"""Common parts of tasks that score a language model on the tokens of an answer, and on generated answers."""

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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer


class AnsweredExamples(ExampleSet, Protocol):
    """Examples that consist of a prompt and an answer."""

    @property
    def references(self) -> list[list[str]]:
        """Correct answers for each prompt."""
        ...

    @property
    def max_length(self) -> int: ...

    def row(self, example: int) -> tuple[list[int], list[int]]:
        """Return the tokens of one example, and its labels: -100 except for the answer."""
        ...

    def prompts(self, most: int) -> list[list[int]]:
        """Return the tokens of each prompt, at most ``most``."""
        ...


A = TypeVar("A", bound=AnsweredExamples)


class AnswerTask(CausalTask[A]):
    """Outcomes are the sum of the losses of an answer's tokens, and their number: (examples, 2) float64. ``pst-ds
    eval`` and ``verify`` also generate answers and score them."""

    ends_with = ""
    """Name of the task, and its use of the end-of-text token."""

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, self.ends_with, pads=self.pads)
        positions = positions_of(config)
        if 0 < positions <= self.evaluation.max_new_tokens + 1:
            raise ConfigError(
                f"eval.max_new_tokens = {self.evaluation.max_new_tokens} leaves no room for data in the {positions} "
                "positions of the model (max_position_embeddings). Lower it"
            )

    def num_targets(self, examples: A, indices: Sequence[int]) -> int:
        num_targets = 0
        for index in indices:
            _, labels = examples.row(index)
            # the first token has no token before it that predicts it
            num_targets += len(labels[1:]) - labels[1:].count(IGNORED)
        return num_targets

    def collate(self, examples: A, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        return padded([examples.row(i) for i in indices], tokenizer)

    def outcomes_of_sums(self, sums: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        num_predicted = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return np.stack([sums, num_predicted.cpu().numpy()], axis=1).astype(np.float64)

    def metrics(self, outcomes: np.ndarray, examples: A) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], int(outcomes[:, 1].sum()))

    def write(self, model: Any, examples: A, tokenizer: Tokenizer, batch_size: int, device: str) -> list[str]:
        """Return the text that a plain transformers ``model`` generates after each prompt."""
        # without a limit of the model, prompts are as long as in training
        most_of_prompt = examples.max_length
        positions = positions_of(model.config)
        if positions:
            most_of_prompt = positions - self.evaluation.max_new_tokens
        return generation.write_texts(
            model,
            prompts=examples.prompts(most_of_prompt),
            tokenizer=tokenizer,
            settings=self.evaluation,
            batch_size=batch_size,
            device=device,
            ends=self.ends_of(examples),
        )

    def ends_of(self, examples: A) -> Sequence[int]:
        """Return the tokens, apart from the end-of-text token, that end an answer."""
        return ()

    def text_metrics(self, written: Sequence[str], examples: A) -> dict[str, float]:
        """Return BLEU, ROUGE and chrF of texts from :meth:`write`."""
        return generation.text_metrics(written, examples.references)


def padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return model inputs of (tokens, labels), padded on the right to the longest: all (len(rows), length) int64."""
    length = max(len(tokens) for tokens, _ in rows)
    padding = tokenizer.pad_token_id
    if padding is None:
        # any token will do: padding is neither attended to nor predicted
        padding = tokenizer.eos_token_id
    input_ids: list[list[int]] = []
    attention_mask: list[list[int]] = []
    labels: list[list[int]] = []
    for tokens_of_row, labels_of_row in rows:
        num_padding = length - len(tokens_of_row)
        input_ids.append([*tokens_of_row, *[padding] * num_padding])
        attention_mask.append([1] * len(tokens_of_row) + [0] * num_padding)
        labels.append([*labels_of_row, *[IGNORED] * num_padding])
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(attention_mask),
        "labels": torch.tensor(labels),
    }
