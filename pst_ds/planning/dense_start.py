"""Which runs gain by one-shot pruning with ALPS before their first step, as far as this was measured."""

from __future__ import annotations

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.core.patterns import parse_pattern
from pst_ds.nn.base_model import pruning_record
from pst_ds.nn.experts import expert_stacks

HIGH_SPARSITY = 0.85
"""Sparsity from which a classifier is initialised with ALPS (docs/how-to/methods.md). Measured at 0.9 and 0.95, not
between 0.5 and 0.9; it gains nothing with block patterns."""
MOST_SPARSITY_OF_BUDGETS = 0.8
"""Highest sparsity at which a language model starts with budgets by saliency. Measured at 0.5, 0.7 and 0.8
(docs/background/results.md)."""
SAMPLES_OF_TOKENS = 64
"""Sequences to calibrate ALPS on for a language model."""
PATTERNS = ("matrix", "row")
"""Patterns without fixed sparsity for which a start was measured."""
MOST_WEIGHTS = 1_000_000_000
"""Weights above which ALPS takes hours on a CPU."""


def gains_by_start(run: RunConfig) -> bool:
    """Return whether a start with ALPS improves ``run``, as far as this was measured."""
    if run.method != "pst" or run.pst.magnitude == "none":
        return False
    if run.task_facts.predicts_tokens:
        return run.pst.pattern in PATTERNS or parse_pattern(run.pst.pattern).fixed_sparsity is not None
    return run.schedule.final_sparsity >= HIGH_SPARSITY and run.pst.pattern in PATTERNS


def is_large(model: nn.Module) -> bool:
    """Return whether ALPS would take hours on a CPU."""
    return sum(param.numel() for param in model.parameters()) > MOST_WEIGHTS


def remark_on_dense_start(run: RunConfig, model: nn.Module) -> str:
    """Return a warning for a language model that starts dense because it is too large for ALPS; "" for others."""
    gains = run.task_facts.predicts_tokens and gains_by_start(run) and run.start.method == "none"
    if not gains or not is_large(model) or pruning_record(run.model.path):
        return ""
    sparsity = run.schedule.final_sparsity
    fits = run.pst.pattern == "matrix" and sparsity <= MOST_SPARSITY_OF_BUDGETS and not expert_stacks(model)
    return (
        "the run starts dense and prunes by magnitude: a model of 135M weights ended at a perplexity of 99 that way, "
        "and at 43 from a start by ALPS (docs/how-to/methods.md). Above a billion weights, prune first: "
        f"pst-ds prune RUN.toml --method alps --reconstruct 2 --samples {SAMPLES_OF_TOKENS}"
        f'{" --budgets saliency" * fits} --out DIR, and then train with model.path = "DIR", method = "masked-lora" and '
        'pst.initial_mask = "zeros"'
    )
