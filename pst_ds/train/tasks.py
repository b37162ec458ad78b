"""What a run is trained to do: everything in which one task differs from another, chosen once by its name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pst_ds.train import data as texts
from pst_ds.train import packing
from pst_ds.train.config import ConfigError, DataConfig, RunConfig, TaskName


class ExampleSet(Protocol):
    """The examples of one split."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        ...

    @property
    def digest(self) -> str:
        """A SHA-256 of all that a model reads of them."""
        ...

    def first(self, count: int) -> Any:
        """The first ``count`` of them."""
        ...


class Task(Protocol):
    """Reading, batching, the model's class and scoring. Example sets go back only to the task that loaded them."""

    unit: str
    """What its examples are called."""
    pads: bool
    """Whether examples of different length go into one batch; the tokenizer and the model then have a padding token."""
    new_head: bool
    """Whether the model may have weights that the pretrained one lacks; they are drawn anew."""
    lower_is_better: bool
    """Of its metrics."""

    def model_class(self) -> Any:
        """The ``Auto`` class of transformers that builds its model."""
        ...

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        """Raise ConfigError when the model of a transformers ``config`` cannot do the task."""
        ...

    def label_names(self, data: DataConfig) -> list[str]:
        """Names of the classes, in the order of their ids; none if the task has no classes."""
        ...

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """What the transformers config is told beside the pretrained model's own."""
        ...

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> Any:
        """The examples of a split. Raises ConfigError."""
        ...

    def collate(self, examples: Any, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """Model inputs of some examples, with their ``labels``: the model's loss is the mean over them."""
        ...

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        """What the metrics need of each example of a batch: (examples, k)."""
        ...

    def metrics(self, outcomes: np.ndarray, examples: Any) -> dict[str, float]:
        """Metrics of all examples, from their outcomes in the order of ``examples``."""
        ...


class Classification:
    """One of several classes for a text or a pair of texts; outcomes are logits, (examples, classes) fp32."""

    unit = "examples"
    pads = True
    new_head = True
    lower_is_better = False

    def model_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        pass

    def label_names(self, data: DataConfig) -> list[str]:
        return texts.label_names(data)

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        ids = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": ids, "label2id": {label: i for i, label in ids.items()}}

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> texts.Examples:
        return texts.load_examples(data, split, tokenizer, labels)

    def collate(self, examples: texts.Examples, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        return texts.collate(examples, indices, tokenizer)

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        return logits.float().cpu().numpy()

    def metrics(self, outcomes: np.ndarray, examples: texts.Examples) -> dict[str, float]:
        return classification_metrics(outcomes, examples.labels)


class CausalLM:
    """The next token of text; outcomes are the sums of the token losses of each sequence, (sequences, 1) float64."""

    unit = "sequences"
    pads = False
    new_head = False
    lower_is_better = True

    def model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token (eos_token), which task 'causal-lm' puts between documents; "
                "name the language model's own tokenizer with model.tokenizer"
            )
        _refuse_encoder(config)
        vocabulary = config.get_text_config().vocab_size
        if max(tokenizer.vocab_size, tokenizer.eos_token_id + 1) > vocabulary:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the end-of-text token {tokenizer.eos_token_id}, the "
                f"model only {vocabulary} (vocab_size); name the model's own tokenizer with model.tokenizer"
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
        if 0 < positions < data.max_length:
            raise ConfigError(
                f"data.max_length = {data.max_length} is more than the {positions} positions of the model "
                f"(max_position_embeddings); set it to at most {positions}"
            )

    def label_names(self, data: DataConfig) -> list[str]:
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> packing.Sequences:
        return packing.load_sequences(data, split, tokenizer)

    def collate(self, examples: packing.Sequences, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        return packing.collate_sequences(examples, indices)

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        return np.array([[_loss_sum(of, ids)] for of, ids in zip(logits, batch["labels"], strict=True)])

    def metrics(self, outcomes: np.ndarray, examples: packing.Sequences) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], sum(examples.lengths) - len(examples))


def task_of(run: RunConfig) -> Task:
    """The task of a run."""
    return _TASKS[run.task]


_TASKS: dict[TaskName, Task] = {"classification": Classification(), "causal-lm": CausalLM()}


def classification_metrics(logits: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Accuracy, macro-averaged F1 and Matthews' correlation, as scikit-learn computes them."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def language_model_metrics(loss_sums: np.ndarray, num_predicted: int) -> dict[str, float]:
    """Mean loss of a predicted token (nats) and perplexity, its exponential.

    ``loss_sums`` is (sequences,) float64; its sum is correctly rounded, so it does not depend on an order.
    """
    loss = math.fsum(loss_sums.tolist()) / num_predicted
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700.0 else math.inf}


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    """Sum of the losses of all tokens of one sequence but its first.

    ``logits`` (length, vocabulary), ``ids`` (length,): one sequence at a time, for its fp32 logits may be large.
    """
    losses = cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    return float(losses.sum(dtype=torch.float64))


def _refuse_encoder(config: Any) -> None:
    """BERT and its like have a causal class in transformers, which looks both ways unless the config says otherwise."""
    from transformers.models.auto import modeling_auto as known

    both_ways = config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and not getattr(config, "is_decoder", True):
        raise ConfigError(
            f"the model is a {config.model_type} whose config says is_decoder = false: it sees the tokens that task "
            "'causal-lm' has it predict. Name a causal language model (GPT-2, Llama, Qwen, ...)"
        )
