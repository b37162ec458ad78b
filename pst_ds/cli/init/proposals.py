"""Parts of a run that ``pst-ds init`` proposes: a one-shot pruned start, and rows held out for validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.data.dataset import file_and_slice
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError
from pst_ds.planning.dense_start import MOST_SPARSITY_OF_BUDGETS, SAMPLES_OF_TOKENS, gains_by_start, is_large
from pst_ds.train.one_shot.start import require_startable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_START_SPARSITY, _EXAMPLES = 0.8, 1024
Settings: TypeAlias = dict[str, Any]
"""Settings, or tables of settings, by name."""


def laid_over(table: Settings, section: str, **settings: object) -> Settings:
    """Return ``table`` with ``settings`` added to a section."""
    return {**table, section: {**table.get(section, {}), **settings}}


def with_start(table: Settings, model: nn.Module, examples: int, *, any_pattern: bool) -> Settings:
    """Return ``table`` with a one-shot start by ALPS if that improves this kind of run, or unchanged.

    It stays unchanged for large models and for models that ALPS cannot prune. With ``any_pattern`` the start chooses
    the sparsity pattern.
    """
    run = run_from_table(table)
    if not gains_by_start(run) or is_large(model):
        return table
    if run.task_facts.predicts_tokens:
        shares = (True, False) if any_pattern and run.schedule.final_sparsity <= MOST_SPARSITY_OF_BUDGETS else (False,)
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


def _classifier(table: Settings, examples: int) -> Settings:
    """Start with ALPS at 80 % sparsity; scores with input norms, as in ALPS, choose the other weights to prune."""
    table = laid_over(table, "start", method="alps", samples=min(_EXAMPLES, examples), reconstruct=2)
    table = laid_over(table, "pst", magnitude="activation")
    return laid_over(table, "schedule", initial_sparsity=_START_SPARSITY)


def _language_model(table: Settings, run: RunConfig, examples: int, by_saliency: bool) -> Settings:
    """Start at the final sparsity and let PST compensate: docs/how-to/methods.md, "Language models"."""
    table = laid_over(table, "start", method="alps", samples=min(SAMPLES_OF_TOKENS, examples), reconstruct=2)
    if by_saliency:
        table = laid_over(table, "start", budgets="saliency")
        table = laid_over(table, "pst", pattern="global")
    update: Settings = {"update_rank": 16, "update_init": "lora", "update_init_scale": 1.0}
    table = laid_over(table, "pst", frozen_magnitude=True, **update)
    return laid_over(table, "schedule", initial_sparsity=run.schedule.final_sparsity)


PERCENT = 10


def with_validation(table: Settings, tokenizer: Tokenizer, labels: list[str]) -> tuple[Settings, str]:
    """Return ``table`` with the last rows of data.train held out for validation, and a sentence about it.

    Where that is not possible, return ``table`` unchanged; the sentence gives the reason.
    """
    where, share = table["data"]["train"], 100 - PERCENT
    file, piece = file_and_slice(where)
    if piece:
        return table, f"no validation data: {where} is a slice, and --validation may name the rest of {file}"
    sliced = {"train": f"{where}[:{share}%]", "validation": f"{where}[{share}%:]"}
    held = {**table, "data": sliced | {name: of for name, of in table["data"].items() if name != "train"}}
    try:
        examples = _require_fair(run_from_table(held), tokenizer, labels)
    except InputError as error:
        return table, f"no validation data: {error}. Name a file with --validation"
    return held, f"held out for validation: the last {PERCENT} % of {where}, {examples}"


def _require_fair(run: RunConfig, tokenizer: Tokenizer, labels: list[str]) -> str:
    """Return the number of held-out examples, with their unit.

    Raises InputError if the remaining rows cannot be trained on, or if the rows are sorted by class.
    """
    task, data = task_of(run), run.data
    if task.label_names(data) != labels:
        raise InputError(f"{data.train} lacks some classes, so its rows may be in their order")
    task.load(data, "train", tokenizer, labels)
    examples = task.load(data, "validation", tokenizer, labels)
    if labels and task.num_labels(examples) == 1:
        raise InputError(f"{data.validation} has one class only, so its rows may be in the order of classes")
    return f"{len(examples)} {task.unit}"
