"""What ``pst-ds init`` proposes for a model: the length of the run, its start, updated embeddings, a cut."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from pst_ds.config.one_shot import CHANNELS
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.errors import InputError
from pst_ds.file_names import FINETUNED
from pst_ds.nn.targets import find_embeddings
from pst_ds.planning.dense_start import MOST_SPARSITY_OF_BUDGETS, SAMPLES_OF_TOKENS, SOLVED_SPARSITY, gains_by_start
from pst_ds.planning.speedup import share_for

if TYPE_CHECKING:
    pass
from pst_ds.cli.init.first_table import Settings, laid_over

_START_SPARSITY = 0.8
"""Sparsity of a classifier's start, from which training ramps up."""
_EXAMPLES = 1024
"""Most examples of a classification task that a start examines."""
_RECOVERY_STEPS = 100
"""Steps after a cut, for a model that learned its task before it."""
_LEAST_STEPS = 600
_MOST_STEPS = 10_000
_LONGER = 3.0
"""Most epochs of a small dataset, relative to the task's usual number."""


def proposed_length(usual_epochs: float, examples: int, batch_size: int) -> tuple[Settings, str]:
    """Return ``num_epochs`` or ``num_steps`` for a run over ``examples``, and the reason.

    The default is the task's usual number of epochs. Small datasets get up to three times as many, since masks need
    steps to settle while sparsity ramps up. Very large datasets get fewer, since the small matrices stop improving
    earlier.
    """
    steps_of_epoch = max(1, examples // batch_size)
    steps = round(usual_epochs * steps_of_epoch)
    if steps > max(_MOST_STEPS, steps_of_epoch):
        steps = max(_MOST_STEPS, steps_of_epoch)
        return {"num_steps": steps}, f"{steps / steps_of_epoch:.1f} epochs, because the dataset is large"
    if steps >= _LEAST_STEPS:
        return {"num_epochs": usual_epochs}, "usual for this task"
    epochs = _LEAST_STEPS / steps_of_epoch
    if epochs > _LONGER * usual_epochs:
        return {"num_epochs": _LONGER * usual_epochs}, "more than usual, because the dataset is small"
    return {"num_steps": _LEAST_STEPS}, f"{epochs:.1f} epochs, so that the masks settle"


def for_a_new_task(table: Settings, model: nn.Module, run: RunConfig) -> Settings:
    """Return ``table`` for a model that learns a new task by a low-rank update: with an update of its embeddings, and
    with masks that start at half of the final sparsity and are fixed early (tools/quality/logs/tuning-log.md).
    """
    config = run.injected_pst
    if not run.mask_method.injects or not config.update_rank:
        return table
    if embeddings := _updatable_embeddings(model, run):
        table = laid_over(table, "pst", update_embeddings=embeddings)
    if run.method != "pst":
        return table
    initial = round(run.schedule.final_sparsity / 2, 4)
    return laid_over(table, "schedule", initial_sparsity=initial, warmup_fraction=0.0, cooldown_fraction=0.4)


def _updatable_embeddings(model: nn.Module, run: RunConfig) -> list[str]:
    """Return the name of the model's input embeddings, if they can have a low-rank update."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    names = tuple(name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings)
    try:
        find_embeddings(model, replace(run.injected_pst, update_embeddings=names))
    except InputError:
        return []
    return list(names)


def with_cut(table: Settings, run: RunConfig, args: argparse.Namespace, examples: int) -> Settings:
    """Return ``table`` with a cut of the feed-forward layers, and the uncut model as teacher (docs/how-to/shapes.md).

    A new task is learned before the cut.
    """
    is_new = not run.task_facts.predicts_tokens
    # share of the feed-forward channels that stay, and most examples that choose them
    if is_new:
        share = 0.25
        samples = _EXAMPLES
    else:
        share = 0.75
        samples = 2 * SAMPLES_OF_TOKENS
    if args.speedup:
        share, _ = share_for(run, args.speedup, args.target)
    train = dict(table["train"])
    first = {name: table[name] for name in table if name != "train"}
    if is_new:
        length = {name: train[name] for name in ("num_steps", "num_epochs") if name in train}
        first["finetune"] = {"method": "dense", **length}
        if run.mask_method.masks == "none":
            others = {name: train[name] for name in train if name not in length}
            train = {"num_steps": _RECOVERY_STEPS, **others}
    first["start"] = {"method": CHANNELS, "ffn": share, "samples": min(samples, examples)}
    first["distillation"] = {"weight": 0.5, "teacher": FINETUNED if is_new else run.model.path}
    if not is_new:
        first = laid_over(first, "pst", update_rank=16, update_init="lora", update_init_scale=1.0)
    return {**first, "train": train}


def with_start(table: Settings, examples: int, *, any_pattern: bool) -> list[Settings]:
    """Return ``table`` with each start by ALPS, or solves during training, that improves the run: the best one first.

    Empty if none does. Whether the model supports them is not checked. With ``any_pattern`` the start chooses the
    sparsity pattern.
    """
    run = run_from_table(table)
    if not gains_by_start(run):
        return []
    proposals = []
    if run.task_facts.predicts_tokens:
        if any_pattern and run.schedule.final_sparsity <= MOST_SPARSITY_OF_BUDGETS:
            proposals.append(_language_model(table, run, examples, by_saliency=True))
        proposals.append(_language_model(table, run, examples, by_saliency=False))
        return proposals
    gains = run.task == "classification" and run.schedule.final_sparsity >= SOLVED_SPARSITY
    if gains and run.pst.pattern == "matrix":
        proposals.append(_solved(table))
    proposals.append(_classifier(table, examples))
    return proposals


def _solved(table: Settings) -> Settings:
    """Solve for masks and weights with ALPS along the ramp, the first time at about 80 % sparsity."""
    return laid_over(table, "schedule", solves=5, initial_sparsity=_START_SPARSITY)


def _classifier(table: Settings, examples: int) -> Settings:
    """Start with ALPS at 80 % sparsity; scores with input norms, as in ALPS, choose the other weights to prune."""
    table = laid_over(table, "start", method="alps", samples=min(_EXAMPLES, examples), reconstruct=2)
    table = laid_over(table, "pst", magnitude="activation")
    return laid_over(table, "schedule", initial_sparsity=_START_SPARSITY)


def _language_model(table: Settings, run: RunConfig, examples: int, *, by_saliency: bool) -> Settings:
    """Start at the final sparsity and let PST compensate: docs/how-to/methods.md, "Language models"."""
    table = laid_over(table, "start", method="alps", samples=min(SAMPLES_OF_TOKENS, examples), reconstruct=2)
    if by_saliency:
        table = laid_over(table, "start", budgets="saliency")
        table = laid_over(table, "pst", pattern="global")
    update: Settings = {"update_rank": 16, "update_init": "lora", "update_init_scale": 1.0}
    table = laid_over(table, "pst", frozen_magnitude=True, **update)
    return laid_over(table, "schedule", initial_sparsity=run.schedule.final_sparsity)
