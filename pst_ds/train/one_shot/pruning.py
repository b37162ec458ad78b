"""Prune a run's pretrained model once, on calibration examples of its training data, and write it as a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import REAP, PruneConfig
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.errors import InputError
from pst_ds.export.from_folder import copy_small_files
from pst_ds.export.plan import SHARD_BYTES, require_space
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.nn.base_model import DTYPES
from pst_ds.parallel.launch import LaunchEnvironment, device_of
from pst_ds.prune.blocks import Batch, Calibration
from pst_ds.prune.folder import FORMAT, load_base, record_of, require_free, scales_of, write_folder
from pst_ds.prune.layer import PrunedLayer
from pst_ds.prune.one_shot import plan_layers, prune_loaded
from pst_ds.prune.whole_experts import KeptExperts, drop_experts
from pst_ds.train.model import attention_options, load_tokenizer
from pst_ds.train.one_shot.own_text import own_batches

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Result of :func:`prune_model`."""

    out: Path
    record: dict[str, object]
    """Content of the folder's pruning record: settings, data, and counts per layer."""
    layers: list[PrunedLayer]
    """Outcome of each pruned layer; empty for method "reap"."""
    modules: list[KeptExperts]
    """Outcome of each module of experts, for method "reap"."""

    @property
    def facts(self) -> dict[str, object]:
        """The record without the lists of layers and modules."""
        return {key: value for key, value in self.record.items() if key not in ("format", "layers", "modules")}


def prune_model(
    run: RunConfig | str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
    examples: ExampleSet | None = None,
    more_facts: Mapping[str, object] | None = None,
) -> PruneReport:
    """Prune a run's pretrained model in one shot, and write it to ``out``, atomically. Runs in one process.

    Args:
        run: Config of a run, its run file or its folder: names the model, the layers and the calibration data.
        out: Model folder to write; transformers loads it, with pruned weights stored as zero.
        config: Method, sparsity and other settings.
        shard_bytes: Size limit of a weight file.
        examples: Examples of ``data.train``; None loads them.
        more_facts: Facts to add to the pruning record.

    Raises InputError, and FloatingPointError for values that are not finite.
    """
    run, out = run if isinstance(run, RunConfig) else load_run_or_folder(run), Path(out)
    require_free(out, run.model.path)
    model = load_base(run.model.path, **attention_options(run))
    base = BaseWeights(run.model.path, getattr(model, "base_model_prefix", ""))
    require_space(out, sum(param.nbytes for param in model.parameters()))
    planned = None if config.method == REAP else plan_layers(model, config, run.pst, run.schedule.final_sparsity)
    batches = _calibration(run, model.config, config, examples) if config.needs_data else []
    device = torch.device(device_of(LaunchEnvironment(0, 1, 0)))
    data = Calibration(batches, device, DTYPES[run.train.precision])
    layers, modules, unused = list[PrunedLayer](), list[KeptExperts](), {}
    if planned is None:
        modules, facts = _drop_experts(model, run, config, data)
    else:
        layers, facts = prune_loaded(model, config, planned, data)
        unused = {name: base.read(name) for name in base.unused_by(model)}
    facts |= {"base_model": run.model.path, "base_fingerprint": base_fingerprint(run.model.path)}
    facts |= (_facts_of_data(run, config, batches) if batches else {}) | dict(more_facts or {})
    if config.method == REAP:
        kept = {m.name: {"kept": m.kept, "scores": m.scores, "expert_tokens": m.tokens} for m in modules}
        record: dict[str, object] = {"format": FORMAT, **facts, "layers": [], "modules": kept}
    else:
        record = record_of(layers, facts)
    copy = partial(copy_small_files, base.folder)
    write_folder(model, record, scales_of(layers), out, shard_bytes=shard_bytes, unused=unused, copy_small_files=copy)
    return PruneReport(out, record, layers, modules)


def _drop_experts(
    model: PreTrainedModel, run: RunConfig, config: PruneConfig, data: Calibration
) -> tuple[list[KeptExperts], dict[str, object]]:
    """Drop experts of ``model`` in place; return the outcome and facts for the record. Raises InputError."""
    share = run.schedule.final_sparsity if config.sparsity is None else config.sparsity
    if not 0.0 <= share < 1.0:
        raise InputError(f"--sparsity {share} must be in [0, 1): it is the fraction of experts to drop")
    modules = drop_experts(model, share, data)
    facts: dict[str, object] = {"method": REAP, "sparsity_requested": share}
    return modules, facts | {"experts": len(modules[0].kept), "experts_before": len(modules[0].scores)}


def _facts_of_data(run: RunConfig, config: PruneConfig, batches: Sequence[Batch]) -> dict[str, object]:
    """Return the facts of the calibration data for the record."""
    tokens = (b["attention_mask"].sum() if "attention_mask" in b else b["input_ids"].numel() for b in batches)
    return {
        "data": config.own_text or run.data.train,
        "own_text": bool(config.own_text),
        "max_length": run.data.max_length,
        "samples": config.samples,
        "tokens": sum(map(int, tokens)),
        "seed": config.seed,
        "precision": run.train.precision,
    }


def _calibration(
    run: RunConfig, model_config: PretrainedConfig, config: PruneConfig, examples: ExampleSet | None
) -> list[Batch]:
    """Return batches of inputs: ``config.samples`` distinct examples of ``data.train``, or own text,
    sorted by length.

    Raises InputError if there are fewer examples.
    """
    task, tokenizer = task_of(run), load_tokenizer(run)
    task.check_model(run.data, model_config, tokenizer)
    if config.own_text:
        return own_batches(run, config.own_text, config.samples, config.seed)
    if examples is None:
        examples = task.load(run.data, "train", tokenizer, task.label_names(run.data))
    if len(examples) < config.samples:
        raise InputError(
            f"--samples {config.samples}: data.train has only {len(examples)} {task.unit}. Lower --samples"
            + ("" if task.pads else f", or data.max_length = {run.data.max_length}")
        )
    sample, drawn = task.sample(examples, config.samples, config.seed)
    lengths, size = sample.lengths, run.eval_batch_size
    drawn.sort(key=lambda i: lengths[i])
    batches = [task.collate(sample, drawn[at : at + size], tokenizer) for at in range(0, len(drawn), size)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
