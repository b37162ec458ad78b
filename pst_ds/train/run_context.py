"""A resolved run with the ranks, DeepSpeed config and device on which it is computed."""

import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pst_ds.config.run import RunConfig
from pst_ds.data.tasks import ExampleSet, Task
from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import all_gather_objects
from pst_ds.train.resolved import ResolvedRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunContext:
    """A resolved run with its place: what all parts of a run use, equal on all ranks except ``launch``."""

    resolved: ResolvedRun
    launch: LaunchEnvironment
    ds_config: JsonObject | None
    """Resolved DeepSpeed config; None for one process without DeepSpeed."""
    device: str
    copy_ranks: int = 0
    """Ranks that share a second copy of frozen weights, see :func:`~pst_ds.parallel.placement.copy_ranks`."""
    remark: str = ""
    """Remark on the lack of such copies."""

    @property
    def run(self) -> RunConfig:
        """The checked config."""
        return self.resolved.run

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        return self.resolved.labels

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The run's tokenizer."""
        return self.resolved.require_tokenizer()

    @property
    def task(self) -> Task:
        """The run's task."""
        return self.resolved.task

    @property
    def width(self) -> int:
        """Hidden size of the model."""
        return self.resolved.shapes.width

    def load(self, split: str) -> ExampleSet:
        """Load the examples of a split. Raises ConfigError."""
        return self.resolved.load(split)

    def with_run(self, run: RunConfig) -> "RunContext":
        """Return the context for another config of the same model, see :meth:`ResolvedRun.with_run`."""
        return replace(self, resolved=self.resolved.with_run(run))

    def with_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> "RunContext":
        """Return the context with a tokenizer of fewer tokens."""
        return replace(self, resolved=self.resolved.with_tokenizer(tokenizer))

    def with_rates(self, examples: ExampleSet) -> "RunContext":
        """Return the context with all learning rates resolved to numbers, for training on ``examples``."""
        # default rates depend on the model's width and on how long it trains
        num_examples = len(examples)
        run = self.run.with_rates(
            width=self.width,
            num_steps=self.run.num_steps(num_examples),
            num_examples=num_examples,
            num_labels=self.task.num_labels(examples),
        )
        return self.with_run(run)


def require_same_data(digest: str, what: str) -> None:
    """Raise InputError on all ranks unless they have data of the same ``digest``. Collective. ``what``: its name."""
    of_ranks = all_gather_objects((digest, socket.gethostname()))
    main_digest, main_host = of_ranks[0]
    # every rank compares all of them, so all ranks raise the same error
    for rank, (other_digest, host) in enumerate(of_ranks):
        if other_digest != main_digest:
            raise InputError(
                f"{what} differs between rank 0 ({main_host}) and rank {rank} ({host}). Give every host the same file"
            )
