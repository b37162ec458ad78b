"""Schedules of sparsity, quantisation and learning rates, and the default learning rates.

Every schedule is a pure function of the applied optimizer steps, so there is no state to save or resume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol

from pst_ds.core.fractions import percent_hint

LISTENED = 16
"""Batches before a solve whose inputs and gradients it uses."""


class Schedule(Protocol):
    """The methods that the training loop calls. ``step`` counts applied optimizer steps."""

    @property
    def final_sparsity(self) -> float: ...

    def sparsity_at(self, step: int) -> float:
        """Return the sparsity of the masks after ``step`` applied steps."""
        ...

    def progress_at(self, step: int) -> float:
        """Return ``sparsity_at`` as a share of ``final_sparsity``, in [0, 1], which layers with their own follow."""
        ...

    def updates_masks_at(self, step: int) -> bool:
        """Return whether new masks are selected right after step ``step`` (0 is before the first)."""
        ...

    def is_final(self, step: int) -> bool:
        """Return whether the masks no longer change from ``step`` on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The sparsity over the course of a run.

    Raises ValueError for fractions outside their ranges, or a warm-up and cool-down without a ramp between them.
    """

    final_sparsity: float = 0.9
    """Sparsity at the end, in [0, 1). 0 prunes only the layers with a sparsity in ``pst.overrides``."""
    initial_sparsity: float = 0.0
    """Sparsity until the ramp starts, at most ``final_sparsity``."""
    warmup_fraction: float = 0.1
    """Fraction of all steps at ``initial_sparsity``, before the ramp."""
    cooldown_fraction: float = 0.3
    """Fraction of all steps at ``final_sparsity``, after the ramp, with fixed masks."""
    update_interval: int = 4
    """Optimizer steps between mask updates; the last update is always at the end of the ramp."""
    solves: int = 0
    """Masks that method "pst" chooses by ALPS in place of learned scores, evenly spaced along the ramp: each on inputs
    and gradients of the last 16 batches, with new values for the kept weights (docs/how-to/methods.md)."""

    def __post_init__(self) -> None:
        _require_numbers(self)
        first = self.initial_sparsity
        last = self.final_sparsity
        _require(0.0 <= last < 1.0, "final_sparsity", last, "in [0, 1)")
        _require(0.0 <= first <= last, "initial_sparsity", first, f"in [0, final_sparsity = {last}]")
        _require(self.update_interval >= 1, "update_interval", self.update_interval, "at least 1")
        _require(self.solves >= 0, "solves", self.solves, "at least 0")
        for name in ("warmup_fraction", "cooldown_fraction"):
            _require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "in [0, 1)")
        if self.warmup_fraction + self.cooldown_fraction >= 1.0:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + cooldown_fraction {self.cooldown_fraction} leave no steps "
                "for the ramp; their sum must be below 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CubicSchedule(ScheduleConfig):
    """A cubic ramp between a warm-up and a cool-down (Zhu and Gupta 2017, arXiv 1710.01878).

    Args:
        num_steps: optimizer steps of the whole run, at least 1.
        final_sparsity: sparsity at the end, in [0, 1).
        initial_sparsity: sparsity until the ramp starts, at most ``final_sparsity``.
        warmup_fraction: fraction of all steps before the ramp.
        cooldown_fraction: fraction of all steps after the ramp, with fixed masks.
        update_interval: optimizer steps between mask updates.
        solves: mask updates that replace those at ``update_interval``; the model is dense before the first.

    Raises:
        ValueError: a value is outside its range, or the fractions leave no steps for the ramp.
    """

    num_steps: int
    """Optimizer steps of the whole run."""

    def __post_init__(self) -> None:
        ScheduleConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        _require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")

    @property
    def ramp_start(self) -> int:
        """Last step of the warm-up."""
        return math.floor(self.warmup_fraction * self.num_steps)

    @property
    def ramp_end(self) -> int:
        """Step of the last mask update, at least one after ``ramp_start``."""
        return max(self.num_steps - math.floor(self.cooldown_fraction * self.num_steps), self.ramp_start + 1)

    @property
    def solve_steps(self) -> tuple[int, ...]:
        """Steps after which masks are solved, in order; the last is the end of the ramp."""
        length = self.ramp_end - self.ramp_start
        steps: set[int] = set()  # a ramp shorter than the number of solves has fewer steps
        for solve in range(1, self.solves + 1):
            steps.add(self.ramp_start + -(-solve * length // self.solves))
        return tuple(sorted(steps))

    def sparsity_at(self, step: int) -> float:
        """Return v_f + (v_i - v_f) (1 - progress)^3 at the latest mask update up to ``step``."""
        if self.solves and step < self.solve_steps[0]:
            return 0.0
        left = self._left_at(step)
        if left == 1.0:
            # The formula may be one rounding error below it and prune one weight fewer.
            return self.initial_sparsity
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left**3

    def progress_at(self, step: int) -> float:
        # Without a sparsity of all layers, those with their own follow the ramp itself.
        if self.final_sparsity == 0.0:
            return 1.0 - self._left_at(step) ** 3
        return self.sparsity_at(step) / self.final_sparsity

    def updates_masks_at(self, step: int) -> bool:
        if self.solves:
            return step in self.solve_steps
        if step == 0:  # at sparsity 0 all weights are kept, which needs no selection
            return self.initial_sparsity > 0.0
        if step == self.ramp_end:
            return True
        return self.ramp_start < step < self.ramp_end and (step - self.ramp_start) % self.update_interval == 0

    def is_final(self, step: int) -> bool:
        return step >= self.ramp_end

    def _left_at(self, step: int) -> float:
        """Return the remaining fraction of the ramp at the latest mask update up to ``step``."""
        if step >= self.ramp_end:
            return 0.0
        length = self.ramp_end - self.ramp_start
        if self.solves:
            last_solve = _latest(self.solve_steps, step, default=self.ramp_start)
            return (self.ramp_end - last_solve) / length
        since_start = max(0, step - self.ramp_start) // self.update_interval * self.update_interval
        return 1.0 - since_start / length


def _latest(steps: Sequence[int], step: int, *, default: int) -> int:
    """Return the latest of ``steps`` up to ``step``, or ``default`` before the first."""
    return max((at for at in steps if at <= step), default=default)


@dataclass(frozen=True, slots=True)
class OneShotSchedule:
    """Prune once, before the first step, and keep the masks from then on.

    Args:
        final_sparsity: sparsity of the masks, in [0, 1).

    Raises:
        ValueError: ``final_sparsity`` is outside [0, 1).
    """

    final_sparsity: float

    def __post_init__(self) -> None:
        _require_numbers(self)
        _require(0.0 <= self.final_sparsity < 1.0, "final_sparsity", self.final_sparsity, "in [0, 1)")

    def sparsity_at(self, step: int) -> float:
        return self.final_sparsity

    def progress_at(self, step: int) -> float:
        return 1.0

    def updates_masks_at(self, step: int) -> bool:
        return step == 0

    def is_final(self, step: int) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class RoundingSchedule:
    """When weights are quantised, and when their scales are searched.

    Args:
        start: the first step after which weights are quantised.
        interval: optimizer steps between two searches.
        num_steps: optimizer steps of the whole run; none is searched after the last.

    Raises:
        ValueError: no steps are left to quantise.
    """

    start: int
    interval: int
    num_steps: int

    def __post_init__(self) -> None:
        _require_numbers(self)
        _require(self.interval >= 1, "interval", self.interval, "at least 1")
        _require(0 <= self.start < self.num_steps, "start", self.start, f"in [0, num_steps = {self.num_steps})")

    def rounds_at(self, step: int) -> bool:
        """Return whether weights are quantised from ``step`` on."""
        return step >= self.start

    def updates_scales_at(self, step: int) -> bool:
        """Return whether scales are searched after ``step``; never after the last, so exports are as trained."""
        return self.start <= step < self.num_steps and (step - self.start) % self.interval == 0


@dataclass(frozen=True, slots=True)
class Schedules:
    """Schedules of a run: masks and quantisation scales; None for those that never change."""

    masks: Schedule | None = None
    rounding: RoundingSchedule | None = None

    def sparsity_at(self, step: int) -> float:
        if self.masks is None:
            return 0.0
        return self.masks.sparsity_at(step)

    def masks_final_at(self, step: int) -> bool:
        return self.masks is not None and self.masks.is_final(step)

    @property
    def has_solves(self) -> bool:
        """True if masks are solved for, in place of a ranking."""
        return bool(self._solves)

    def last_solve(self, step: int) -> int:
        """Return the step of the latest solve up to ``step``; 0 before the first."""
        return _latest(self._solves, step, default=0)

    def listens_at(self, step: int) -> bool:
        """Return whether the batch after ``step`` is one of the last before a solve."""
        return any(at - LISTENED <= step < at for at in self._solves)

    @property
    def _solves(self) -> tuple[int, ...]:
        """Steps of all solves, in order."""
        if isinstance(self.masks, CubicSchedule):
            return self.masks.solve_steps
        return ()

    def quantises_at(self, step: int) -> bool:
        return self.rounding is not None and self.rounding.rounds_at(step)

    def updates_scales_at(self, step: int) -> bool:
        return self.rounding is not None and self.rounding.updates_scales_at(step)

    def is_settled(self, step: int) -> bool:
        """Return whether masks and quantisation no longer change in kind from ``step`` on."""
        masks_final = self.masks is None or self.masks.is_final(step)
        quantisation_started = self.rounding is None or self.rounding.rounds_at(step)
        return masks_final and quantisation_started


def _require_numbers(schedule: Any) -> None:
    """Raise ValueError for a field of a ``schedule`` that is not a number, or not a whole one where it counts."""
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        kind: type = Real
        wanted = "a number"
        if field.type is int:
            kind = Integral
            wanted = "a whole number"
        # Numbers of numpy are allowed; True, an int in Python, is not.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{field.name} = {value!r} must be {wanted}")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raise ValueError unless a value ``holds`` its range, described by ``wanted``: "in [0, 1)", "at least 1"."""
    if holds:
        return
    hint = ""
    if wanted.startswith("in [0"):  # a fraction
        hint = percent_hint(value)
    raise ValueError(f"{name} = {value} must be {wanted}{hint}")


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak rate for the step after ``step``: a linear rise, then a linear fall to zero."""
    warmup_steps = math.floor(warmup_fraction * num_steps)
    # Neither the first step nor the last has the rate 0, which would waste it.
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (num_steps - step) / (num_steps - warmup_steps))


_WIDTH = 384
"""Hidden size at which the rates below were measured."""
USUAL_STEPS = 600
"""Steps of the runs in which they were measured, and default length of a run."""
STEPS_POWER = 1 / 3
"""Rates decrease with this power of the steps, as found for pretraining with AdamW (arXiv 2409.19913: 0.32)."""
# Bounds of the factor for the steps. 200 steps would have 1.44, with which one seed in three of a regression learned
# little; runs below 300 steps use the rates for 300 (tools/quality/logs/tuning-log.md).
_LEAST = 0.25
_MOST = 2.0**STEPS_POWER
FEW_LABELS = 3
"""Labels with at most this many values overfit soon, through the rows of rare words. Measured with 2, 3, 20 and 52
classes, and with numbers of two and of many values (tools/quality/logs/tuning-log.md).
"""
# Epochs up to which the rate of the embeddings stays unchanged.
_PASSES_OF_FEW = 1.0
_PASSES_OF_MANY = 2.0
_EPOCHS_POWER = 3.0
"""Beyond those it decreases with this power of the epochs: film reviews were worse with 4e-3 after 2.15 epochs."""
_LEAST_OF_EMBEDDINGS = 0.1
"""Lower bound of the factor: for more epochs only runs at 4e-4 were measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRates:
    """Peak rates of Adam for each group of parameters."""

    scores: float = 1e-2
    """For A, B, R and C: |W| / scale, with which they compete, is near 1 at any width."""
    updates: float = 2e-3
    embeddings: float = 4e-3
    """For U and V of embeddings, in one epoch."""
    head: float = 2e-3
    """For the modules trained in full."""
    everything: float = 3e-4
    """For the methods that train every weight."""


_MEASURED = LearningRates()
_OF_TOKENS = LearningRates(scores=1e-3, updates=5e-3)
"""For a loss over all tokens of a model pretrained with it: good masks change little, and U V tolerates a higher rate
(tools/quality/logs/tuning-log.md, "Language models").
"""


def default_learning_rates(
    *, width: int, num_steps: int, epochs: float = 1.0, num_labels: int = 0, predicts_tokens: bool = False
) -> LearningRates:
    """Return the default peak rates.

    Adam moves a parameter by its rate at every step, so rates decrease with the cube root of ``num_steps``, from 300
    on. A sum over ``width`` inputs (the hidden size) that move alike grows with it: all rates except that of scores
    decrease with the width. The rate of the embeddings decreases with the ``epochs``, down to a tenth: after the
    first for tokens and for labels with up to :data:`FEW_LABELS` values, after the second for others. ``num_labels``:
    different label values; 0 without labels. ``predicts_tokens``: the loss is over all tokens, as for language models.
    """
    length = min(max((USUAL_STEPS / num_steps) ** STEPS_POWER, _LEAST), _MOST)
    narrower = min(1.0, _WIDTH / width)
    overfits_soon = predicts_tokens or 0 < num_labels <= FEW_LABELS
    passes_unchanged = _PASSES_OF_MANY
    if overfits_soon:
        passes_unchanged = _PASSES_OF_FEW
    passes = max(1.0, epochs / passes_unchanged)
    measured = _MEASURED
    if predicts_tokens:
        measured = _OF_TOKENS
    rates: dict[str, float] = {}
    for field in fields(LearningRates):
        factor = length
        if field.name != "scores":
            factor *= narrower
        if field.name == "embeddings":
            factor *= max(passes**-_EPOCHS_POWER, _LEAST_OF_EMBEDDINGS)
        rates[field.name] = getattr(measured, field.name) * factor
    return LearningRates(**rates)
