"""The part of a run file that the flags and the columns of the training file decide, before the model is known."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pst_ds.config.methods import METHODS
from pst_ds.config.run import DataConfig
from pst_ds.config.targets import TARGETS
from pst_ds.config.tasks import TASKS, TaskFacts
from pst_ds.config.toml import run_from_table
from pst_ds.core.patterns import parse_pattern
from pst_ds.data.dataset import column_types, file_and_slice, read_rows
from pst_ds.data.model_limits import is_causal
from pst_ds.data.plain_text import proposed_sample_by
from pst_ds.errors import InputError
from pst_ds.planning.dense_start import HIGH_SPARSITY
from pst_ds.train.resolved import load_model_config

Settings: TypeAlias = dict[str, Any]
"""Settings, or tables of settings, by name."""
NO_VALIDATION = "none"
"""Value of ``--validation`` for a run without validation data."""
_GUESSED_TEXTS = (
    ["text"],
    ["sentence"],
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question1", "question2"],
)
"""Names of text columns, or of pairs, in public data sets: the first whose columns all exist."""
_GUESSED_CONVERSATIONS = (["messages"], ["conversations"], ["prompt", "completion"])
_TEXT_TYPES = ("string", "large_string")
"""Arrow types of text; Parquet files by polars have the second one."""


def first_table(args: argparse.Namespace, deepspeed_file: Path | None) -> Settings:
    """Return the settings that do not depend on the model, in the order of the file, without uninformative defaults.

    Raises InputError.
    """
    rows = read_rows(DataConfig(train=args.train), "train", {})
    features = column_types(rows, args.train)
    if args.label_column and args.label_column not in features:
        where = f"--label-column {args.label_column!r} is not in {args.train}"
        raise InputError(f"{where}. Name one of the columns: {', '.join(features)}")
    label_column = args.label_column or "label"
    conversations = _first_existing(_GUESSED_CONVERSATIONS, features)
    task = args.task or _proposed_task(features, label_column, has_conversations=bool(conversations))
    if TASKS[task].packs_text and not args.task:
        _require_labels_or_causal(args, features)
    method = method_of(args)
    table: Settings = {"output_dir": args.output_dir or f"runs/{Path(args.out).stem}", "task": task, "method": method}
    if deepspeed_file:
        table["deepspeed_config"] = str(deepspeed_file)
    text_columns = args.text_columns
    if not text_columns and task == "chat":
        text_columns = conversations
    if not text_columns:
        text_columns = _text_columns(features, label_column, task, args.train)
    table["model"] = {"path": args.model}
    table["data"] = _data_section(args, TASKS[task], text_columns, label_column)
    table["train"] = {**_requested_length(args, TASKS[task]), "precision": "bf16"}
    if METHODS[method].masks != "none":
        pattern, _ = proposed_pattern(args, task)
        table["pst"] = {"target_modules": "all-linear", "pattern": pattern}
        if args.exclude_modules:
            table["pst"]["exclude_modules"] = args.exclude_modules
        table["schedule"] = {"final_sparsity": _sparsity(args, TASKS[task])}
    return table


def _proposed_task(features: dict[str, str], label_column: str, *, has_conversations: bool) -> str:
    """Return the task that the columns of the training file suggest."""
    # before the labels: conversations may come with a label column, such as a rating
    if has_conversations:
        return "chat"
    label_type = features.get(label_column)
    # never without a result: without labels causal-lm is suggested, and a task of labels for every type
    return next(name for name, facts in TASKS.items() if facts.suggested_by(label_type))


def _data_section(args: argparse.Namespace, facts: TaskFacts, text_columns: list[str], label_column: str) -> Settings:
    """Return ``[data]`` without ``max_length``, unless the user gave it."""
    data: Settings = {"train": args.train}
    if args.validation and args.validation != NO_VALIDATION:
        data["validation"] = args.validation
    if args.test and args.test != NO_VALIDATION:
        data["test"] = args.test
    data["text_columns"] = text_columns
    if facts.has_labels:
        data["label_column"] = label_column
    file, _ = file_and_slice(args.train)
    plain = Path(file)
    # other formats have a row per document
    if facts.packs_text and plain.suffix.lower() == ".txt":
        sample_by = proposed_sample_by(plain)
        if sample_by != "line":
            data["sample_by"] = sample_by
        if sample_by == "paragraph":
            # paragraphs of a long text continue each other, so that a token attends to those before it
            data["document_mask"] = False
    if args.max_length:
        data["max_length"] = args.max_length
    return data


def _requested_length(args: argparse.Namespace, facts: TaskFacts) -> Settings:
    """Return the number of steps or epochs that the user gave, or the task's usual epochs."""
    if args.steps:
        return {"num_steps": args.steps}
    # "is None", because 0 epochs are refused with another message
    epochs = facts.init_epochs if args.epochs is None else args.epochs
    return {"num_epochs": epochs}


def method_of(args: argparse.Namespace) -> str:
    """Return the requested method, or the one for a sparse or a smaller dense model."""
    if args.method:
        return str(args.method)
    # a smaller model is dense, unless a sparsity is given too
    is_dense = is_cut(args) and args.sparsity is None
    return "lora" if is_dense else "pst"


def proposed_pattern(args: argparse.Namespace, task: str) -> tuple[str, str]:
    """Return the requested pattern, or the best for ``args.target`` and the reason (docs/background/results.md).

    The reason is empty for a requested pattern and for targets without a recommendation.
    """
    if args.pattern:
        return args.pattern, ""
    if args.target != "cpu":
        return "matrix", ""
    if not TASKS[task].has_labels:
        return "matrix", "decoders on CPUs are as fast with unstructured sparsity as with blocks"
    if method_of(args) == "pst" and _sparsity(args, TASKS[task]) >= HIGH_SPARSITY:
        return "matrix", '"1x4" is 1.3 times as fast on CPUs, but at this sparsity blocks lose 2 to 3 points more'
    return "1x4", "blocks of 4 inputs: encoders on CPUs are 1.3 times as fast as with unstructured sparsity"


def _sparsity(args: argparse.Namespace, facts: TaskFacts) -> float:
    """Return the requested sparsity, the one that the pattern fixes, or the task's usual one. Raises InputError."""
    try:
        fixed = parse_pattern(args.pattern or "matrix").fixed_sparsity
    except ValueError as error:
        raise InputError(f"--pattern {args.pattern!r}: {error}") from None
    # first the user's, although the pattern may fix another: the run file's checks then name both
    if args.sparsity is not None:
        return float(args.sparsity)
    return facts.init_sparsity if fixed is None else fixed


def is_cut(args: argparse.Namespace) -> bool:
    """Return whether to propose a smaller dense model: for engines that do not skip pruned weights."""
    # a requested pattern was checked: the engine makes use of it
    return bool(args.target) and not TARGETS[args.target].skips_pruned and not args.pattern


def _require_labels_or_causal(args: argparse.Namespace, features: dict[str, str]) -> None:
    """Raise InputError if another column may have the labels and the model cannot generate text."""
    texts = _first_existing(_GUESSED_TEXTS, features)
    others = [name for name in features if name not in texts]
    if not others:
        return
    # the least that a run file needs, to read the model's config
    table = {
        "output_dir": args.out,
        "task": "causal-lm",
        "model": {"path": args.model},
        "data": {"train": args.train},
        "train": {"num_epochs": 1.0},
    }
    config = load_model_config(run_from_table(table), [], None)
    if not is_causal(config):
        raise InputError(
            f"--train {args.train} has no column 'label', and the model is a {config.model_type}, which learns from "
            f"labels and writes no text. Name the column of the labels with --label-column: {', '.join(others)}"
        )


def _first_existing(choices: Sequence[list[str]], names: Iterable[str]) -> list[str]:
    """Return the first of ``choices`` whose columns are all among ``names``; empty if there is none."""
    existing = set(names)
    for columns in choices:
        if existing.issuperset(columns):
            return columns
    return []


def _text_columns(features: dict[str, str], label_column: str, task: str, where: str) -> list[str]:
    """Return the text columns. Raises InputError if they cannot be inferred."""
    texts = []
    for name, kind in features.items():
        # class names are text too, but not what a model reads
        if kind in _TEXT_TYPES and name != label_column:
            texts.append(name)
    columns = _first_existing(_GUESSED_TEXTS, texts) or texts
    if 1 <= len(columns) <= TASKS[task].max_text_columns:
        return columns
    raise InputError(
        f"--train {where}: which columns hold the text of task {task!r} is not clear. Name them with --text-columns. "
        f"Columns: {', '.join(features)}"
    )


def laid_over(table: Settings, section: str, **settings: object) -> Settings:
    """Return ``table`` with ``settings`` added to a section."""
    return {**table, section: {**table.get(section, {}), **settings}}
