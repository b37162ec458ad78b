"""Learning rates where none are set, from what is known before a run. docs/tuning-log.md has the runs behind them."""

from __future__ import annotations

from dataclasses import dataclass, fields

_WIDTH, _STEPS = 384, 600
"""The width and the length that the rates below were measured at."""
STEPS_POWER = 1 / 3
"""Rates fall with this power of the steps, as was found for pretraining with AdamW (arXiv 2409.19913: 0.32)."""
_LEAST, _MOST = 0.25, 1.5
"""Bounds of the factor for the length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRates:
    """Peak rates of Adam for each group of parameters."""

    scores: float = 1e-2
    """For A, B, R and C, and for the scores of movement pruning. |W| / scale, which they compete with, is near 1 in a
    model of any width."""
    updates: float = 2e-3
    """For U and V."""
    embeddings: float = 4e-4
    """For U and V of embeddings."""
    head: float = 2e-3
    """For the modules trained in full."""
    everything: float = 3e-4
    """For the methods that train every weight."""


_MEASURED = LearningRates()


def default_learning_rates(*, width: int, num_steps: int) -> LearningRates:
    """Return the rates for a model of hidden size ``width``, trained for ``num_steps`` optimizer steps.

    Adam moves a parameter by its rate at every step, so the way that it can go in a run grows with rate and steps; the
    rates fall with the cube root of the steps. A sum over ``width`` inputs that all move alike grows with the width;
    all rates but that of the scores fall with it.
    """
    length = min(max((_STEPS / num_steps) ** STEPS_POWER, _LEAST), _MOST)
    narrower = min(1.0, _WIDTH / width)
    factors = {field.name: length * (1.0 if field.name == "scores" else narrower) for field in fields(LearningRates)}
    return LearningRates(**{name: getattr(_MEASURED, name) * factor for name, factor in factors.items()})
