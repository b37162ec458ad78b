"""Prune the files of a model by a :class:`PruneConfig`: one plan for each kind of method, and what carries it out.

Methods of weights prune the layers of one block after another, "reap" drops whole experts, and "channels" makes layers
smaller.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pst_ds.config.methods import OneShotMethod
from pst_ds.config.one_shot import CHANNELS, REAP, PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.fractions import percent_hint
from pst_ds.core.packings import WHOLE_ROW
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import InputError
from pst_ds.nn.cut_config import cut_config, experts_left, number_of_experts
from pst_ds.nn.model_structure import experts_modules, text_config
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import Calibration, find_blocks
from pst_ds.prune.budgets import require_linear, rules_by_saliency
from pst_ds.prune.channels import cut_channels
from pst_ds.prune.folder import FORMAT, record_of
from pst_ds.prune.model import prune_layers
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.outcome import CutLayer, PrunedLayer
from pst_ds.prune.rules import LayerRule, layer_rules, names_of, requested_sparsity, settings_for
from pst_ds.prune.whole_experts import KeptExperts, drop_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning did to a model."""

    facts: dict[str, object]
    """Facts for the pruning record: the method, its settings, and totals."""
    layers: list[PrunedLayer]
    """Outcome of each pruned layer; empty for methods that remove experts or channels."""


class PruningPlan(Protocol):
    """How a model is pruned, checked against the model."""

    @property
    def settings(self) -> str:
        """The settings that decide the result besides the PruneConfig. A run with others does not continue this one."""

    @property
    def restarts(self) -> bool:
        """True if an interrupted run starts from the first block again."""

    def prune(self, files: ModelFiles, data: Calibration) -> Pruned:
        """Prune the model in ``files``. Collective. Raises InputError, and FloatingPointError."""

    def record(self, pruned: Pruned, about: Mapping[str, object]) -> dict[str, object]:
        """Return the content of the pruning record, with facts ``about`` the base model and the data."""


def plan_pruning(model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig, final_sparsity: float) -> PruningPlan:
    """Return how ``config`` prunes ``model``, which may be on the meta device and is unchanged.

    ``pst``: PST settings of the run, for targets, pattern and overrides. ``final_sparsity`` applies if ``config`` and
    the pattern do not set one. Raises InputError for everything that can be checked without calibration data, so that
    it is found before the first block is pruned.
    """
    if config.method == CHANNELS:
        return ChannelPlan.of(model, config, pst)
    if config.method == REAP:
        return ExpertPlan.of(model, config, pst, final_sparsity)
    return LayerPlan.of(model, config, pst, final_sparsity)


def prune_files(files: ModelFiles, plan: PruningPlan, data: Calibration) -> Pruned:
    """Prune the model in ``files``, by any method. Collective.

    ``data``: without batches if the method needs none. Raises InputError, and FloatingPointError for values that are
    not finite.
    """
    return plan.prune(files, data)


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """Remove feed-forward channels."""

    config: PruneConfig
    excluded: str | tuple[str, ...]
    """Modules that are not cut."""
    restarts: bool = False

    @classmethod
    def of(cls, model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig) -> "ChannelPlan":
        assert config.ffn is not None
        cut_config(copy.deepcopy(model.config), config.ffn)  # for its errors; the cut is planned with the data
        return cls(config, pst.exclude_modules)

    @property
    def settings(self) -> str:
        return str(self.excluded)

    def prune(self, files: ModelFiles, data: Calibration) -> Pruned:
        before = files.model.num_parameters()
        modules, settings = cut_channels(files, self.config, self.excluded, data)
        facts: dict[str, object] = {
            "method": CHANNELS,
            "ffn": self.config.ffn,
            "parameters_before": before,
            "parameters": files.model.num_parameters(),
            "config": settings,
            "modules": _facts_by_name(modules),
        }
        return Pruned(facts, layers=[])

    def record(self, pruned: Pruned, about: Mapping[str, object]) -> dict[str, object]:
        return _record_without_layers(pruned, about)


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Drop whole experts."""

    share: float
    """Fraction of experts to drop, in [0, 1)."""
    settings: str
    restarts: bool = True
    """Its blocks change only after a pass through all, which is not repeated halfway."""

    @classmethod
    def of(cls, model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig, final_sparsity: float) -> "ExpertPlan":
        share = _sparsity_asked(config, final_sparsity)
        if not 0.0 <= share < 1.0:
            hint = percent_hint(share)
            raise InputError(f"sparsity = {share} must be in [0, 1): it is the fraction of experts to drop{hint}")
        _, number = number_of_experts(model, 'method = "reap"')
        # Both are called for their errors only, before the calibration data are read; pruning computes them again.
        experts_left(number, share, text_config(model), "sparsity =")
        find_blocks(model, list(experts_modules(model)))
        return cls(share, str(pst.exclude_modules))

    def prune(self, files: ModelFiles, data: Calibration) -> Pruned:
        modules = drop_experts(files.model, self.share, data, source_of=files.source)
        facts: dict[str, object] = {
            "method": REAP,
            "sparsity_requested": self.share,
            "experts": len(modules[0].kept),
            "experts_before": len(modules[0].scores),
            "modules": _facts_by_name(modules),
        }
        return Pruned(facts, layers=[])

    def record(self, pruned: Pruned, about: Mapping[str, object]) -> dict[str, object]:
        return _record_without_layers(pruned, about)


def _record_without_layers(pruned: Pruned, about: Mapping[str, object]) -> dict[str, object]:
    return {"format": FORMAT, **about, **pruned.facts, "layers": []}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Prune the weights of layers."""

    config: PruneConfig
    method: OneShotMethod
    pst: PSTConfig
    """The effective settings, with the pattern to prune with."""
    sparsity: float
    rules: list[LayerRule]
    """The rule of each layer."""
    restarts: bool = False

    @classmethod
    def of(cls, model: "PreTrainedModel", config: PruneConfig, pst: PSTConfig, final_sparsity: float) -> "LayerPlan":
        method = _method_of(config)
        effective = settings_for(
            model,
            pst,
            method,
            pattern=config.pattern,
            budgets=config.budgets,
            share=_sparsity_asked(config, final_sparsity),
        )
        sparsity = 0.0
        if not config.keep_zeros:
            sparsity = requested_sparsity(effective, config.sparsity, final_sparsity)
        targets = resolve_targets(model, effective)
        rules = layer_rules(targets, method, sparsity, grid=_grid_of(config), keeps_zeros=config.keep_zeros)
        # Both are called for their errors only, before the calibration data are read.
        if config.budgets == "saliency":
            require_linear(rules)
        if config.needs_data:
            find_blocks(model, names_of(rules))
        return cls(config, method, pst=effective, sparsity=sparsity, rules=rules)

    @property
    def settings(self) -> str:
        return f"{self.pst} {self.sparsity}"

    def prune(self, files: ModelFiles, data: Calibration) -> Pruned:
        rules = self.rules
        if self.config.budgets == "saliency":
            rules = _with_budgets(files, rules, data)
        if self.method == "magnitude" and not self.config.reconstruct:
            layers = _by_magnitude(files, rules, data)
        else:
            layers = prune_layers(
                files.model, rules, self.method, data, reconstruct=self.config.reconstruct, source_of=files.source
            )
        return Pruned(_facts_of(self.config, self.pst, self.sparsity), layers)

    def record(self, pruned: Pruned, about: Mapping[str, object]) -> dict[str, object]:
        return record_of(pruned.layers, {**pruned.facts, **about})


def _sparsity_asked(config: PruneConfig, final_sparsity: float) -> float:
    """Return the sparsity of the command, or else that of the run."""
    if config.sparsity is None:
        return final_sparsity
    return config.sparsity


def _facts_by_name(modules: Sequence[KeptExperts] | Sequence[CutLayer]) -> dict[str, object]:
    """Return what a record says of each module."""
    return {module.name: module.facts for module in modules}


def _by_magnitude(files: ModelFiles, rules: Sequence[LayerRule], data: Calibration) -> list[PrunedLayer]:
    """Prune part by part, without running blocks, so that layers outside of blocks can be pruned too."""
    by_part: dict[str, list[LayerRule]] = {}
    for rule in rules:
        by_part.setdefault(files.part_of(rule.target.name), []).append(rule)
    outcome_of: dict[str, PrunedLayer] = {}
    for part, rules_of_part in by_part.items():
        with files.loaded(part):
            layers = files.outcome(part, PrunedLayer)
            # an interrupted run may have finished it
            if layers is None:
                layers = prune_layers(files.model, rules_of_part, "magnitude", data)
                files.finish(part, layers)
        for layer in layers:
            outcome_of[layer.name] = layer
    return [outcome_of[name] for name in names_of(rules)]


def _with_budgets(files: ModelFiles, rules: Sequence[LayerRule], data: Calibration) -> list[LayerRule]:
    """Return the rules with their budgets, computed once also for a run that was killed. Collective."""

    def compute() -> dict[str, Tensor]:
        with_budgets = rules_by_saliency(files.model, rules, data, source_of=files.source)
        # In fp64: a budget is a float that prunes an exact count, and rounded to fp32 it could prune another.
        tensors = {"sparsities": torch.tensor([rule.sparsity for rule in with_budgets], dtype=torch.float64)}
        for rule in with_budgets:
            if rule.output_factors is not None:
                tensors[rule.target.name] = rule.output_factors
        return tensors

    budgets = files.remember("budgets", compute)
    with_budgets: list[LayerRule] = []
    for rule, sparsity in zip(rules, budgets["sparsities"].tolist(), strict=True):
        with_budgets.append(replace(rule, sparsity=sparsity, output_factors=budgets.get(rule.target.name)))
    return with_budgets


def _facts_of(config: PruneConfig, settings: PSTConfig, sparsity: float) -> dict[str, object]:
    """Return what a record says of the settings that weights were pruned with."""
    facts: dict[str, object] = {"method": config.method, "pattern": settings.pattern, "sparsity_requested": sparsity}
    if config.keep_zeros:
        facts["pattern"] = "zeros"
        facts["sparsity_requested"] = None
    grid = _grid_of(config)
    if grid is not None:
        facts["values"] = grid.values
        facts["group"] = grid.group or WHOLE_ROW
    if config.reconstruct:
        facts["reconstruct"] = config.reconstruct
    if config.budgets != "equal":
        facts["budgets"] = config.budgets
    return facts


def _method_of(config: PruneConfig) -> OneShotMethod:
    """Return the method that prunes weights; the two others have other plans."""
    assert config.method != REAP
    assert config.method != CHANNELS
    return config.method


def _grid_of(config: PruneConfig) -> Grid | None:
    """Return the quantisation scheme of the pruned layers, if any. Raises InputError."""
    if not config.bits:
        return None
    try:
        return grid_of(f"int{config.bits}", config.group)
    except ValueError as error:
        raise InputError(f"bits = {config.bits} and group = {config.group!r}: {error}") from None
