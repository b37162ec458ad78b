"""Settings that ``pst-ds init`` chooses from the flags, the columns of the training file and the model's config."""

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from pst_ds.config.methods import METHODS
from pst_ds.config.one_shot import CHANNELS, ENGINES
from pst_ds.config.run import DataConfig, RunConfig
from pst_ds.config.targets import TARGETS, pattern_conflict
from pst_ds.config.tasks import TASKS, TaskFacts
from pst_ds.config.toml import run_from_table
from pst_ds.core.patterns import parse_pattern
from pst_ds.data.dataset import column_types, file_and_slice, read_rows
from pst_ds.data.model_limits import is_causal, positions_of
from pst_ds.data.plain_text import proposed_sample_by
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError
from pst_ds.file_names import FINETUNED
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.targets import find_embeddings
from pst_ds.planning.dense_start import (
    HIGH_SPARSITY,
    MOST_SPARSITY_OF_BUDGETS,
    SAMPLES_OF_TOKENS,
    SOLVED_SPARSITY,
    gains_by_start,
)
from pst_ds.planning.machines import MACHINES, Machine, machine_of
from pst_ds.planning.plan import start_cost
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.speedup import share_for
from pst_ds.text_table import bytes_text
from pst_ds.train.one_shot.start import require_startable
from pst_ds.train.prepare import require_trainable
from pst_ds.train.resolved import ResolvedRun, load_model_config, load_tokenizer, num_trainable, resolve
from pst_ds.train.stages import require_schedules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_START_SPARSITY = 0.8
"""Sparsity of a classifier's start, from which training ramps up."""
_EXAMPLES = 1024
"""Most examples of a classification task that a start examines."""
_RECOVERY_STEPS = 100
"""Steps after a cut, for a model that learned its task before it."""
Settings: TypeAlias = dict[str, Any]
"""Settings, or tables of settings, by name."""
NO_VALIDATION = "none"
"""Value of ``--validation`` for a run without validation data."""
_UNKNOWN_LIMIT = 128
"""Tokens per example if neither model nor tokenizer states its limit."""
_BATCH_SIZE = 32
_LEAST_STEPS = 600
_MOST_STEPS = 10_000
_LONGER = 3.0
"""Most epochs of a small dataset, relative to the task's usual number."""
_GUESSED_PAIRS = (["sentence1", "sentence2"], ["premise", "hypothesis"], ["question1", "question2"])
_GUESSED_TEXTS = (["text"], ["sentence"], *_GUESSED_PAIRS)
_GUESSED_CONVERSATIONS = (["messages"], ["conversations"], ["prompt", "completion"])
_TEXT_TYPES = ("string", "large_string")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A run, and the reasons for its settings."""

    table: Settings
    """Settings that the run file contains."""
    run: RunConfig
    labels: list[str]
    family: str
    positions: int | None
    """Most tokens that model and tokenizer support; None without a limit."""
    has_accelerator: bool
    node_size: int
    """GPUs of a node of a cluster; 0 to train here."""
    layers: list[str]
    """Last parts of the names of the layers to prune."""
    length_reason: str
    """Reason for the number of steps or epochs."""
    pattern_reason: str
    """Reason for the sparsity pattern; empty if the user chose it."""
    summary: Settings

    def plan_command(self, out: Path) -> str:
        """Return the shell command that plans the run."""
        command = f"pst-ds plan {shlex.quote(str(out))}"
        if self.run.deepspeed_config:
            command += f" --ranks {self.summary['ranks']}"
        if self.node_size:
            command += f" --machine {shlex.quote(self.summary['machine'])}"
        return command

    def train_command(self, out: Path) -> str:
        """Return the shell command that trains the run, here or on a cluster."""
        file = shlex.quote(str(out))
        if self.node_size:
            num_nodes = self.summary["ranks"] // self.node_size
            nodes = f"--nodes={num_nodes} --ntasks-per-node={self.node_size} --gpus-per-node={self.node_size}"
            return f"sbatch {nodes} launch/slurm.sbatch {file}"
        if not self.run.deepspeed_config:
            return f"pst-ds train {file}"
        return f"deepspeed --num_accelerators {self.summary['ranks']} --module pst_ds train {file}"


def chosen_run(args: argparse.Namespace, deepspeed_file: Path) -> Chosen:
    """Return the run that ``args`` ask for, checked as by ``pst-ds plan``. Raises InputError."""
    if args.speedup and args.target not in ENGINES:
        raise InputError(f"--speedup {args.speedup} needs an engine to count for. Add --target {' or '.join(ENGINES)}")
    _require_useful_pattern(args)
    machine = _machine(args)
    ranks = args.ranks or 1
    node_size = 0
    if machine:
        node_size = machine.node_size
        ranks = args.nodes * node_size
    has_accelerator = machine is not None or torch.accelerator.is_available()
    table = _first_table(args, deepspeed_file if ranks > 1 or has_accelerator else None)
    if args.target and TARGETS[args.target].only_causal and not TASKS[table["task"]].predicts_tokens:
        raise InputError(
            f"--target {args.target} runs language models, and the task is {table['task']}. Choose another --target"
        )
    asked = table["data"].pop("max_length", 0)
    # with the task's shortest length, which every model supports, until the model's limit is known
    first = run_from_table(laid_over(table, "data", max_length=TASKS[table["task"]].min_length))
    task = task_of(first)
    tokenizer = load_tokenizer(first)
    labels = task.label_names(first.data)
    model_config = load_model_config(first, labels, tokenizer)
    positions = _most_tokens(positions_of(model_config), tokenizer.model_max_length)
    length = asked or min(first.task_facts.init_max_length, positions or _UNKNOWN_LIMIT)
    table = laid_over(table, "data", max_length=length)
    held_out = ""
    if not args.validation:
        table, held_out = with_validation(table, tokenizer, labels)
    data = run_from_table(table).data
    training = task.load(data, "train", tokenizer, labels)
    examples = len(training)
    remarks = [_remark_on_lines(data), held_out, task.remark(data, training)]
    table, length_reason = _with_batches(
        table, args, usual_epochs=first.task_facts.init_epochs, examples=examples, ranks=ranks
    )
    run = run_from_table(table)
    run.micro_batch_size(ranks)
    resolved = resolve(run, labels=labels, tokenizer=tokenizer)
    model = resolved.shapes.model
    if resolved.only_fp32:
        table = laid_over(table, "train", precision="fp32")
    check = partial(_checked, resolved=resolved, examples=examples, ranks=ranks)
    if _is_cut(args):
        proposals = [_with_cut(table, run, args, examples)]
    else:
        if task.new_head:
            table = _for_a_new_task(table, model, run)
        proposals = [*_with_start(table, examples, any_pattern=not args.pattern), table]
    draft, remark = _first_sound(proposals, check)
    remarks.append(remark)
    if machine:
        table, remark = _for_cluster(draft.table, resolved, examples=examples, ranks=ranks, machine=args.machine)
        remarks.append(remark)
        draft = check(table)
    run = draft.run
    layers = pst_layers(draft.model)
    summary = {
        "task": run.task,
        "method": run.method,
        "sparsity": run.schedule.final_sparsity if run.mask_method.masks != "none" else 0.0,
        "num_layers": len(layers),
        "trained_parameters": num_trainable(draft.model),
        "classes": labels,
        "num_steps": run.num_steps(examples),
        "examples": examples,
        "unit": task.unit,
        "ranks": ranks,
        "machine": args.machine,
        "remarks": [remark for remark in remarks if remark],
    }
    _, pattern_reason = _proposed_pattern(args, run.task)
    return Chosen(
        table=draft.table,
        run=run,
        labels=labels,
        family=model_config.model_type,
        positions=positions,
        has_accelerator=has_accelerator,
        node_size=node_size,
        layers=list(dict.fromkeys(name.rpartition(".")[2] for name in layers)),
        length_reason=length_reason,
        pattern_reason=pattern_reason,
        summary=summary,
    )


def _most_tokens(*limits: object) -> int | None:
    """Return the least of the limits of a model and its tokenizer; None if neither states one."""
    # tokenizers without a limit state a huge number (transformers: 10^30)
    stated = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(stated, default=None)


def _require_useful_pattern(args: argparse.Namespace) -> None:
    """Raise InputError for a pattern that the target cannot use, or that does not exist."""
    if not args.target or not args.pattern:
        return
    try:
        conflict = pattern_conflict(args.target, args.pattern)
    except ValueError as error:
        raise InputError(f"--pattern {args.pattern}: {error}") from None
    if conflict:
        raise InputError(
            f"--pattern {args.pattern} with --target {args.target}: {conflict}. Remove --pattern, which cuts channels "
            "instead, or name another --target"
        )


def _is_cut(args: argparse.Namespace) -> bool:
    """Return whether to propose a smaller dense model: for engines that do not skip pruned weights."""
    return bool(args.target) and not TARGETS[args.target].skips_pruned and not args.pattern


@dataclass(frozen=True, slots=True)
class _Draft:
    """A table of settings that the checks of ``pst-ds plan`` accept."""

    table: Settings
    run: RunConfig
    model: nn.Module
    """The run's model on the meta device."""
    remark: str
    """That the weights which ``[start]`` prunes could not be examined; "" if they were, or without a start."""


def _checked(table: Settings, resolved: ResolvedRun, examples: int, ranks: int) -> _Draft:
    """Return ``table`` with its run and model, checked as ``pst-ds plan`` checks them. Raises InputError.

    ``resolved`` is the run with other settings. The DeepSpeed JSON is that of :func:`deepspeed_settings`, which fits
    every run.
    """
    run = run_from_table(table)
    stage = 3 if run.deepspeed_config else 0
    resolved = resolved.with_settings(run)
    require_trainable(resolved, ranks=ranks, stage=stage)
    model = resolved.shapes.model
    require_schedules(run, examples)
    remark = ""
    if run.start.method != "none" and (unexamined := require_startable(run)):
        remark = f"[start] was checked with the model's config only, not with its weights: {unexamined}"
    # for its checks only: raises InputError if the start cannot be planned
    start_cost(run, model, model_numbers(model), ranks, machine_of("cpu"))
    return _Draft(table=table, run=run, model=model, remark=remark)


def _first_sound(proposals: Sequence[Settings], check: Callable[[Settings], _Draft]) -> tuple[_Draft, str]:
    """Return the first of ``proposals`` that passes ``check``, and a remark, or "".

    All but the last add a start by ALPS, or solves, to the last: the remark says what is against them. Raises
    InputError for the last proposal.
    """
    *with_start, plain = proposals
    problem = ""
    for proposal in with_start:
        try:
            draft = check(proposal)
        except InputError as error:
            problem = str(error)
        else:
            return draft, draft.remark
    draft = check(plain)
    if problem:
        return draft, f"no [start] with ALPS, which would make the model more accurate: {problem}"
    return draft, draft.remark


def _machine(args: argparse.Namespace) -> Machine | None:
    """Return the machine of ``--nodes``; None without. Raises InputError."""
    if not args.nodes:
        if args.machine:
            raise InputError(f"--machine {args.machine}: how many nodes of it is not given. Add --nodes")
        return None
    gpus = ", ".join(name for name, machine in MACHINES.items() if machine.device != "cpu")
    if not args.machine:
        raise InputError(f"--nodes {args.nodes}: their machine is unknown. Add --machine with one of {gpus} or a file")
    machine = machine_of(args.machine)
    if machine.device == "cpu":
        raise InputError(f"--machine {args.machine}: its nodes have no GPUs. Name one of {gpus}, or use --ranks")
    return machine


def _for_cluster(
    table: Settings, resolved: ResolvedRun, *, examples: int, ranks: int, machine: str
) -> tuple[Settings, str]:
    """Return ``table`` with the best settings of a search, and a remark on their plan."""
    from pst_ds.planning.plan import PlanOptions, plan
    from pst_ds.planning.search import search

    run = run_from_table(table)
    # the run's DeepSpeed JSON is written only once all settings are chosen, and the plan reads a file
    with TemporaryDirectory() as folder:
        file = Path(folder) / "deepspeed.json"
        file.write_text(json.dumps(deepspeed_settings(on_cpu=False)))
        # the plan needs a number of steps, since it does not read the data again
        train = replace(run.train, num_steps=run.num_steps(examples), num_epochs=0.0)
        run = replace(run, deepspeed_config=str(file), train=train)
        options = PlanOptions(ranks, machine, no_data=True)
        resolved = resolved.with_settings(run)
        best = search(resolved, options, plan(resolved, options))[0].plan
    for section, name in (
        ("model", "gradient_checkpointing"),
        ("train", "gradient_accumulation_steps"),
        ("train", "sequence_parallel"),
        ("train", "expert_parallel"),
    ):
        value = getattr(getattr(best.run, section), name)
        if value != getattr(getattr(run, section), name):
            table = laid_over(table, section, **{name: value})
    needed = bytes_text(best.verdict.needed_bytes)
    remark = f"the search of pst-ds plan expects {needed} per rank and {best.time.step:.3g} s per step on {machine}"
    if best.verdict.fits is False:  # None: unknown
        remark += ": does NOT fit; pst-ds plan says what would"
    return table, remark


def _with_batches(
    table: Settings, args: argparse.Namespace, *, usual_epochs: float, examples: int, ranks: int
) -> tuple[Settings, str]:
    """Return ``table`` with a batch size and the length of the run, and the reason for the length."""
    # a multiple of ranks, at most all examples
    batch_size = args.batch_size or ranks * max(1, min(_BATCH_SIZE, examples) // ranks)
    table = laid_over(table, "train", batch_size=batch_size)
    if args.steps or args.epochs is not None:
        return table, "as given"
    train, reason = proposed_length(usual_epochs, examples, batch_size)
    del table["train"]["num_epochs"]
    return laid_over(table, "train", **train), reason


def _remark_on_lines(data: DataConfig) -> str:
    if data.sample_by == "line":
        return ""
    file, _ = file_and_slice(data.train)
    return f'{file}: its lines are parts of longer texts, not documents: data.sample_by = "{data.sample_by}"'


def _for_a_new_task(table: Settings, model: nn.Module, run: RunConfig) -> Settings:
    """Return ``table`` for a model that learns a new task by a low-rank update: with an update of its embeddings, and
    with masks that start at half of the final sparsity and are fixed early (tools/quality/logs/tuning-log.md).
    """
    config = run.injected_pst
    if not run.mask_method.injects or not config.update_rank:
        return table
    if embeddings := _updatable_embeddings(model, run):
        table = laid_over(table, "pst", update_embeddings=embeddings)
    if run.method != "pst":
        return table
    initial = round(run.schedule.final_sparsity / 2, 4)
    return laid_over(table, "schedule", initial_sparsity=initial, warmup_fraction=0.0, cooldown_fraction=0.4)


def _updatable_embeddings(model: nn.Module, run: RunConfig) -> list[str]:
    """Return the name of the model's input embeddings, if they can have a low-rank update."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    names = tuple(name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings)
    try:
        find_embeddings(model, replace(run.injected_pst, update_embeddings=names))
    except InputError:
        return []
    return list(names)


def _with_cut(table: Settings, run: RunConfig, args: argparse.Namespace, examples: int) -> Settings:
    """Return ``table`` with a cut of the feed-forward layers, and the uncut model as teacher (docs/how-to/shapes.md).

    A new task is learned before the cut.
    """
    is_new = not run.task_facts.predicts_tokens
    # share of the feed-forward channels that stay, and most examples that choose them
    if is_new:
        share = 0.25
        samples = _EXAMPLES
    else:
        share = 0.75
        samples = 2 * SAMPLES_OF_TOKENS
    if args.speedup:
        share, _ = share_for(run, args.speedup, args.target)
    train = dict(table["train"])
    first = {name: table[name] for name in table if name != "train"}
    if is_new:
        length = {name: train[name] for name in ("num_steps", "num_epochs") if name in train}
        first["finetune"] = {"method": "dense", **length}
        if run.mask_method.masks == "none":
            others = {name: train[name] for name in train if name not in length}
            train = {"num_steps": _RECOVERY_STEPS, **others}
    first["start"] = {"method": CHANNELS, "ffn": share, "samples": min(samples, examples)}
    first["distillation"] = {"weight": 0.5, "teacher": FINETUNED if is_new else run.model.path}
    if not is_new:
        first = laid_over(first, "pst", update_rank=16, update_init="lora", update_init_scale=1.0)
    return {**first, "train": train}


def proposed_length(usual_epochs: float, examples: int, batch_size: int) -> tuple[Settings, str]:
    """Return ``num_epochs`` or ``num_steps`` for a run over ``examples``, and the reason.

    The default is the task's usual number of epochs. Small datasets get up to three times as many, since masks need
    steps to settle while sparsity ramps up. Very large datasets get fewer, since the small matrices stop improving
    earlier.
    """
    steps_of_epoch = max(1, examples // batch_size)
    steps = round(usual_epochs * steps_of_epoch)
    if steps > max(_MOST_STEPS, steps_of_epoch):
        steps = max(_MOST_STEPS, steps_of_epoch)
        return {"num_steps": steps}, f"{steps / steps_of_epoch:.1f} epochs, because the dataset is large"
    if steps >= _LEAST_STEPS:
        return {"num_epochs": usual_epochs}, "usual for this task"
    epochs = _LEAST_STEPS / steps_of_epoch
    if epochs > _LONGER * usual_epochs:
        return {"num_epochs": _LONGER * usual_epochs}, "more than usual, because the dataset is small"
    return {"num_steps": _LEAST_STEPS}, f"{epochs:.1f} epochs, so that the masks settle"


def _first_table(args: argparse.Namespace, deepspeed_file: Path | None) -> Settings:
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
        pattern, _ = _proposed_pattern(args, task)
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
    is_dense = _is_cut(args) and args.sparsity is None
    return "lora" if is_dense else "pst"


def _proposed_pattern(args: argparse.Namespace, task: str) -> tuple[str, str]:
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


def _with_start(table: Settings, examples: int, *, any_pattern: bool) -> list[Settings]:
    """Return ``table`` with each start by ALPS, or solves during training, that improves the run: the best one first.

    Empty if none does. Whether the model supports them is not checked. With ``any_pattern`` the start chooses the
    sparsity pattern.
    """
    run = run_from_table(table)
    if not gains_by_start(run):
        return []
    proposals = []
    if run.task_facts.predicts_tokens:
        if any_pattern and run.schedule.final_sparsity <= MOST_SPARSITY_OF_BUDGETS:
            proposals.append(_language_model(table, run, examples, by_saliency=True))
        proposals.append(_language_model(table, run, examples, by_saliency=False))
        return proposals
    gains = run.task == "classification" and run.schedule.final_sparsity >= SOLVED_SPARSITY
    if gains and run.pst.pattern == "matrix":
        proposals.append(_solved(table))
    proposals.append(_classifier(table, examples))
    return proposals


def _solved(table: Settings) -> Settings:
    """Solve for masks and weights with ALPS along the ramp, the first time at about 80 % sparsity."""
    return laid_over(table, "schedule", solves=5, initial_sparsity=_START_SPARSITY)


def _classifier(table: Settings, examples: int) -> Settings:
    """Start with ALPS at 80 % sparsity; scores with input norms, as in ALPS, choose the other weights to prune."""
    table = laid_over(table, "start", method="alps", samples=min(_EXAMPLES, examples), reconstruct=2)
    table = laid_over(table, "pst", magnitude="activation")
    return laid_over(table, "schedule", initial_sparsity=_START_SPARSITY)


def _language_model(table: Settings, run: RunConfig, examples: int, *, by_saliency: bool) -> Settings:
    """Start at the final sparsity and let PST compensate: docs/how-to/methods.md, "Language models"."""
    table = laid_over(table, "start", method="alps", samples=min(SAMPLES_OF_TOKENS, examples), reconstruct=2)
    if by_saliency:
        table = laid_over(table, "start", budgets="saliency")
        table = laid_over(table, "pst", pattern="global")
    update: Settings = {"update_rank": 16, "update_init": "lora", "update_init_scale": 1.0}
    table = laid_over(table, "pst", frozen_magnitude=True, **update)
    return laid_over(table, "schedule", initial_sparsity=run.schedule.final_sparsity)


PERCENT = 10
"""Rows of data.train that are held out for validation, in percent."""


def with_validation(table: Settings, tokenizer: "Tokenizer", labels: list[str]) -> tuple[Settings, str]:
    """Return ``table`` with the last rows of data.train held out for validation, and a sentence about it.

    Where that is not possible, return ``table`` unchanged; the sentence gives the reason.
    """
    where = table["data"]["train"]
    file, piece = file_and_slice(where)
    if piece:
        return table, f"no validation data: {where} is a slice, and --validation may name the rest of {file}"
    trained = 100 - PERCENT
    # the order of the settings is that of the run file
    data = {"train": f"{where}[:{trained}%]", "validation": f"{where}[{trained}%:]"}
    for name, value in table["data"].items():
        if name != "train":
            data[name] = value
    held = {**table, "data": data}
    try:
        examples = _require_fair(run_from_table(held), tokenizer, labels)
    except InputError as error:
        return table, f"no validation data: {error}. Name a file with --validation"
    return held, f"held out for validation: the last {PERCENT} % of {where}, {examples}"


def _require_fair(run: RunConfig, tokenizer: "Tokenizer", labels: list[str]) -> str:
    """Return the number of held-out examples, with their unit.

    Raises InputError if the remaining rows cannot be trained on, or if the rows are sorted by class.
    """
    task = task_of(run)
    data = run.data
    if task.label_names(data) != labels:
        raise InputError(f"{data.train} lacks some classes, so its rows may be in their order")
    task.load(data, "train", tokenizer, labels)
    examples = task.load(data, "validation", tokenizer, labels)
    if labels and task.num_labels(examples) == 1:
        raise InputError(f"{data.validation} has one class only, so its rows may be in the order of classes")
    return f"{len(examples)} {task.unit}"


def deepspeed_settings(*, on_cpu: bool) -> dict[str, object]:
    """Return ZeRO-3 settings for ranks on a CPU or on GPUs, as ds_configs/zero3_cpu.json and zero3.json have it."""
    zero: dict[str, object] = {
        "stage": 3,
        "overlap_comm": not on_cpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 5_000_000 if on_cpu else 50_000_000,
        "stage3_param_persistence_threshold": 0 if on_cpu else 100_000,
    }
    if not on_cpu:
        zero |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
