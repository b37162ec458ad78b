"""Settings of quantisation-aware training: ``[quantization]``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from pst_ds.config.methods import METHODS
from pst_ds.config.settings import ConfigError, NotNegative, Section, Share, settings
from pst_ds.core.schedule import CubicSchedule, RoundingSchedule, Schedule, ScheduleConfig

_TOLERANCE = 1e-9
"""Rounding error of 1 - cooldown_fraction."""
_SEARCHES = 10
"""Searches for scales in a run, unless ``quantization.interval`` is set."""


@settings
class QuantizationConfig(Section):
    """Training with quantised weights, so that the exported file computes what was trained (docs/how-to/methods.md)."""

    values: Literal["", "int8", "int4"] = ""
    """Type to which the masked weights M . W of every pruned layer are quantised in the forward pass. Gradients use the
    straight-through estimator. Empty switches quantisation off."""
    group: Literal[32, 64, 128, "row"] | None = None
    """Consecutive inputs of an output that share a scale; must divide the inputs of every layer. "row" is all of them.
    Unset is "row" for int8 and 64 for int4."""
    activations: Literal["", "int8"] = ""
    """Type to which the inputs of these layers are quantised along with the weights, with a scale per 64 columns of a
    token, as in int8 kernels. Empty keeps them."""
    start_fraction: Share | None = None
    """Share of all steps before quantisation starts; masks must be final by then. Unset starts as soon as masks are
    final: after the ramp, or at the first step if there is none."""
    interval: NotNegative = 0
    """Optimizer steps between searches for the scales with the least squared error; 0 is about ten searches per run.
    Scales do not change in between."""

    def problems(self) -> Iterator[str]:
        for name in ("group", "activations", "start_fraction", "interval"):
            if not self.values and getattr(self, name):
                yield (
                    f"quantization.{name} = {getattr(self, name)!r} does nothing without quantization.values. Set "
                    "quantization.values to int8 or int4"
                )

    @property
    def activation_bits(self) -> int:
        """Bits of the inputs of quantised layers: 8, or 16 if they are not quantised."""
        return 8 if self.activations else 16

    def conflicts(self, method: str, schedule: ScheduleConfig) -> Iterator[str]:
        """Yield a message where no layer can be quantised, or where masks still change."""
        if not self.values:
            return
        if not METHODS[method].injects:
            others = ", ".join(repr(name) for name, each in METHODS.items() if each.injects)
            yield (
                f'quantization.values = "{self.values}" quantises injected layers, and method = {method!r} injects '
                f"none. Set method to one of {others}, or remove quantization.values"
            )
        if METHODS[method].masks != "ramp":
            return
        cooldown = schedule.cooldown_fraction
        if cooldown == 0.0:
            yield (
                f'quantization.values = "{self.values}" starts once masks are final, and schedule.cooldown_fraction = '
                "0 leaves no step for it. Set schedule.cooldown_fraction above 0"
            )
        elif self.start_fraction is not None and self.start_fraction < 1.0 - cooldown - _TOLERANCE:
            yield (
                f"quantization.start_fraction = {self.start_fraction}, but masks change until {1.0 - cooldown:.4g} of "
                f"the steps (schedule.cooldown_fraction = {cooldown}), and scales are searched for final masks. "
                f"Fix: quantization.start_fraction = {1.0 - cooldown:.4g}, or remove it"
            )

    def make_schedule(self, masks: Schedule | None, num_steps: int) -> RoundingSchedule | None:
        """Return when a run of ``num_steps`` with the schedule ``masks`` quantises its weights; None for never.

        Raises ConfigError for a run that ends before quantisation starts.
        """
        if not self.values:
            return None
        final = masks.ramp_end if isinstance(masks, CubicSchedule) else 0
        start = max(final, math.floor((self.start_fraction or 0.0) * num_steps))
        if start >= num_steps:
            raise ConfigError(
                f'quantization.values = "{self.values}" starts once masks are final, which is after step {final} of '
                f"{num_steps}. Raise train.num_steps or schedule.cooldown_fraction"
            )
        return RoundingSchedule(start, self.interval or max(1, round((num_steps - start) / _SEARCHES)), num_steps)
