"""Settings that ``pst-ds init`` chooses from the flags, the columns of the training file and the model's config."""

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from pst_ds.cli.init.first_table import Settings, first_table, is_cut, laid_over, proposed_pattern
from pst_ds.cli.init.held_out import with_validation
from pst_ds.cli.init.proposals import for_a_new_task, proposed_length, with_cut, with_start
from pst_ds.config.one_shot import ENGINES
from pst_ds.config.run import DataConfig, RunConfig
from pst_ds.config.targets import TARGETS, pattern_conflict
from pst_ds.config.tasks import TASKS
from pst_ds.config.toml import run_from_table
from pst_ds.data.dataset import file_and_slice
from pst_ds.data.model_limits import positions_of
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.planning.machines import MACHINES, Machine, machine_of
from pst_ds.planning.plan import PlanOptions, plan, start_cost
from pst_ds.planning.search import STAGE_2_FILE, search
from pst_ds.planning.shapes import model_numbers
from pst_ds.text_table import bytes_text
from pst_ds.train.one_shot.start import require_startable
from pst_ds.train.prepare import require_trainable
from pst_ds.train.resolved import ResolvedRun, load_model_config, load_tokenizer, num_trainable, resolve
from pst_ds.train.stages import require_schedules

_UNKNOWN_LIMIT = 128
"""Tokens per example if neither model nor tokenizer states its limit."""
_BATCH_SIZE = 32


class Summary(TypedDict):
    """What the JSON of ``pst-ds init`` says about the run."""

    task: str
    method: str
    sparsity: float
    """Final sparsity; 0 for methods that do not prune."""
    num_layers: int
    """Layers that the run prunes."""
    trained_parameters: int
    num_steps: int
    """Optimizer steps."""
    examples: int
    unit: str
    """Unit of the examples, such as "sequences"."""
    classes: list[str]
    ranks: int
    machine: str | None
    """Machine of ``--nodes``; None to train here."""
    remarks: list[str]


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
    zero_stage: int
    """ZeRO stage of the DeepSpeed JSON, if the run has one."""
    layers: list[str]
    """Last parts of the names of the layers to prune."""
    length_reason: str
    """Reason for the number of steps or epochs."""
    pattern_reason: str
    """Reason for the sparsity pattern; empty if the user chose it."""
    summary: Summary

    def plan_command(self, out: Path) -> str:
        """Return the shell command that plans the run."""
        command = f"pst-ds plan {shlex.quote(str(out))}"
        if self.run.deepspeed_config:
            command += f" --ranks {self.summary['ranks']}"
        if self.summary["machine"]:
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the run will train."""

    machine: Machine | None
    """Machine of a cluster's nodes; None to train here."""
    ranks: int

    @property
    def node_size(self) -> int:
        """GPUs of a node of a cluster; 0 to train here."""
        return 0 if self.machine is None else self.machine.node_size

    @property
    def has_accelerator(self) -> bool:
        return self.machine is not None or torch.accelerator.is_available()

    @property
    def uses_deepspeed(self) -> bool:
        """True if the run file names a DeepSpeed JSON: one rank on a CPU trains without."""
        return self.ranks > 1 or self.has_accelerator


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The training data, and what the model's files say about it."""

    table: Settings
    """Settings of the run file, with ``data.max_length`` and validation data."""
    tokenizer: Tokenizer
    labels: list[str]
    family: str
    positions: int | None
    """Most tokens that model and tokenizer support; None without a limit."""
    examples: int
    remarks: list[str]
    """Remarks on the data; some may be empty."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A table of settings that the checks of ``pst-ds plan`` accept."""

    table: Settings
    run: RunConfig
    model: nn.Module
    """The run's model on the meta device."""
    remark: str
    """That the weights which ``[start]`` prunes could not be examined; "" if they were, or without a start."""


def chosen_run(args: argparse.Namespace, deepspeed_file: Path) -> Chosen:
    """Return the run that ``args`` ask for, checked as by ``pst-ds plan``. Raises InputError."""
    if args.speedup and args.target not in ENGINES:
        raise InputError(f"--speedup {args.speedup} needs an engine to count for. Add --target {' or '.join(ENGINES)}")
    _require_useful_pattern(args)
    place = _place(args)
    table = first_table(args, deepspeed_file if place.uses_deepspeed else None)
    _require_task_of_target(args, table["task"])
    inputs = _read_inputs(args, table)
    examples = inputs.examples
    ranks = place.ranks
    table, length_reason = _with_batches(inputs.table, args, examples=examples, ranks=ranks)
    run = run_from_table(table)
    # for its check only: raises InputError for a batch that the ranks cannot divide
    run.micro_batch_size(ranks)
    resolved = resolve(run, labels=inputs.labels, tokenizer=inputs.tokenizer)
    model = resolved.shapes.model
    if resolved.only_fp32:
        table = laid_over(table, "train", precision="fp32")
    check = partial(_checked, resolved=resolved, examples=examples, ranks=ranks)
    draft, remark = _first_sound(_proposals(table, run, args=args, model=model, examples=examples), check)
    remarks = [*inputs.remarks, remark]
    zero_stage = 3
    if place.machine:
        table, zero_stage, remark = _for_cluster(
            draft.table, resolved, examples=examples, ranks=ranks, machine=args.machine
        )
        remarks.append(remark)
        # again: the search changed settings
        draft = check(table, stage=zero_stage)
    layers = pst_layers(draft.model)
    summary = Summary(
        task=draft.run.task,
        method=draft.run.method,
        sparsity=_sparsity_of(draft.run),
        num_layers=len(layers),
        trained_parameters=num_trainable(draft.model),
        num_steps=draft.run.num_steps(examples),
        examples=examples,
        unit=task_of(draft.run).unit,
        classes=inputs.labels,
        ranks=ranks,
        machine=args.machine,
        remarks=[remark for remark in remarks if remark],
    )
    _, pattern_reason = proposed_pattern(args, draft.run.task)
    return Chosen(
        table=draft.table,
        run=draft.run,
        labels=inputs.labels,
        family=inputs.family,
        positions=inputs.positions,
        has_accelerator=place.has_accelerator,
        node_size=place.node_size,
        zero_stage=zero_stage,
        layers=_last_parts(layers),
        length_reason=length_reason,
        pattern_reason=pattern_reason,
        summary=summary,
    )


def _read_inputs(args: argparse.Namespace, table: Settings) -> _Inputs:
    """Read the data, the tokenizer and the model's config, and choose ``data.max_length`` and validation data.

    Raises InputError.
    """
    requested_length = table["data"].pop("max_length", 0)
    # with the task's shortest length, which every model supports, until the model's limit is known
    first = run_from_table(laid_over(table, "data", max_length=TASKS[table["task"]].min_length))
    task = task_of(first)
    tokenizer = load_tokenizer(first)
    labels = task.label_names(first.data)
    model_config = load_model_config(first, labels, tokenizer)
    positions = _most_tokens(positions_of(model_config), tokenizer.model_max_length)
    usual_length = min(first.task_facts.init_max_length, positions or _UNKNOWN_LIMIT)
    table = laid_over(table, "data", max_length=requested_length or usual_length)
    held_out = ""
    if not args.validation:
        table, held_out = with_validation(table, tokenizer, labels)
    data = run_from_table(table).data
    training = task.load(data, "train", tokenizer, labels)
    return _Inputs(
        table=table,
        tokenizer=tokenizer,
        labels=labels,
        family=model_config.model_type,
        positions=positions,
        examples=len(training),
        remarks=[_remark_on_lines(data), held_out, task.remark(data, training)],
    )


def _proposals(
    table: Settings, run: RunConfig, *, args: argparse.Namespace, model: nn.Module, examples: int
) -> list[Settings]:
    """Return tables that complete ``table`` with what improves the run, the best one first."""
    if is_cut(args):
        return [with_cut(table, run, args, examples)]
    if task_of(run).new_head:
        table = for_a_new_task(table, model, run)
    return [*with_start(table, examples, any_pattern=not args.pattern), table]


def _last_parts(names: Iterable[str]) -> list[str]:
    """Return the last part of each dotted name, each once: the layers of a model repeat them."""
    # a dict keeps the order, which a set does not
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _sparsity_of(run: RunConfig) -> float:
    """Return the final sparsity; 0 for methods that do not prune, whose setting has no effect."""
    if run.mask_method.masks == "none":
        return 0.0
    return run.schedule.final_sparsity


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


def _require_task_of_target(args: argparse.Namespace, task: str) -> None:
    """Raise InputError for a target that runs language models only, if the task is another."""
    if not args.target:
        return
    if TARGETS[args.target].only_causal and not TASKS[task].predicts_tokens:
        raise InputError(
            f"--target {args.target} runs language models, and the task is {task}. Choose another --target"
        )


def _checked(table: Settings, resolved: ResolvedRun, examples: int, ranks: int, stage: int = 3) -> _Draft:
    """Return ``table`` with its run and model, checked as ``pst-ds plan`` checks them. Raises InputError.

    ``resolved`` is the run with other settings. The DeepSpeed JSON is that of :func:`deepspeed_settings` for
    ``stage``; at stage 3 it fits every run.
    """
    run = run_from_table(table)
    if not run.deepspeed_config:
        stage = 0
    resolved = resolved.with_settings(run)
    require_trainable(resolved, ranks=ranks, stage=stage)
    model = resolved.shapes.model
    require_schedules(run, examples)
    remark = ""
    if run.start.method != "none":
        # without a connection, the files of a model on the hub cannot be examined
        unexamined = require_startable(run)
        if unexamined:
            remark = f"[start] was checked with the model's config only, not with its weights: {unexamined}"
    # for its checks only: raises InputError if the start cannot be planned; the costs on a CPU are not used
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
            # a proposal that does not fit this model is not the user's fault: the next one is simpler
            problem = str(error)
        else:
            return draft, draft.remark
    draft = check(plain)
    if problem:
        return draft, f"no [start] with ALPS, which would make the model more accurate: {problem}"
    return draft, draft.remark


def _place(args: argparse.Namespace) -> _Place:
    """Return where the run trains: on ``--ranks`` processes here, or on ``--nodes`` of a cluster. Raises InputError."""
    if not args.nodes:
        if args.machine:
            raise InputError(f"--machine {args.machine}: how many nodes of it is not given. Add --nodes")
        return _Place(machine=None, ranks=args.ranks or 1)
    gpus = ", ".join(name for name, machine in MACHINES.items() if machine.device != "cpu")
    if not args.machine:
        raise InputError(f"--nodes {args.nodes}: their machine is unknown. Add --machine with one of {gpus} or a file")
    machine = machine_of(args.machine)
    if machine.device == "cpu":
        raise InputError(f"--machine {args.machine}: its nodes have no GPUs. Name one of {gpus}, or use --ranks")
    return _Place(machine=machine, ranks=args.nodes * machine.node_size)


def _for_cluster(
    table: Settings, resolved: ResolvedRun, *, examples: int, ranks: int, machine: str
) -> tuple[Settings, int, str]:
    """Return ``table`` with the best settings of a search, the ZeRO stage, and a remark on their plan."""
    run = run_from_table(table)
    # the run's DeepSpeed JSON is written only once all settings are chosen, and the plan reads a file
    with TemporaryDirectory() as folder:
        file = Path(folder) / "deepspeed.json"
        file.write_text(json.dumps(deepspeed_settings(on_cpu=False)))
        # the search looks for it next to the other
        file.with_name(STAGE_2_FILE).write_text(json.dumps(deepspeed_settings(on_cpu=False, stage=2)))
        # the plan needs a number of steps, since it does not read the data again
        train = replace(run.train, num_steps=run.num_steps(examples), num_epochs=0.0)
        run = replace(run, deepspeed_config=str(file), train=train)
        options = PlanOptions(ranks, machine, no_data=True)
        resolved = resolved.with_settings(run)
        best = search(resolved, options, plan(resolved, options))[0].plan
    for section, name in (
        ("model", "gradient_checkpointing"),
        ("model", "recomputed_blocks"),
        ("model", "base_placement"),
        ("train", "gradient_accumulation_steps"),
        ("train", "sequence_parallel"),
        ("train", "expert_parallel"),
    ):
        value = getattr(getattr(best.run, section), name)
        # only changes: the run file omits defaults that say nothing
        if value != getattr(getattr(run, section), name):
            table = laid_over(table, section, **{name: value})
    needed = bytes_text(best.verdict.needed_bytes)
    remark = f"the search of pst-ds plan expects {needed} per rank and {best.time.step:.3g} s per step on {machine}"
    if best.verdict.fits is False:  # None: unknown
        remark += ": does NOT fit; pst-ds plan says what would"
    stage = best.zero_stage
    assert stage is not None, "a cluster's run has a DeepSpeed JSON"
    if stage == 2:
        remark += ", at ZeRO stage 2: frozen weights fit on every rank"
    return table, stage, remark


def _with_batches(table: Settings, args: argparse.Namespace, *, examples: int, ranks: int) -> tuple[Settings, str]:
    """Return ``table`` with a batch size and the length of the run, and the reason for the length."""
    batch_size = args.batch_size
    if not batch_size:
        # about the usual size and at most all examples, but the same number for each rank
        batch_size = ranks * max(1, min(_BATCH_SIZE, examples) // ranks)
    table = laid_over(table, "train", batch_size=batch_size)
    if args.steps or args.epochs is not None:
        return table, "as given"
    usual_epochs = TASKS[table["task"]].init_epochs
    length, reason = proposed_length(usual_epochs, examples, batch_size)
    # a run file may have only one of num_epochs and num_steps, and the first table has the usual epochs
    del table["train"]["num_epochs"]
    return laid_over(table, "train", **length), reason


def _remark_on_lines(data: DataConfig) -> str:
    """Return a remark on a text file whose lines are not documents; "" for other files."""
    if data.sample_by == "line":
        return ""
    file, _ = file_and_slice(data.train)
    return f'{file}: its lines are parts of longer texts, not documents: data.sample_by = "{data.sample_by}"'


def deepspeed_settings(*, on_cpu: bool, stage: int = 3) -> dict[str, object]:
    """Return settings for ranks on a CPU or on GPUs, as ds_configs has them: zero3_cpu.json, zero3.json or zero2.json.

    ``stage``: 3, or 2 on GPUs.
    """
    zero: dict[str, object] = {
        "stage": stage,
        # a CPU has no streams on which communication could overlap with computation
        "overlap_comm": not on_cpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if stage == 2:
        # elements of updated parameters that ranks gather at once
        zero["allgather_bucket_size"] = 50_000_000
    else:
        zero["stage3_prefetch_bucket_size"] = 5_000_000 if on_cpu else 50_000_000
        # elements up to which a parameter is not sharded
        zero["stage3_param_persistence_threshold"] = 0 if on_cpu else 100_000
        if not on_cpu:
            zero |= {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}
    # "auto": train_run fills in the settings of the run file
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
