"""One-shot pruning of a run's pretrained model, on examples of its own text, into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.methods import OneShotMethod
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.core.one_shot import SPREAD
from pst_ds.core.packings import WHOLE_ROW
from pst_ds.core.quantization import Grid
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.errors import InputError
from pst_ds.export.from_folder import copy_beside
from pst_ds.export.plan import require_space
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.targets import resolve_targets
from pst_ds.parallel.launch import LaunchEnvironment, device_of
from pst_ds.prune.budgets import require_room, rules_by_outliers
from pst_ds.prune.folder import load_base, record_of, require_free, scales_of, write_folder
from pst_ds.prune.layer import PrunedLayer
from pst_ds.prune.model import prune_model
from pst_ds.prune.replay import Batch
from pst_ds.prune.rules import LayerRule, layer_rules, settings_for, share_of_zeros
from pst_ds.prune.saliency import require_linear, rules_by_saliency
from pst_ds.train.model import attention_options, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """What ``pst-ds prune`` is asked for."""

    method: OneShotMethod
    sparsity: float | None = None
    """None: what the pattern has, or ``schedule.final_sparsity``."""
    pattern: str = ""
    """"" is the run's, or the method's own where that is "matrix"."""
    grid: Grid | None = None
    """What is kept is rounded to."""
    keep_zeros: bool = False
    swaps: int = 0
    budgets: str = "equal"
    spread: float | None = None
    reconstruct: int = 0
    samples: int = 128
    seed: int = 0

    @property
    def outlier_spread(self) -> float:
        """How far a block's share of zeros may be from the mean of all, of budgets "owl"."""
        return SPREAD if self.spread is None else self.spread


def prune_to_folder(
    run: RunConfig,
    asked: Pruning,
    out: Path,
    *,
    shard_bytes: int,
    examples: ExampleSet | None = None,
    more: Mapping[str, object] | None = None,
) -> tuple[dict[str, Any], list[PrunedLayer]]:
    """Prune the run's model and write it to ``out``, whole or not at all; return its record, which has ``more`` in it,
    and what was done to each layer. ``examples``: those of data.train, which are loaded where they are not given.
    One process, on its device. Raises InputError."""
    model, base = load_whole(run, out)
    layers, about = _pruned(model, run, asked, examples)
    record = record_of(layers, about | dict(more or {}))
    unused = {name: base.read(name) for name in base.unused_by(model)}
    write_folder(
        model, record, scales_of(layers), out, shard_bytes=shard_bytes, unused=unused,
        copy_beside=lambda to: copy_beside(base.folder, to),
    )  # fmt: skip
    return record, layers


def load_whole(run: RunConfig, out: Path) -> tuple[PreTrainedModel, BaseWeights]:
    """Return the run's model, and its files, once ``out`` is free and has the space. Raises InputError."""
    path = run.model.path
    require_free(out, path)
    model = load_base(path, **attention_options(run))
    base = BaseWeights(path, getattr(model, "base_model_prefix", ""))
    require_space(out, sum(param.nbytes for param in model.parameters()))
    return model, base


def pruning_device() -> torch.device:
    """Return the device that blocks are computed on."""
    return torch.device(device_of(LaunchEnvironment(0, 1, 0)))


def _needs_text(asked: Pruning) -> bool:
    return asked.method != "magnitude" or bool(asked.swaps or asked.reconstruct) or asked.budgets != "equal"


def rules_for(model: PreTrainedModel, run: RunConfig, asked: Pruning) -> tuple[PSTConfig, float, list[LayerRule]]:
    """Return the settings to prune ``model`` by, the share of zeros that is asked for, and the rule of each layer.
    Raises InputError for what cannot be, as far as it is known without text."""
    wanted = run.schedule.final_sparsity if asked.sparsity is None else asked.sparsity
    settings = settings_for(model, run.pst, asked.method, asked.pattern, budgets=asked.budgets, share=wanted)
    share = 0.0 if asked.keep_zeros else share_of_zeros(settings, asked.sparsity, run.schedule.final_sparsity)
    rules = layer_rules(
        resolve_targets(model, settings), asked.method, share, grid=asked.grid, keeps_zeros=asked.keep_zeros,
        swaps=asked.swaps,
    )  # fmt: skip
    if asked.budgets == "owl":
        require_room(rules, asked.outlier_spread)
    if asked.budgets == "saliency":
        require_linear(rules)
    return settings, share, rules


def _pruned(
    model: PreTrainedModel, run: RunConfig, asked: Pruning, examples: ExampleSet | None
) -> tuple[list[PrunedLayer], dict[str, object]]:
    """Prune ``model`` in place; return (its layers, the record's facts)."""
    settings, share, rules = rules_for(model, run, asked)
    by_outliers, by_saliency, spread = asked.budgets == "owl", asked.budgets == "saliency", asked.outlier_spread
    batches = calibration(run, model.config, asked.samples, asked.seed, examples) if _needs_text(asked) else []
    place, dtype, gated, outliers = pruning_device(), DTYPES[run.train.precision], settings.gated_norms, list[float]()
    if by_outliers:
        rules, outliers = rules_by_outliers(model, rules, batches, device=place, dtype=dtype, spread=spread)
    if by_saliency:
        rules = rules_by_saliency(model, rules, batches, device=place, dtype=dtype)
    layers = prune_model(
        model, rules, asked.method, batches, device=place, dtype=dtype, gated=gated, reconstruct=asked.reconstruct
    )
    about: dict[str, object] = {
        "method": asked.method,
        "pattern": "zeros" if asked.keep_zeros else settings.pattern,
        "sparsity_requested": None if asked.keep_zeros else share,
        **facts_of_base(run),
    }
    if asked.grid is not None:
        about |= {"values": asked.grid.values, "group": asked.grid.group or WHOLE_ROW}
    about |= {name: passes for name in ("swaps", "reconstruct") if (passes := getattr(asked, name))}
    if by_outliers or by_saliency:
        about |= {"budgets": asked.budgets} | ({"spread": spread, "outliers": outliers} if by_outliers else {})
    if batches:
        about |= facts_of_text(run, asked.samples, asked.seed, batches)
        about |= {"gated_norms": gated} if any(rule.target.is_stack for rule in rules) else {}
    return layers, about


def facts_of_base(run: RunConfig) -> dict[str, object]:
    """Return what a record says of the base model."""
    return {"base_model": run.model.path, "base_fingerprint": base_fingerprint(run.model.path)}


def facts_of_text(run: RunConfig, samples: int, seed: int, batches: Sequence[Batch]) -> dict[str, object]:
    """Return what a record says of the text."""
    tokens = (b["attention_mask"].sum() if "attention_mask" in b else b["input_ids"].numel() for b in batches)
    return {
        "data": run.data.train,
        "max_length": run.data.max_length,
        "samples": samples,
        "tokens": sum(map(int, tokens)),
        "seed": seed,
        "precision": run.train.precision,
    }


def calibration(
    run: RunConfig, model_config: PretrainedConfig, samples: int, seed: int, examples: ExampleSet | None = None
) -> list[Batch]:
    """Batch inputs of some ``examples``, by default those of data.train, drawn without repetition, sorted by length.
    Raises InputError."""
    task, tokenizer = task_of(run), load_tokenizer(run)
    task.check_model(run.data, model_config, tokenizer)
    if examples is None:
        examples = task.load(run.data, "train", tokenizer, task.label_names(run.data))
    if len(examples) < samples:
        raise InputError(
            f"data.train has {len(examples)} {task.unit}, fewer than the {samples} samples to calibrate on; lower "
            "--samples" + ("" if task.pads else f", or data.max_length = {run.data.max_length}")
        )
    sample, drawn = task.sample(examples, samples, seed)
    lengths, size = sample.lengths, run.eval_batch_size
    drawn.sort(key=lambda i: lengths[i])
    batches = [task.collate(sample, drawn[at : at + size], tokenizer) for at in range(0, len(drawn), size)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
