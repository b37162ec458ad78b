"""Interface of a task: read examples, make batches, name the model class, and compute metrics."""

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
"""Label of tokens that are not predicted, as in torch's cross-entropy."""


class ExampleSet(Protocol):
    """The examples of one split."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int] | np.ndarray:
        """Tokens of each example. An array may be a broadcast view."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of everything that the model reads."""
        ...

    def first(self, count: int) -> Self:
        """Return the first ``count`` examples."""
        ...


E = TypeVar("E", bound=ExampleSet)


class Task(ABC, Generic[E]):
    """Everything that differs between tasks. A task only gets examples that it loaded itself."""

    unit = "examples"
    """Name of the examples in messages."""
    pads = True
    """True if a batch may have examples of different lengths; the tokenizer and the model then need a padding token."""
    new_head = True
    """True if the model may have weights that the pretrained one lacks; they are initialised at random."""
    lower_is_better = False
    """True if the best checkpoint has the lowest metric."""

    def __init__(self, evaluation: EvalConfig):
        """``evaluation`` names the metric that chooses the best checkpoint."""
        self.evaluation = evaluation

    @abstractmethod
    def model_class(self) -> type[_BaseAutoModelClass]:
        """Return the ``Auto`` class of transformers that builds the model."""

    @abstractmethod
    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        """Raise ConfigError if the model of ``config`` cannot do the task. Without a tokenizer, skip its checks."""

    def label_names(self, data: DataConfig) -> list[str]:
        """Return the class names by id; an empty list for a task without classes."""
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, object]:
        """Return settings that override the pretrained model's transformers config."""
        return {}

    @abstractmethod
    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> E:
        """Return the examples of a split. Raises ConfigError."""

    @abstractmethod
    def collate(self, examples: E, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Return model inputs of some examples, with their ``labels``: the model's loss is the mean over them."""

    def num_targets(self, examples: E, indices: Sequence[int]) -> int:
        """Return the number of values in that mean, up to a factor that is the same for all examples."""
        return len(indices)

    def batches(self, examples: E, batch_size: int, seed: int, *, group_by_length: bool = False) -> GlobalBatches:
        """Return the examples of each batch of a run."""
        return GlobalBatches(examples.lengths, batch_size, seed, group_by_length)

    def sample(self, examples: E, count: int, seed: str | int) -> tuple[ExampleSet, list[int]]:
        """Draw ``count`` of ``examples`` without repetition; return a set and indices in it, equal on every rank."""
        # a generator for this call only: ranks have drawn different numbers from the global one
        return examples, random.Random(seed).sample(range(len(examples)), count)

    def remark(self, data: DataConfig, examples: E) -> str:
        """Return a warning about the training examples, as a sentence without a full stop, or ""."""
        return ""

    def num_labels(self, examples: E) -> int:
        """Return the number of different labels; 0 without labels."""
        return 0

    def label_scale(self, examples: E) -> tuple[float, float] | None:
        """Return the mean and standard deviation of numeric labels, by which a new head is scaled; else None."""
        return None

    @abstractmethod
    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        """Return the values per example that the metrics need: (examples, k)."""

    @abstractmethod
    def metrics(self, outcomes: np.ndarray, examples: E) -> dict[str, float]:
        """Return the metrics of all examples, from their outcomes in the order of ``examples``."""
