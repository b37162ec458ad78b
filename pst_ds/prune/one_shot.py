"""Prune a loaded model by a :class:`PruneConfig`: rules of its layers, budgets, and the pruning itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pst_ds.config.methods import OneShotMethod
from pst_ds.config.one_shot import CHANNELS, REAP, PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.packings import WHOLE_ROW
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import InputError
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.budgets import require_linear, rules_by_saliency
from pst_ds.prune.model import prune_layers
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.prune.rules import LayerRule, layer_rules, requested_sparsity, settings_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_layers(
    model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig, final_sparsity: float
) -> tuple[PSTConfig, float, list[LayerRule]]:
    """Return the effective PST settings, the requested sparsity, and the rule of each layer.

    ``pst``: PST settings of the run, for targets, pattern and overrides. ``final_sparsity`` applies if ``config`` and
    the pattern do not set one. Raises InputError for everything that can be checked without calibration data.
    """
    method, wanted = _method_of(config), final_sparsity if config.sparsity is None else config.sparsity
    settings = settings_for(model, pst, method, config.pattern, budgets=config.budgets, share=wanted)
    sparsity = 0.0 if config.keep_zeros else requested_sparsity(settings, config.sparsity, final_sparsity)
    rules = layer_rules(
        resolve_targets(model, settings), method, sparsity, grid=_grid_of(config), keeps_zeros=config.keep_zeros
    )
    if config.budgets == "saliency":
        require_linear(rules)
    return settings, sparsity, rules


def prune_files(
    files: ModelFiles, config: PruneConfig, planned: tuple[PSTConfig, float, list[LayerRule]], data: Calibration
) -> tuple[list[PrunedLayer], dict[str, object]]:
    """Prune the model in ``files``; return the outcomes, and facts for the pruning record. Collective.

    ``planned``: result of :func:`plan_layers`. ``data``: without batches if ``config.needs_data`` is False. Raises
    InputError, and FloatingPointError for values that are not finite.
    """
    settings, sparsity, rules = planned
    if config.budgets == "saliency":
        rules = _with_budgets(files, rules, data)
    if config.method == "magnitude" and not config.reconstruct:
        layers = _by_magnitude(files, rules, data)
    else:
        layers = prune_layers(
            files.model, rules, _method_of(config), data, reconstruct=config.reconstruct, source_of=files.source
        )
    return layers, _facts_of(config, settings, sparsity)


def _by_magnitude(files: ModelFiles, rules: Sequence[LayerRule], data: Calibration) -> list[PrunedLayer]:
    by_part: dict[str, list[LayerRule]] = {}
    for rule in rules:
        by_part.setdefault(files.part_of(rule.target.name), []).append(rule)
    found: dict[str, PrunedLayer] = {}
    for part, own in by_part.items():
        with files.loaded(part):
            layers = files.outcome(part, PrunedLayer)
            if layers is None:
                layers = prune_layers(files.model, own, "magnitude", data)
                files.finish(part, layers)
        found |= {layer.name: layer for layer in layers}
    return [found[rule.target.name] for rule in rules]


def _with_budgets(files: ModelFiles, rules: Sequence[LayerRule], data: Calibration) -> list[LayerRule]:
    """Return the rules with their budgets, computed once also for a run that was killed. Collective."""

    def compute() -> dict[str, Tensor]:
        made = rules_by_saliency(files.model, rules, data, source_of=files.source)
        sparsities = torch.tensor([rule.sparsity for rule in made], dtype=torch.float64)
        factors = {r.target.name: r.output_factors for r in made if r.output_factors is not None}
        return {"sparsities": sparsities, **factors}

    held = files.remember("budgets", compute)
    pairs = zip(rules, held["sparsities"].tolist(), strict=True)
    return [replace(r, sparsity=share, output_factors=held.get(r.target.name)) for r, share in pairs]


def _facts_of(config: PruneConfig, settings: PSTConfig, sparsity: float) -> dict[str, object]:
    facts: dict[str, object] = {
        "method": config.method,
        "pattern": "zeros" if config.keep_zeros else settings.pattern,
        "sparsity_requested": None if config.keep_zeros else sparsity,
    }
    if (grid := _grid_of(config)) is not None:
        facts |= {"values": grid.values, "group": grid.group or WHOLE_ROW}
    if config.reconstruct:
        facts["reconstruct"] = config.reconstruct
    return facts if config.budgets == "equal" else facts | {"budgets": config.budgets}


def _method_of(config: PruneConfig) -> OneShotMethod:
    assert config.method != REAP
    assert config.method != CHANNELS
    return config.method


def _grid_of(config: PruneConfig) -> Grid | None:
    try:
        return grid_of(f"int{config.bits}", config.group) if config.bits else None
    except ValueError as error:
        raise InputError(f"bits = {config.bits} and group = {config.group!r}: {error}") from None
