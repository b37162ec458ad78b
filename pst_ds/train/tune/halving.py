"""Successive halving over factors on a run's learning rates, as pure functions of the trials' outcomes.

A trial is the whole run in fewer steps, with warm-up, ramp and decay scaled. It restarts in every rung, so the steps of
all rungs count. The search follows Jamieson and Talwalkar (arXiv 1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pst_ds.config.train import RATES, TrainConfig
from pst_ds.errors import InputError

LEAST_STEPS = 40
"""Optimizer steps of the shortest trial. With 20, trials learn nothing (tools/quality/logs/learning-rate-search.md)."""
TRIAL_POWER = 1 / 6
"""Exponent by which rates rise in shorter trials: half of that for long runs, since runs of 40 steps collapse at hardly
higher rates than runs of 600 (tools/quality/logs/learning-rate-search.md)."""
DEVIATIONS = 2.0
"""Standard errors of the metric by which other rates must be better than the run's own."""
_GROWTH = 3
_FINALISTS = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """Factors on a run's learning rates."""

    factor: float = 1.0
    """Factor on all rates."""
    head_factor: float = 1.0
    """Further factor on the head's rate."""

    def __str__(self) -> str:
        head = f", head x{self.head_factor:.3g} more" if self.head_factor != 1.0 else ""
        return f"x{self.factor:.3g}{head}" if self != Candidate() else "as they are"

    def rates(self, train: TrainConfig, steps: int = 1, of_steps: int = 1) -> dict[str, float]:
        """Return the rates of ``train`` by name, for a trial of ``steps`` that represents a run of ``of_steps``."""
        fewer = (of_steps / steps) ** TRIAL_POWER
        factors = dict.fromkeys(RATES, self.factor * fewer)
        factors["head_learning_rate"] *= self.head_factor
        rates = {name: getattr(train, name) for name in RATES}
        return {name: rate if (f := factors[name]) == 1.0 else float(f"{rate * f:.3g}") for name, rate in rates.items()}


CANDIDATES = tuple(
    Candidate(factor, head)
    for factor, head in ((1, 1), (3, 1), (1 / 3, 1), (9, 1), (1, 3), (3, 3), (3, 1 / 3), (1, 1 / 3), (27, 1))
)
"""The run's own rates, then the candidates in the order of their trials."""


@dataclass(frozen=True, slots=True)
class Rung:
    """Trials of equal length."""

    trials: int
    steps: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a candidate's trial on the validation split."""

    candidate: int
    """Index of the candidate."""
    value: float
    """The run's metric; NaN for a trial that diverged."""
    standard_error: float


def candidates(*, has_head: bool) -> tuple[Candidate, ...]:
    """Return the candidates, the run's own rates first; factors on the head only for a model with a head."""
    return tuple(c for c in CANDIDATES if has_head or c.head_factor == 1.0)


def rungs(num_steps: int, share: float, most: int) -> list[Rung]:
    """Return the rungs of a search in ``share`` of ``num_steps`` optimizer steps, over up to ``most`` candidates. There
    are as many candidates as have :data:`LEAST_STEPS` in the first rung. Raises InputError for fewer than 3."""
    budget = math.floor(share * num_steps)
    for count in (9, 5, 3):
        sizes = [count]
        while sizes[-1] > _FINALISTS:
            sizes.append(max(2, sizes[-1] // _GROWTH))
        unit = budget // sum(size * _GROWTH**i for i, size in enumerate(sizes))
        if count <= most and unit >= LEAST_STEPS:
            return [Rung(size, unit * _GROWTH**i) for i, size in enumerate(sizes)]
    needed = 3 * LEAST_STEPS
    raise InputError(
        f"--budget {share:g} of {num_steps} optimizer steps is {budget}, and the smallest search is 3 trials of "
        f"{LEAST_STEPS}, {needed} in all: "
        + (
            f"--budget {math.ceil(100 * needed / num_steps) / 100:g}, or a longer run"
            if num_steps >= needed
            else f"a run of {num_steps} steps is too short to search for its rates"
        )
    )


def ranked(outcomes: Sequence[Outcome], *, lower_is_better: bool) -> list[Outcome]:
    """Sort outcomes, the best first and those without a value last; ties go to the earlier candidate."""
    sign = 1.0 if lower_is_better else -1.0
    key = {o.candidate: math.inf if math.isnan(o.value) else sign * o.value for o in outcomes}
    return sorted(outcomes, key=lambda outcome: (math.isnan(outcome.value), key[outcome.candidate], outcome.candidate))


def promoted(outcomes: Sequence[Outcome], count: int, *, lower_is_better: bool) -> list[int]:
    """Return the candidates of the next rung: the run's own rates, and the best ``count`` - 1 others with a value."""
    others = [o for o in ranked(outcomes, lower_is_better=lower_is_better) if o.candidate and not math.isnan(o.value)]
    return sorted([0, *(o.candidate for o in others[: count - 1])])


def chosen(outcomes: Sequence[Outcome], *, lower_is_better: bool) -> int:
    """Return the chosen candidate after the last rung: the best, if it beats the run's own rates by more than
    :data:`DEVIATIONS` standard errors of their metric, else 0. Raises InputError when no trial has a value."""
    best, own = ranked(outcomes, lower_is_better=lower_is_better)[0], next(o for o in outcomes if o.candidate == 0)
    if math.isnan(best.value):
        raise InputError(
            "every trial of the last rung diverged, so there is nothing to choose from. Lower the learning rates of "
            "the run file, and start over with --restart"
        )
    if math.isnan(own.value):
        return best.candidate
    return best.candidate if abs(best.value - own.value) > DEVIATIONS * own.standard_error else 0
