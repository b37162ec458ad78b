"""The part of a run file that the flags and the columns of the training file decide, before the model is known."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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

if TYPE_CHECKING:
    pass

Settings: TypeAlias = dict[str, Any]
"""Settings, or tables of settings, by name."""
NO_VALIDATION = "none"
"""Value of ``--validation`` for a run without validation data."""
_GUESSED_PAIRS = (["sentence1", "sentence2"], ["premise", "hypothesis"], ["question1", "question2"])
_GUESSED_TEXTS = (["text"], ["sentence"], *_GUESSED_PAIRS)
_GUESSED_CONVERSATIONS = (["messages"], ["conversations"], ["prompt", "completion"])
_TEXT_TYPES = ("string", "large_string")


def first_table(args: argparse.Namespace, deepspeed_file: Path | None) -> Settings:
    """Return the settings that do not depend on the model, in the order of the file, without uninformative defaults."""
    rows = read_rows(DataConfig(train=args.train), "train", {})
    features = column_types(rows, args.train)
    if args.label_column and args.label_column not in features:
        where = f"--label-column {args.label_column!r} is not in {args.train}"
        raise InputError(f"{where}. Name one of the columns: {', '.join(features)}")
    label_column = args.label_column or "label"
    conversations = _guessed(_GUESSED_CONVERSATIONS, features)
    if args.task:
        task = args.task
    elif conversations:
        task = "chat"
    else:
        label_type = features.get(label_column)
        task = next(name for name, facts in TASKS.items() if facts.suggested_by(label_type))
    if TASKS[task].packs_text and not args.task:
        _require_labels_or_causal(args, features)
    table: Settings = {
        "output_dir": args.output_dir or f"runs/{Path(args.out).stem}",
        "task": task,
        "method": method_of(args),
    }
    if deepspeed_file:
        table["deepspeed_config"] = str(deepspeed_file)
    text_columns = args.text_columns
    if not text_columns and task == "chat":
        text_columns = conversations
    if not text_columns:
        text_columns = _text_columns(features, label_column, task, args.train)
    table["model"] = {"path": args.model}
    table["data"] = _data_section(args, TASKS[task], text_columns, label_column)
    table["train"] = {**_asked_length(args, TASKS[task]), "precision": "bf16"}
    if METHODS[method_of(args)].masks != "none":
        pattern, _ = proposed_pattern(args, task)
        table["pst"] = {"target_modules": "all-linear", "pattern": pattern}
        if args.exclude_modules:
            table["pst"]["exclude_modules"] = args.exclude_modules
        table["schedule"] = {"final_sparsity": _sparsity(args, TASKS[task])}
    return table


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
    plain = Path(file_and_slice(args.train)[0])
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


def _asked_length(args: argparse.Namespace, facts: TaskFacts) -> Settings:
    """Return the number of steps or epochs that the user gave, or the task's usual epochs."""
    if args.steps:
        return {"num_steps": args.steps}
    return {"num_epochs": facts.init_epochs if args.epochs is None else args.epochs}


def method_of(args: argparse.Namespace) -> str:
    """Return the requested method, or the one for a sparse or a smaller dense model."""
    if args.method:
        return str(args.method)
    is_dense = is_cut(args) and args.sparsity is None
    return "lora" if is_dense else "pst"


def proposed_pattern(args: argparse.Namespace, task: str) -> tuple[str, str]:
    """Return the requested pattern, or the best for ``args.target`` and the reason (docs/background/results.md)."""
    if args.pattern or args.target != "cpu":
        return args.pattern or "matrix", ""
    if not TASKS[task].has_labels:
        return "matrix", "decoders on CPUs are as fast with unstructured sparsity as with blocks"
    if method_of(args) == "pst" and _sparsity(args, TASKS[task]) >= HIGH_SPARSITY:
        return "matrix", '"1x4" is 1.3 times as fast on CPUs, but at this sparsity blocks lose 2 to 3 points more'
    return "1x4", "blocks of 4 inputs: encoders on CPUs are 1.3 times as fast as with unstructured sparsity"


def _sparsity(args: argparse.Namespace, facts: TaskFacts) -> float:
    try:
        fixed = parse_pattern(args.pattern or "matrix").fixed_sparsity
    except ValueError as error:
        raise InputError(f"--pattern {args.pattern!r}: {error}") from None
    if args.sparsity is not None:
        return float(args.sparsity)
    return facts.init_sparsity if fixed is None else fixed


def is_cut(args: argparse.Namespace) -> bool:
    """Return whether to propose a smaller dense model: for engines that do not skip pruned weights."""
    return bool(args.target) and not TARGETS[args.target].skips_pruned and not args.pattern


def _require_labels_or_causal(args: argparse.Namespace, features: dict[str, str]) -> None:
    """Raise InputError if another column may have the labels and the model cannot generate text."""
    others = [name for name in features if name not in _guessed(_GUESSED_TEXTS, features)]
    if not others:
        return
    table = {"output_dir": args.out, "task": "causal-lm", "model": {"path": args.model}, "data": {"train": args.train}}
    config = load_model_config(run_from_table({**table, "train": {"num_epochs": 1.0}}), [], None)
    if not is_causal(config):
        raise InputError(
            f"--train {args.train} has no column 'label', and the model is a {config.model_type}, which learns from "
            f"labels and writes no text. Name the column of the labels with --label-column: {', '.join(others)}"
        )


def _guessed(guesses: Sequence[list[str]], names: Iterable[str]) -> list[str]:
    """Return the first of ``guesses`` whose columns all exist; empty if none do."""
    return next((columns for columns in guesses if set(columns) <= set(names)), [])


def _text_columns(features: dict[str, str], label_column: str, task: str, where: str) -> list[str]:
    """Return the text columns. Raises InputError if they cannot be inferred."""
    texts = [name for name, kind in features.items() if kind in _TEXT_TYPES and name != label_column]
    found = _guessed(_GUESSED_TEXTS, texts) or texts
    if 1 <= len(found) <= TASKS[task].max_text_columns:
        return found
    raise InputError(
        f"--train {where}: which columns hold the text of task {task!r} is not clear. Name them with --text-columns. "
        f"Columns: {', '.join(features)}"
    )


def laid_over(table: Settings, section: str, **settings: object) -> Settings:
    """Return ``table`` with ``settings`` added to a section."""
    return {**table, section: {**table.get(section, {}), **settings}}
