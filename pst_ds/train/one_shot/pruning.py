"""Prune a run's pretrained model once, on calibration examples of its training data, and write it as a model folder."""

import copy
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import CHANNELS, REAP, PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.core.fractions import percent_hint
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.errors import InputError
from pst_ds.formats.safetensors_file import tensor_bytes
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.cut_config import cut_config, experts_left, number_of_experts
from pst_ds.nn.model_structure import experts_modules, text_config
from pst_ds.parallel.launch import device_of, launch_environment
from pst_ds.parallel.ranks import all_ranks, on_all_ranks_at_length, raise_on_all_ranks
from pst_ds.prune.blocks import Batch, Calibration, find_blocks
from pst_ds.prune.channels import cut_channels
from pst_ds.prune.folder import FORMAT, record_of, require_free
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.one_shot import plan_layers, prune_files
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.prune.rules import LayerRule
from pst_ds.prune.whole_experts import drop_experts
from pst_ds.train.resolved import attention_options, load_tokenizer
from pst_ds.train.run_context import require_same_data
from pst_ds.writing.from_folder import copy_small_files
from pst_ds.writing.plan import SHARD_BYTES, require_space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Result of :func:`prune_model`."""

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
class PruneInput:
    """A pretrained model, and what a run or a script says about it and its calibration data."""

    path: str
    """Model folder, or name of a model on the hub."""
    pst: PSTConfig
    """For targets, pattern and overrides."""
    sparsity: float
    """Applies if neither the settings of the method nor the pattern set one."""
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
    """Prune a run's pretrained model in one shot, and write it to ``out``, as :func:`prune_files_of`. Collective.

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
    run = run if isinstance(run, RunConfig) else load_run_or_folder(run)
    require_task(run, config)
    given = PruneInput(
        run.model.path,
        run.pst,
        run.schedule.final_sparsity,
        run.train.precision,
        partial(_calibration, run, config, examples, tokenizer),
        run.data.train,
        {**({"max_length": run.data.max_length} if config.needs_data else {}), **(more_facts or {})},
        attention_options(run),
    )
    return prune_files_of(given, Path(out), config, shard_bytes=shard_bytes, check=check)


def prune_files_of(
    given: PruneInput,
    out: Path,
    config: PruneConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[], None] | None = None,
) -> PruneReport:
    """Prune a pretrained model in one shot, and write it to ``out``, atomically. Collective.

    All ranks of the process group share the work, and the result does not depend on their number. Blocks that are
    finished are kept next to ``out`` until all are, also if this process is killed or fails: the same call continues.

    Raises, on all ranks, InputError, and FloatingPointError for values that are not finite.
    """
    raise_on_all_ranks(lambda: require_free(out, given.path))
    on_all_ranks_at_length(Pretrained(given.path, "model.path").download)
    files = raise_on_all_ranks(lambda: _opened(given, out, shard_bytes))
    files.check = check or files.check
    planned = raise_on_all_ranks(lambda: require_prunable(files.model, config, given.pst, given.sparsity))
    batches = raise_on_all_ranks(lambda: given.batches(files.model.config)) if config.needs_data else []
    digest = digest_of_ranks(batches, given.data)
    device = torch.device(device_of(launch_environment()))
    data = Calibration(batches, device, DTYPES[given.precision], all_ranks())
    about: dict[str, object] = {"base_model": given.path, "base_fingerprint": base_fingerprint(given.path)}
    settings = str(given.pst.exclude_modules) if planned is None else f"{planned[0]} {planned[1]}"
    plan = {**about, "config": repr(config), "pst": settings, "data": digest, "precision": given.precision}
    if config.method == REAP:  # its blocks change only after a pass through all, which is not repeated halfway
        plan["attempt"] = secrets.token_hex(4)
    with files.working(plan):
        about |= (_facts_of_data(given, config, batches) if batches else {}) | dict(given.facts)
        layers = list[PrunedLayer]()
        if planned is None:
            removed = (_drop_experts if config.method == REAP else _cut_channels)(files, given, config, data)
            record = {"format": FORMAT, **about, **removed, "layers": []}
        else:
            layers, facts = prune_files(files, config, planned, data)
            record = record_of(layers, facts | about)
        files.publish(partial(copy_small_files, files.base.folder), record)
    return PruneReport(out, record, layers)


def require_task(run: RunConfig, config: PruneConfig) -> None:
    """Raise InputError for budgets that need the loss of a language model, in a run of another task."""
    if config.budgets == "saliency" and not run.task_facts.predicts_tokens:
        raise InputError(
            'budgets = "saliency" needs the loss of the next token, and task = '
            f'"{run.task}" predicts no tokens. Set budgets = "equal"'
        )


def require_prunable(
    model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig, final_sparsity: float
) -> tuple[PSTConfig, float, list[LayerRule]] | None:
    """Return :func:`plan_layers` of a model; None for methods that remove experts or channels.

    Raises InputError for everything that can be checked without calibration data, so that it is found before the first
    block is pruned. ``model`` may be on the meta device; it is unchanged.
    """
    if config.method == CHANNELS:
        assert config.ffn is not None
        cut_config(copy.deepcopy(model.config), config.ffn)
        return None
    if config.method == REAP:
        share = _share_of_experts(config, final_sparsity)
        _, number = number_of_experts(model, 'method = "reap"')
        experts_left(number, share, text_config(model), "sparsity =")
        find_blocks(model, list(experts_modules(model)))
        return None
    planned = plan_layers(model, config, pst, final_sparsity)
    if config.needs_data:
        find_blocks(model, [rule.target.name for rule in planned[2]])
    return planned


def _share_of_experts(config: PruneConfig, final_sparsity: float) -> float:
    """Return the fraction of experts to drop. Raises InputError if it is out of range."""
    share = final_sparsity if config.sparsity is None else config.sparsity
    if not 0.0 <= share < 1.0:
        hint = percent_hint(share)
        raise InputError(f"sparsity = {share} must be in [0, 1): it is the fraction of experts to drop{hint}")
    return share


def _opened(given: PruneInput, out: Path, shard_bytes: int) -> ModelFiles:
    files = ModelFiles(given.path, out, shard_bytes, attn_implementation=given.attention.get("attn_implementation"))
    require_space(out, files.base.file_bytes)
    return files


def digest_of_ranks(batches: Sequence[Batch], what: str) -> str:
    """Return a SHA-256 of calibration batches. Collective. Raises InputError on all ranks unless they have the same."""
    digest = hashlib.sha256()
    for name, value in (item for batch in batches for item in sorted(batch.items())):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value.contiguous()))
    require_same_data(digest.hexdigest(), what)
    return digest.hexdigest()


def _drop_experts(files: ModelFiles, given: PruneInput, config: PruneConfig, data: Calibration) -> dict[str, object]:
    """Drop a share of the experts; return facts for the record. Collective. Raises InputError."""
    share = _share_of_experts(config, given.sparsity)
    modules = drop_experts(files.model, share, data, source_of=files.source)
    return {
        "method": REAP,
        "sparsity_requested": share,
        "experts": len(modules[0].kept),
        "experts_before": len(modules[0].scores),
        "modules": {module.name: module.facts for module in modules},
    }


def _cut_channels(files: ModelFiles, given: PruneInput, config: PruneConfig, data: Calibration) -> dict[str, object]:
    """Remove channels; return facts for the record. Collective. Raises InputError."""
    before = files.model.num_parameters()
    modules, settings = cut_channels(files, config, given.pst.exclude_modules, data)
    return {
        "method": CHANNELS,
        "ffn": config.ffn,
        "parameters_before": before,
        "parameters": files.model.num_parameters(),
        "config": settings,
        "modules": {module.name: module.facts for module in modules},
    }


def _facts_of_data(given: PruneInput, config: PruneConfig, batches: Sequence[Batch]) -> dict[str, object]:
    """Return the facts of the calibration data for the record."""
    tokens = (b["attention_mask"].sum() if "attention_mask" in b else b["input_ids"].numel() for b in batches)
    return {
        "data": given.data,
        "samples": config.samples,
        "tokens": sum(map(int, tokens)),
        "seed": config.seed,
        "precision": given.precision,
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
        raise InputError(
            f"samples = {config.samples}: data.train has only {len(examples)} {task.unit}. Set samples = "
            f"{len(examples)}" + ("" if task.pads else f", or lower data.max_length = {run.data.max_length}")
        )
    sample, drawn = task.sample(examples, config.samples, config.seed)
    lengths, size = sample.lengths, run.eval_batch_size
    drawn.sort(key=lambda i: lengths[i])
    batches = [task.collate(sample, drawn[at : at + size], tokenizer) for at in range(0, len(drawn), size)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
