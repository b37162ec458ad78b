"""The table of tasks: properties of each that need no torch. The code of a task is in pst_ds/data/tasks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pst_ds.config.data import DataConfig, EvalConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFacts:
    """Properties of a task, for the run file and ``pst-ds init``."""

    metrics: tuple[str, ...]
    """Metrics that may choose the best checkpoint; the first is the default."""
    loss: str = "loss"
    """Metric that training minimises."""
    eval_batch_size: int = 64
    """Default examples per rank and evaluation batch."""
    max_text_columns: int = 2
    """Maximum number of ``data.text_columns``."""
    min_length: int = 1
    """Minimum ``data.max_length``."""
    has_labels: bool = True
    """True if rows have a label column."""
    packs_text: bool = False
    """True if examples are sequences of ``data.max_length`` tokens, cut from joined documents."""
    writes_texts: bool = False
    """True if ``pst-ds eval`` and ``verify`` generate text."""
    predicts_tokens: bool = False
    """True if there are logits for every token, not for every example."""
    no_teacher: str = ""
    """Why distillation cannot compare its predictions; empty if it can."""
    init_max_length: int = 128
    """``data.max_length`` that ``pst-ds init`` writes."""
    init_epochs: float = 3.0
    """``train.num_epochs`` that ``pst-ds init`` writes."""
    init_sparsity: float = 0.9
    """Sparsity that ``pst-ds init`` writes, unless the pattern fixes it. Language models lose too much accuracy at 0.9:
    docs/background/results.md."""
    # `pst-ds init` shows its choice and lets the user change it, so a guess from one column's type is enough.
    suggested_by: Callable[[str | None], bool] = lambda label_type: False
    """Test whether ``pst-ds init`` suggests the task for this Arrow type of the labels, None for no label column. The
    first such task is suggested."""


TASKS: dict[str, TaskFacts] = {
    "classification": TaskFacts(
        # Whole numbers and strings are classes. Grades from 1 to 5 may be either; the user decides.
        metrics=("accuracy", "macro_f1", "matthews_correlation", "f1"),
        suggested_by=lambda label_type: label_type is not None and not label_type.startswith("float"),
    ),
    "regression": TaskFacts(
        metrics=("pearson", "spearman", "mse", "rmse", "mae"),
        loss="mse",  # the squared error itself, not a likelihood
        no_teacher="predicts a number",
        suggested_by=lambda label_type: (label_type or "").startswith("float"),
    ),
    "causal-lm": TaskFacts(
        # Of two tokens, the second is predicted from the first; logits of a large vocabulary limit the batch.
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


def task_conflicts(task: str, data: DataConfig, evaluation: EvalConfig) -> Iterator[str]:
    """Yield a message for each setting that does not fit the task."""
    facts = TASKS[task]
    if evaluation.metric and evaluation.metric not in facts.metrics:
        yield (
            f"eval.metric = {evaluation.metric!r} is not a metric of task {task!r}; choose from "
            f"{', '.join(map(repr, facts.metrics))}, or remove it"
        )
    if len(data.text_columns) > facts.max_text_columns:
        yield f"data.text_columns = {list(data.text_columns)} must name one column for task {task!r}"
    if data.sources and not facts.packs_text:
        mixing = ", ".join(repr(name) for name, other in TASKS.items() if other.packs_text)
        yield f"data.sources are for task {mixing}, not for {task!r}. Name the training data with data.train"
    if data.max_length < facts.min_length:
        yield f"data.max_length = {data.max_length} must be at least {facts.min_length} for task {task!r}"
