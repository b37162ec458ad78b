"""Settings of the one-shot pruning before training: ``[start]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Literal

from pst_ds.config.methods import METHODS
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import NotNegative, Positive, Section, settings
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.schedule import ScheduleConfig


@settings()
class StartConfig(Section):
    """One-shot pruning of the pretrained model on training data, before the first step (docs/how-to/methods.md)."""

    method: Literal["none", "magnitude", "wanda", "sparsegpt", "alps"] = "none"
    """One-shot method that chooses the initial masks, at ``schedule.initial_sparsity``, or at the final sparsity for
    methods with fixed masks. The run folder keeps the pruned model, which becomes the run's base."""
    samples: Positive = 128
    """Calibration examples from ``data.train``; all of them if there are fewer."""
    reconstruct: NotNegative = 0
    """Epochs over the calibration examples that fit the kept weights of each block to the output of the dense block."""
    budgets: Literal["equal", "owl", "saliency"] = "equal"
    """Distribution of the sparsity over layers: equal, by outliers among the weights (OWL), or by the increase in
    loss."""

    def problems(self) -> Iterator[str]:
        for field in fields(self):
            if self.method == "none" and getattr(self, field.name) != field.default:
                yield (
                    f"start.{field.name} = {getattr(self, field.name)!r} does nothing with start.method = "
                    '"none". Set start.method, such as "alps"'
                )

    def sparsity(self, method: str, schedule: ScheduleConfig) -> float:
        """Return the sparsity of the initial masks."""
        return schedule.initial_sparsity if METHODS[method].masks == "ramp" else schedule.final_sparsity

    def conflicts(self, method: str, schedule: ScheduleConfig, pst: PSTConfig) -> Iterator[str]:
        """Yield a message where the run would not start from the masks of the one-shot method."""
        if self.method == "none":
            return
        setting, masks = f'start.method = "{self.method}"', METHODS[method].masks
        sparsity = self.sparsity(method, schedule)
        if masks == "none":
            yield f"{setting} prunes, and method = {method!r} does not. Remove [start], or set another method"
            return
        if masks == "fixed" and pst.initial_mask != "zeros":
            yield (
                f"{setting} chooses the masks, and method = {method!r} would choose others. Fix: "
                'pst.initial_mask = "zeros"'
            )
        if sparsity == 0.0:
            yield (
                f"{setting} prunes to schedule.initial_sparsity, which is 0. Set schedule.initial_sparsity above 0, or "
                "remove [start]"
            )
            return
        fixed = parse_pattern(pst.pattern).fixed_sparsity
        if fixed not in (None, sparsity):
            yield (
                f'{setting} prunes to schedule.initial_sparsity = {sparsity}, but pst.pattern = "{pst.pattern}" has '
                f"sparsity {fixed}. Fix: schedule.initial_sparsity = {fixed}"
            )
        overridden = next((rule.modules for rule in pst.overrides if rule.final_sparsity is not None), None)
        if masks == "ramp" and overridden is not None:
            yield (
                f"{setting} prunes all layers to the same sparsity, and pst.overrides gives {overridden!r} a separate "
                "final_sparsity. Remove one of them, or prune with pst-ds prune and train the folder"
            )
