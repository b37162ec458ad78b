"""The interface of a task: read examples, make batches of them, name the model's class, and score."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.data.labelled import GlobalBatches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross-entropy."""


class ExampleSet(Protocol):
    """The examples of one split."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int] | np.ndarray:
        """Tokens of each; an array may be a view that holds nothing."""
        ...

    @property
    def digest(self) -> str:
        """A SHA-256 of all that a model reads of them."""
        ...

    def first(self, count: int) -> Self:
        """Return the first ``count`` of them."""
        ...


E = TypeVar("E", bound=ExampleSet)


class Reader(Protocol):
    """Draws examples that cannot be looked up, in the order in which they come."""

    @property
    def places(self) -> list[list[int]]:
        """Where another reader has to go on to give what this one would give next; JSON values."""
        ...

    def take(self, indices: Sequence[int]) -> ExampleSet:
        """Return the examples whose turns these are. Raises InputError."""
        ...


class Task(ABC, Generic[E]):
    """Everything in which one task differs from another. Examples go back only to the task that loaded them."""

    unit = "examples"
    """The word for its examples in messages."""
    pads = True
    """Examples of different length go into one batch; the tokenizer and the model then have a padding token."""
    new_head = True
    """The model may have weights that the pretrained one lacks; they are initialised at random."""
    lower_is_better = False
    """The lowest value of the metric is the best checkpoint's."""

    def __init__(self, evaluation: EvalConfig):
        """``evaluation`` names the metric that chooses the best checkpoint."""
        self.evaluation = evaluation

    @abstractmethod
    def model_class(self) -> type[_BaseAutoModelClass]:
        """Return the ``Auto`` class of transformers that builds its model."""

    @abstractmethod
    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        """Raise ConfigError when the model of a transformers ``config`` cannot do the task; without a ``tokenizer`` its
        vocabulary may be any."""

    def label_names(self, data: DataConfig) -> list[str]:
        """Return the names of the classes in the order of their ids; none for a task without classes."""
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, object]:
        """Return what overrides the pretrained model's own transformers config."""
        return {}

    @abstractmethod
    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> E:
        """Return the examples of a split. Raises ConfigError."""

    @abstractmethod
    def collate(self, examples: E, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Return model inputs of some examples, with their ``labels``: the model's loss is the mean over them."""

    def num_targets(self, examples: E, indices: Sequence[int]) -> int:
        """Return how many values that mean is over, up to a factor that all examples have in common."""
        return len(indices)

    def batches(self, examples: E, batch_size: int, seed: int, *, group_by_length: bool = False) -> GlobalBatches:
        """Return which examples make each batch of a run."""
        return GlobalBatches(examples.lengths, batch_size, seed, group_by_length)

    def has_streams(self, examples: E) -> bool:
        """Return whether some ``examples`` can only be drawn by a :meth:`reader`."""
        return False

    def reader(self, examples: E, seed: int, part: int, parts: int, places: Sequence[Sequence[int]]) -> Reader | None:
        """Return what draws the examples of one of ``parts`` readers from ``places`` on, or from the beginning without
        any; None where they are looked up by their index."""
        return None

    def sample(self, examples: E, count: int, seed: str | int) -> tuple[ExampleSet, list[int]]:
        """Return ``count`` of ``examples``, drawn without repetition, as indices of the set that is returned. The same
        on every rank."""
        return examples, random.Random(seed).sample(range(len(examples)), count)

    def require_enough(self, examples: E, count: int) -> None:
        """Raise ConfigError if a run may not take ``count`` examples, repeated as they are."""

    def remark(self, data: DataConfig, examples: E) -> str:
        """Return what a user should know of the ``examples`` to train on, as a sentence without a full stop; "" for
        nothing."""
        return ""

    def constant_loss(self, examples: E) -> float | None:
        """Return the least loss of an answer that is the same for all ``examples``; None if it is not known."""
        return None

    def num_labels(self, examples: E) -> int:
        """Return how many different labels the ``examples`` have; 0 if they have none."""
        return 0

    def label_scale(self, examples: E) -> tuple[float, float] | None:
        """Return the mean and the standard deviation of labels that are numbers, in which a new head begins and trains;
        None for other labels."""
        return None

    @abstractmethod
    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        """Return what the metrics need of each example of a batch: (examples, k)."""

    @abstractmethod
    def metrics(self, outcomes: np.ndarray, examples: E) -> dict[str, float]:
        """Return the metrics of all examples, from their outcomes in the order of ``examples``."""

    def resampled_metrics(self, outcomes: np.ndarray, examples: E, draw: np.ndarray) -> dict[str, float]:
        """Return the metrics of as many examples, drawn with repetition: ``draw`` holds their indices. This one is for
        tasks that need nothing of each example but its outcome."""
        return self.metrics(outcomes[draw], examples)
