"""A run that was read and checked: its config with task, labels, tokenizer, DeepSpeed config and device."""

import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pst_ds.config.run import RunConfig
from pst_ds.data.tasks import ExampleSet, Task, task_of
from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import all_gather_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunContext:
    """Facts that all parts of a run use, known before its model is built; equal on all ranks, except ``launch``."""

    run: RunConfig
    launch: LaunchEnvironment
    labels: list[str]
    """Names of the classes, in the order of their ids."""
    tokenizer: "PreTrainedTokenizerBase"
    ds_config: JsonObject | None
    """Resolved DeepSpeed config; None for one process without DeepSpeed."""
    device: str
    width: int = 1
    """Hidden size of the model."""
    frozen_bytes: int = 0
    """Bytes of frozen weights and masks, without experts that ranks divide."""
    copy_ranks: int = 0
    """Ranks that share a second copy of them, see :func:`~pst_ds.parallel.placement.copy_ranks`."""
    remark: str = ""
    """Remark on the lack of such copies."""

    @property
    def task(self) -> Task:
        """The run's task."""
        return task_of(self.run)

    def load(self, split: str) -> ExampleSet:
        """Load the examples of a split. Raises ConfigError."""
        return self.task.load(self.run.data, split, self.tokenizer, self.labels)

    def with_rates(self, examples: ExampleSet) -> "RunContext":
        """Return the context with all learning rates resolved to numbers, for training on ``examples``."""
        number, num_labels = len(examples), self.task.num_labels(examples)
        run = self.run.with_rates(
            width=self.width, num_steps=self.run.num_steps(number), num_examples=number, num_labels=num_labels
        )
        return replace(self, run=run)


def require_same_data(digest: str, what: str) -> None:
    """Raise InputError on all ranks unless they have data of the same ``digest``. Collective. ``what``: its name."""
    every = all_gather_objects((digest, socket.gethostname()))
    for number, (other, host) in enumerate(every):
        if other != every[0][0]:
            raise InputError(
                f"{what} differs between rank 0 ({every[0][1]}) and rank {number} ({host}). Give every host the same "
                "file"
            )
