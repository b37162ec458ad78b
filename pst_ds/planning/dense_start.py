"""Which runs gain by one-shot pruning with ALPS before their first step, as far as this was measured."""

from pst_ds.config.run import RunConfig
from pst_ds.core.patterns import parse_pattern

HIGH_SPARSITY = 0.85
"""Sparsity from which a classifier is initialised with ALPS (docs/how-to/methods.md). Measured at 0.9 and 0.95, not
between 0.5 and 0.9; it gains nothing with block patterns."""
SOLVED_SPARSITY = 0.95
"""Sparsity from which a classifier gains more by ALPS during training (``schedule.solves``), which was measured at 0.95
with pattern "matrix" (docs/how-to/methods.md)."""
MOST_SPARSITY_OF_BUDGETS = 0.8
"""Highest sparsity at which a language model starts with budgets by saliency. Measured at 0.5, 0.7 and 0.8
(docs/background/results.md)."""
SAMPLES_OF_TOKENS = 64
"""Sequences to calibrate ALPS on for a language model."""
PATTERNS = ("matrix", "row")
"""Patterns without fixed sparsity for which a start was measured."""


def gains_by_start(run: RunConfig) -> bool:
    """Return whether a start with ALPS improves ``run``, as far as this was measured."""
    if run.method != "pst" or run.schedule.solves:
        return False
    if run.task_facts.predicts_tokens:
        return run.pst.pattern in PATTERNS or parse_pattern(run.pst.pattern).fixed_sparsity is not None
    return run.schedule.final_sparsity >= HIGH_SPARSITY and run.pst.pattern in PATTERNS
