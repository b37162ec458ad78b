"""Settings of the grid that weights are rounded to while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pst_ds.config.checks import ConfigError, NotNegative, Share, check_fields
from pst_ds.config.methods import METHODS
from pst_ds.core.schedule import CubicSchedule, RoundingSchedule, Schedule, ScheduleConfig

_ROUNDING_ERROR = 1e-9
"""Of 1 - cooldown_fraction."""
_SEARCHES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """Training with rounded weights, so that the exported file computes what was trained (docs/how-to/methods.md)."""

    values: Literal["", "int8", "int4"] = ""
    """What every pruned layer's M . W is rounded to in the forward pass; its gradient passes straight through. Empty
    is nothing."""
    group: Literal[32, 64, 128, "row"] | None = None
    """Inputs of an output that share a scale, which must divide those of every layer; or all of them. Unset, it is
    "row" for int8 and 64 for int4."""
    activations: Literal["", "int8"] = ""
    """What the inputs of these layers are rounded to wherever the weights are, with a scale for every 64 columns of a
    token, as kernels with inputs of 8 bits do. Empty leaves them."""
    start_fraction: Share | None = None
    """Share of all steps after which weights are rounded, not before the masks are final. Unset, it is right then:
    after the ramp, or from the first step on where there is none."""
    interval: NotNegative = 0
    """Optimizer steps between two searches for the scales of least squared error; 0 is about ten searches in all. In
    between scales stay as they are."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("group", "activations", "start_fraction", "interval"):
            if not self.values and getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} does nothing without values; set values to int8 or int4"
                )

    @property
    def activation_bits(self) -> int:
        """Bits of the inputs of rounded layers: 8, or 16 where they are not rounded."""
        return 8 if self.activations else 16

    def require_fit(self, method: str, schedule: ScheduleConfig) -> None:
        """Refuse to round where no layer could be, and while the masks of ``method`` change. Raises ConfigError."""
        if not self.values:
            return
        if not METHODS[method].injects:
            others = ", ".join(repr(name) for name, each in METHODS.items() if each.injects)
            raise ConfigError(
                f'quantization.values = "{self.values}" rounds the layers that a method makes its own, and method = '
                f"{method!r} trains the model as it is; take one of {others}, or leave it out"
            )
        if METHODS[method].masks != "ramp":
            return
        cooldown = schedule.cooldown_fraction
        if cooldown == 0.0:
            raise ConfigError(
                f'quantization.values = "{self.values}" rounds weights once the masks are final, and '
                "schedule.cooldown_fraction = 0 leaves no step for it; set schedule.cooldown_fraction above 0"
            )
        if self.start_fraction is not None and self.start_fraction < 1.0 - cooldown - _ROUNDING_ERROR:
            raise ConfigError(
                f"quantization.start_fraction = {self.start_fraction}, but masks change until {1.0 - cooldown:.4g} of "
                f"the steps (schedule.cooldown_fraction = {cooldown}), and scales are those of the weights that stay. "
                f"Fix: quantization.start_fraction = {1.0 - cooldown:.4g}, or leave it out"
            )

    def make_schedule(self, masks: Schedule | None, num_steps: int) -> RoundingSchedule | None:
        """Return when a run of ``num_steps`` with the schedule ``masks`` rounds its weights; None for never.

        Raises ConfigError for a run that would end before.
        """
        if not self.values:
            return None
        final = masks.ramp_end if isinstance(masks, CubicSchedule) else 0
        start = max(final, math.floor((self.start_fraction or 0.0) * num_steps))
        if start >= num_steps:
            raise ConfigError(
                f'quantization.values = "{self.values}" rounds weights once the masks are final, which is after step '
                f"{final} of {num_steps}; train longer, or raise schedule.cooldown_fraction"
            )
        return RoundingSchedule(start, self.interval or max(1, round((num_steps - start) / _SEARCHES)), num_steps)
