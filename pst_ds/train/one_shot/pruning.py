"""Prune a pretrained model in one shot into a model folder: the entry that commands, runs and scripts share."""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.errors import InputError
from pst_ds.formats.safetensors_file import tensor_bytes
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.parallel.launch import device_of, launch_environment
from pst_ds.parallel.ranks import all_ranks, on_all_ranks_at_length, raise_on_all_ranks
from pst_ds.prune.blocks import Batch, Calibration
from pst_ds.prune.folder import require_free
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.one_shot import plan_pruning, prune_files
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.train.resolved import attention_options, load_tokenizer
from pst_ds.train.run_context import require_same_data
from pst_ds.writing.from_folder import copy_small_files
from pst_ds.writing.plan import SHARD_BYTES, require_space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Result of :func:`prune_to_folder`."""

    out: Path
    record: dict[str, object]
    """Content of the folder's pruning record: settings, data, and counts per layer."""
    layers: list[PrunedLayer]
    """Outcome of each pruned layer; empty for methods "reap" and "channels"."""

    @property
    def facts(self) -> dict[str, object]:
        """The record without the lists of layers and modules."""
        return {key: value for key, value in self.record.items() if key not in ("format", "layers", "modules")}


@dataclass(frozen=True, slots=True)
class PruneJob:
    """A pretrained model to prune, how, and where to."""

    path: str
    """Model folder, or name of a model on the hub."""
    out: Path
    """Model folder to write."""
    config: PruneConfig
    """Method, sparsity and other settings."""
    pst: PSTConfig
    """For targets, pattern and overrides."""
    sparsity: float
    """Applies if neither ``config`` nor the pattern set one."""
    precision: str
    """Dtype of the blocks' computation: "bf16", "fp16" or "fp32"."""
    batches: "Callable[[PretrainedConfig], Sequence[Batch]]"
    """Called with the model's config if the method needs data; must return the same on every rank."""
    data: str
    """Name of the data."""
    facts: Mapping[str, object]
    """Facts for the pruning record."""
    attention: Mapping[str, str] = field(default_factory=dict)
    """Options of ``from_pretrained`` for the attention implementation."""
    shard_bytes: int = SHARD_BYTES
    """Size limit of a weight file."""
    check: Callable[[], None] | None = None
    """Called on every rank after each block; may raise StoppedError."""


def prune_to_folder(job: PruneJob) -> PruneReport:
    """Prune a pretrained model in one shot, and write it atomically: the one entry of one-shot pruning. Collective.

    All ranks of the process group share the work, and the result does not depend on their number. Blocks that are
    finished are kept next to ``job.out`` until all are, also if this process is killed or fails: the same call
    continues.

    Raises, on all ranks, InputError, and FloatingPointError for values that are not finite.
    """
    config = job.config
    raise_on_all_ranks(lambda: require_free(job.out, job.path))
    on_all_ranks_at_length(Pretrained(job.path, "model.path").download)
    files = raise_on_all_ranks(lambda: _opened(job))
    # Everything that can be refused is refused here, before the first batch is drawn.
    plan = raise_on_all_ranks(lambda: plan_pruning(files.model, config, job.pst, job.sparsity))
    batches: Sequence[Batch] = []
    if config.needs_data:
        batches = raise_on_all_ranks(lambda: job.batches(files.model.config))
    digest = digest_of_ranks(batches, job.data)
    data = Calibration(batches, torch.device(device_of(launch_environment())), DTYPES[job.precision], all_ranks())
    about: dict[str, object] = {"base_model": job.path, "base_fingerprint": base_fingerprint(job.path)}
    identity = {**about, "config": repr(config), "pst": plan.settings, "data": digest, "precision": job.precision}
    if plan.restarts:
        identity["attempt"] = secrets.token_hex(4)  # equals that of no earlier call, so nothing is continued
    with files.working(identity):
        if batches:
            about |= _facts_of_data(job, batches)
        about |= job.facts
        pruned = prune_files(files, plan, data)
        record = plan.record(pruned, about)
        files.publish(partial(copy_small_files, files.base.folder), record)
    return PruneReport(job.out, record, pruned.layers)


def prune_model(
    run: RunConfig | str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
    examples: ExampleSet | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    more_facts: Mapping[str, object] | None = None,
    check: Callable[[], None] | None = None,
) -> PruneReport:
    """Prune a run's pretrained model in one shot, and write it to ``out``, as :func:`prune_to_folder`. Collective.

    Args:
        run: Config of a run, its run file or its folder: names the model, the layers and the calibration data.
        out: Model folder to write; transformers loads it, with pruned weights stored as zero.
        config: Method, sparsity and other settings.
        shard_bytes: Size limit of a weight file.
        examples: Examples of ``data.train``; None loads them.
        tokenizer: The run's tokenizer; None opens it.
        more_facts: Facts to add to the pruning record.
        check: Called on every rank after each block; may raise StoppedError.

    Raises, on all ranks, InputError, and FloatingPointError for values that are not finite.
    """
    if not isinstance(run, RunConfig):
        run = load_run_or_folder(run)
    require_task(run, config)
    facts: dict[str, object] = {}
    if config.needs_data:
        facts["max_length"] = run.data.max_length
    facts |= more_facts or {}
    job = PruneJob(
        path=run.model.path,
        out=Path(out),
        config=config,
        pst=run.pst,
        sparsity=run.schedule.final_sparsity,
        precision=run.train.precision,
        batches=partial(_calibration, run, config, examples, tokenizer),
        data=run.data.train,
        facts=facts,
        attention=attention_options(run),
        shard_bytes=shard_bytes,
        check=check,
    )
    return prune_to_folder(job)


def require_task(run: RunConfig, config: PruneConfig) -> None:
    """Raise InputError for budgets that need the loss of a language model, in a run of another task."""
    if config.budgets == "saliency" and not run.task_facts.predicts_tokens:
        raise InputError(
            'budgets = "saliency" needs the loss of the next token, and task = '
            f'"{run.task}" predicts no tokens. Set budgets = "equal"'
        )


def _opened(job: PruneJob) -> ModelFiles:
    implementation = job.attention.get("attn_implementation")
    files = ModelFiles(job.path, job.out, job.shard_bytes, attn_implementation=implementation)
    require_space(job.out, files.base.file_bytes)
    files.check = job.check or files.check
    return files


def digest_of_ranks(batches: Sequence[Batch], what: str) -> str:
    """Return a SHA-256 of calibration batches. Collective. Raises InputError on all ranks unless they have the same."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            # dtype and shape too: other tensors may have the same bytes
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value.contiguous()))
    require_same_data(digest.hexdigest(), what)
    return digest.hexdigest()


def _facts_of_data(job: PruneJob, batches: Sequence[Batch]) -> dict[str, object]:
    """Return the facts of the calibration data for the record."""
    tokens = 0
    for batch in batches:
        if "attention_mask" in batch:  # without padding
            tokens += int(batch["attention_mask"].sum())
        else:
            tokens += batch["input_ids"].numel()
    return {
        "data": job.data,
        "samples": job.config.samples,
        "tokens": tokens,
        "seed": job.config.seed,
        "precision": job.precision,
    }


def _calibration(
    run: RunConfig,
    config: PruneConfig,
    examples: ExampleSet | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    model_config: "PretrainedConfig",
) -> list[Batch]:
    """Return batches of inputs: ``config.samples`` distinct examples of ``data.train``, sorted by length.

    Raises InputError if there are fewer examples.
    """
    task = task_of(run)
    tokenizer = tokenizer or load_tokenizer(run)
    task.check_model(run.data, model_config, tokenizer)
    if examples is None:
        examples = task.load(run.data, "train", tokenizer, task.label_names(run.data))
    if len(examples) < config.samples:
        remedy = f"Set samples = {len(examples)}"
        if not task.pads:  # examples are pieces of max_length tokens, so shorter ones are more
            remedy += f", or lower data.max_length = {run.data.max_length}"
        raise InputError(f"samples = {config.samples}: data.train has only {len(examples)} {task.unit}. {remedy}")
    sample, drawn = task.sample(examples, config.samples, config.seed)
    lengths = sample.lengths
    # sorted, so that a batch has little padding
    drawn.sort(key=lambda i: lengths[i])
    batches: list[Batch] = []
    for first in range(0, len(drawn), run.eval_batch_size):
        batch = task.collate(sample, drawn[first : first + run.eval_batch_size], tokenizer)
        # given labels, a model would also compute a loss
        batches.append({name: values for name, values in batch.items() if name != "labels"})
    return batches
