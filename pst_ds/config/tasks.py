"""The tasks of a run file: facts about each that need no torch. Their code is in pst_ds/data/tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pst_ds.config.checks import ConfigError
from pst_ds.config.data import DataConfig, EvalConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFacts:
    """Facts about a task for the run file and ``pst-ds init``."""

    metrics: tuple[str, ...]
    """Those that may choose the best checkpoint; the first does by default."""
    loss: str = "loss"
    """The metric that training minimises."""
    eval_batch_size: int = 64
    max_text_columns: int = 2
    min_length: int = 1
    """Smallest ``data.max_length``."""
    has_labels: bool = True
    """A row has a label column."""
    packs_text: bool = False
    """Examples are cut from one stream of text, ``data.max_length`` tokens each."""
    writes_texts: bool = False
    """``pst-ds eval`` and ``verify`` have the model write texts."""
    predicts_tokens: bool = False
    """Logits are those of every token, not of every example."""
    no_teacher: str = ""
    """Why its predictions cannot be compared with a teacher's; empty if they can."""
    init_max_length: int = 128
    init_epochs: float = 3.0
    init_sparsity: float = 0.9
    """Where the pattern does not say it. Language models lose too much at 0.9: docs/background/results.md."""
    suggested_by: Callable[[str | None], bool] = lambda label_type: False
    """True where ``pst-ds init`` proposes it for a label column of this Arrow type, or for None, no such column. The
    first such task is taken."""


TASKS: dict[str, TaskFacts] = {
    "classification": TaskFacts(
        metrics=("accuracy", "macro_f1", "matthews_correlation", "f1"),
        suggested_by=lambda label_type: label_type is not None and not label_type.startswith("float"),
    ),
    "regression": TaskFacts(
        metrics=("pearson", "spearman", "mse", "rmse", "mae"),
        loss="mse",
        no_teacher="predicts a number",
        suggested_by=lambda label_type: (label_type or "").startswith("float"),
    ),
    "causal-lm": TaskFacts(
        metrics=("perplexity",), eval_batch_size=8, max_text_columns=1, min_length=2, packs_text=True, has_labels=False,
        predicts_tokens=True, init_max_length=512, init_epochs=1.0, init_sparsity=0.5,
        suggested_by=lambda label_type: label_type is None,
    ),
    "data-to-text": TaskFacts(
        metrics=("perplexity",), eval_batch_size=8, max_text_columns=1, min_length=4, writes_texts=True,
        predicts_tokens=True, init_max_length=256, init_sparsity=0.5,
    ),
    "chat": TaskFacts(
        metrics=("perplexity",), eval_batch_size=8, min_length=4, has_labels=False, writes_texts=True,
        predicts_tokens=True, init_max_length=1024, init_epochs=2.0, init_sparsity=0.5,
    ),
}  # fmt: skip


def check_task(task: str, data: DataConfig, evaluation: EvalConfig, num_steps: int) -> None:
    """Raise ConfigError for settings that do not fit the task; ``num_steps`` is 0 for a run of some epochs."""
    facts = TASKS[task]
    if evaluation.metric and evaluation.metric not in facts.metrics:
        raise ConfigError(
            f"eval.metric = {evaluation.metric!r} is not a metric of task {task!r}; choose from "
            f"{', '.join(map(repr, facts.metrics))}, or leave it out"
        )
    if len(data.text_columns) > facts.max_text_columns:
        raise ConfigError(f"data.text_columns = {list(data.text_columns)} must name one column for task {task!r}")
    if data.sources and not facts.packs_text:
        mixing = ", ".join(repr(name) for name, other in TASKS.items() if other.packs_text)
        raise ConfigError(f"data.sources are for task {mixing}, not for {task!r}; name its text with data.train")
    if data.streams and not num_steps:
        raise ConfigError(
            f"train.num_epochs is set, and data.sources has a stream ({data.streams[0].path!r}), whose length is not "
            "known; set train.num_steps instead"
        )
    if data.max_length < facts.min_length:
        raise ConfigError(f"data.max_length = {data.max_length} must be at least {facts.min_length} for task {task!r}")
