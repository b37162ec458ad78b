"""Runs that start from a one-shot pruned model: which ``pst-ds init`` proposes, as far as was measured."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.nn.base_model import pruning_record
from pst_ds.nn.experts import expert_stacks
from pst_ds.train.one_shot.start import require_startable

MANY_ZEROS = 0.85
"""Sparsity from which a classifier is initialised with ALPS (docs/how-to/methods.md). Measured at 0.9 and 0.95, not
between 0.5 and 0.9; it gains nothing with block patterns."""
_START_SPARSITY, _EXAMPLES, _PATTERNS = 0.8, 1024, ("matrix", "row")
_SHARES_FOR_ALL = 0.8
"""Highest sparsity at which a language model starts with budgets by saliency; measured at 0.5, 0.7 and 0.8
(docs/background/results.md)."""
_SEQUENCES = 64
_MOST_WEIGHTS = 1_000_000_000
"""More would take a processor hours."""
Settings: TypeAlias = dict[str, Any]
"""Values of settings, or tables of them, by name."""


def laid_over(table: Settings, section: str, **settings: Any) -> Settings:
    """Return ``table`` with ``settings`` in a section."""
    return {**table, section: {**table.get(section, {}), **settings}}


def with_start(table: Settings, model: nn.Module, examples: int, *, any_pattern: bool) -> Settings:
    """Return ``table`` with a start by ALPS where the run gains by it, and its model is of moderate size and can be
    pruned so; else as it is. With ``any_pattern`` where zeros lie is left to the start."""
    run = run_from_table(table)
    if not gains_by_start(run) or _is_large(model):
        return table
    if _writes(run):
        shares = (True, False) if any_pattern and run.schedule.final_sparsity <= _SHARES_FOR_ALL else (False,)
        proposed = [_language_model(table, run, examples, by_saliency) for by_saliency in shares]
    else:
        proposed = [_classifier(table, examples)]
    return next(filter(_is_startable, proposed), table)


def _is_startable(table: Settings) -> bool:
    try:
        require_startable(run_from_table(table))
    except InputError:
        return False
    return True


def gains_by_start(run: RunConfig) -> bool:
    """Return whether a start by ALPS makes ``run`` better, as far as was measured."""
    if run.method != "pst" or run.pst.magnitude == "none":
        return False
    if _writes(run):
        return run.pst.pattern in _PATTERNS or parse_pattern(run.pst.pattern).fixed_sparsity is not None
    return run.schedule.final_sparsity >= MANY_ZEROS and run.pst.pattern in _PATTERNS


def remark_on_dense_start(run: RunConfig, model: nn.Module) -> str:
    """Return a warning for a language model that starts dense because it is too large for ALPS; "" for others."""
    gains = _writes(run) and gains_by_start(run) and run.start.method == "none"
    if not gains or not _is_large(model) or pruning_record(run.model.path):
        return ""
    fits = run.pst.pattern == "matrix" and run.schedule.final_sparsity <= _SHARES_FOR_ALL and not expert_stacks(model)
    return (
        "the run starts dense and prunes by magnitude: a model of 135M weights ended at a perplexity of 99 that way, "
        "and at 43 from a start by ALPS (docs/how-to/methods.md). Above a billion weights, prune first: "
        f"pst-ds prune RUN.toml --method alps --reconstruct 2 --samples {_SEQUENCES}{' --budgets saliency' * fits} "
        '--out DIR, and then train with model.path = "DIR", method = "masked-lora" and pst.initial_mask = "zeros"'
    )


def _is_large(model: nn.Module) -> bool:
    return sum(param.numel() for param in model.parameters()) > _MOST_WEIGHTS


def _writes(run: RunConfig) -> bool:
    return run.task_facts.predicts_tokens


def _classifier(table: Settings, examples: int) -> Settings:
    """The rest of the zeros is chosen by scores that have the norms of the inputs in them, as ALPS had."""
    table = laid_over(table, "start", method="alps", samples=min(_EXAMPLES, examples), reconstruct=2)
    table = laid_over(table, "pst", magnitude="activation")
    return laid_over(table, "schedule", initial_sparsity=_START_SPARSITY)


def _language_model(table: Settings, run: RunConfig, examples: int, by_saliency: bool) -> Settings:
    """All zeros are the start's, and PST makes up for them: docs/how-to/methods.md, "Language models"."""
    table = laid_over(table, "start", method="alps", samples=min(_SEQUENCES, examples), reconstruct=2)
    if by_saliency:
        table = laid_over(table, "start", budgets="saliency")
        table = laid_over(table, "pst", pattern="global")
    update: Settings = {"update_rank": 16, "update_init": "lora", "update_init_scale": 1.0}
    table = laid_over(table, "pst", frozen_magnitude=True, **update)
    return laid_over(table, "schedule", initial_sparsity=run.schedule.final_sparsity)
