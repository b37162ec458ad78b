"""What ``pst-ds init`` proposes for a model: the length of the run, its start, updated embeddings, a cut."""

import argparse
from dataclasses import replace

from torch import nn

from pst_ds.cli.init.first_table import Settings, laid_over
from pst_ds.config.one_shot import CHANNELS
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import run_from_table
from pst_ds.errors import InputError
from pst_ds.file_names import FINETUNED
from pst_ds.nn.targets import find_embeddings
from pst_ds.planning.dense_start import MOST_SPARSITY_OF_BUDGETS, SAMPLES_OF_TOKENS, SOLVED_SPARSITY, gains_by_start
from pst_ds.planning.speedup import share_for

_START_SPARSITY = 0.8
"""Sparsity of a classifier's start, from which training ramps up."""
_EXAMPLES = 1024
"""Most examples of a classification task that a start examines."""
_RECOVERY_STEPS = 100
"""Steps after a cut, for a model that learned its task before it."""
_LEAST_STEPS = 600
"""Steps below which a run gets more epochs than usual."""
_MOST_STEPS = 10_000
"""Steps above which a run gets fewer epochs than usual, but at least one."""
_LONGER = 3.0
"""Most epochs of a small dataset, relative to the task's usual number."""
_UPDATE: Settings = {"update_rank": 16, "update_init": "lora", "update_init_scale": 1.0}
"""Low-rank update that compensates for pruned weights of a language model: docs/how-to/methods.md."""


def proposed_length(usual_epochs: float, examples: int, batch_size: int) -> tuple[Settings, str]:
    """Return ``num_epochs`` or ``num_steps`` for a run over ``examples``, and the reason.

    The default is the task's usual number of epochs. Small datasets get up to three times as many, since masks need
    steps to settle while sparsity ramps up. Very large datasets get fewer, since the small matrices stop improving
    earlier.
    """
    # at least one: the batch may be larger than the data set, which the checks of the run then refuse
    steps_of_epoch = max(1, examples // batch_size)
    steps = round(usual_epochs * steps_of_epoch)
    # every example is read once, even if that takes more steps
    most = max(_MOST_STEPS, steps_of_epoch)
    if steps > most:
        steps = most
        return {"num_steps": steps}, f"{steps / steps_of_epoch:.1f} epochs, because the dataset is large"
    if steps >= _LEAST_STEPS:
        return {"num_epochs": usual_epochs}, "usual for this task"
    epochs = _LEAST_STEPS / steps_of_epoch
    # many passes over few examples overfit, so the masks get fewer steps than they need
    if epochs > _LONGER * usual_epochs:
        return {"num_epochs": _LONGER * usual_epochs}, "more than usual, because the dataset is small"
    return {"num_steps": _LEAST_STEPS}, f"{epochs:.1f} epochs, so that the masks settle"


def for_a_new_task(table: Settings, model: nn.Module, run: RunConfig) -> Settings:
    """Return ``table`` for a model that learns a new task by a low-rank update: with an update of its embeddings, and
    with masks that start at half of the final sparsity and are fixed early (tools/quality/logs/tuning-log.md).
    """
    has_update = run.mask_method.injects and run.injected_pst.update_rank > 0
    if not has_update:
        return table
    embeddings = _updatable_embeddings(model, run)
    if embeddings:
        table = laid_over(table, "pst", update_embeddings=embeddings)
    if run.method != "pst":
        return table
    # four digits, so that the run file does not say 0.47500000000000003
    initial = round(run.schedule.final_sparsity / 2, 4)
    return laid_over(table, "schedule", initial_sparsity=initial, warmup_fraction=0.0, cooldown_fraction=0.4)


def _updatable_embeddings(model: nn.Module, run: RunConfig) -> list[str]:
    """Return the name of the model's input embeddings, if they can have a low-rank update."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    names = []
    for name, module in model.named_modules():
        if module is embeddings:
            names.append(name.rpartition(".")[2])
    try:
        find_embeddings(model, replace(run.injected_pst, update_embeddings=tuple(names)))
    except InputError:
        # embeddings that are more than a table, for example; the run is as good as any without this
        return []
    return names


def with_cut(table: Settings, run: RunConfig, args: argparse.Namespace, examples: int) -> Settings:
    """Return ``table`` with a cut of the feed-forward layers, and the uncut model as teacher (docs/how-to/shapes.md).

    A new task is learned before the cut.
    """
    if run.task_facts.predicts_tokens:
        return _cut_language_model(table, run, args, examples)
    return _cut_after_finetuning(table, run, args, examples)


def _cut_language_model(table: Settings, run: RunConfig, args: argparse.Namespace, examples: int) -> Settings:
    """Return ``table`` with a cut of a model that has learned its task: the pretrained model is the teacher."""
    sections, train = _without_train(table)
    sections["start"] = _cut_of(run, args, share=0.75, samples=min(2 * SAMPLES_OF_TOKENS, examples))
    sections["distillation"] = {"weight": 0.5, "teacher": run.model.path}
    sections = laid_over(sections, "pst", **_UPDATE)
    return {**sections, "train": train}


def _cut_after_finetuning(table: Settings, run: RunConfig, args: argparse.Namespace, examples: int) -> Settings:
    """Return ``table`` with a dense finetuning for a new task, and a cut of its result, which is the teacher."""
    sections, train = _without_train(table)
    length = {}
    for name in ("num_steps", "num_epochs"):
        if name in train:
            length[name] = train[name]
    sections["finetune"] = {"method": "dense", **length}
    if run.mask_method.masks == "none":
        # the finetuning has the length of the run, and the training only recovers from the cut. Masks would need the
        # whole length for their ramp
        for name in length:
            del train[name]
        train = {"num_steps": _RECOVERY_STEPS, **train}
    sections["start"] = _cut_of(run, args, share=0.25, samples=min(_EXAMPLES, examples))
    sections["distillation"] = {"weight": 0.5, "teacher": FINETUNED}
    return {**sections, "train": train}


def _without_train(table: Settings) -> tuple[Settings, Settings]:
    """Return ``table`` without ``[train]``, and a copy of ``[train]``, which is to come last in the run file."""
    sections = dict(table)
    train = dict(sections.pop("train"))
    return sections, train


def _cut_of(run: RunConfig, args: argparse.Namespace, *, share: float, samples: int) -> Settings:
    """Return ``[start]`` of a cut.

    ``share``: feed-forward channels that stay, unless ``--speedup`` asks for another share. ``samples``: examples that
    choose them.
    """
    if args.speedup:
        share, _ = share_for(run, args.speedup, args.target)
    return {"method": CHANNELS, "ffn": share, "samples": samples}


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
        # budgets by saliency were measured up to this sparsity only
        if any_pattern and run.schedule.final_sparsity <= MOST_SPARSITY_OF_BUDGETS:
            proposals.append(_language_model(table, run, examples, by_saliency=True))
        proposals.append(_language_model(table, run, examples, by_saliency=False))
        return proposals
    gains = run.task == "classification" and run.schedule.final_sparsity >= SOLVED_SPARSITY
    # solves were measured with this pattern only
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
    table = laid_over(table, "pst", frozen_magnitude=True, **_UPDATE)
    return laid_over(table, "schedule", initial_sparsity=run.schedule.final_sparsity)
