"""Masks in step with a schedule: the rule, for the loop of a run and for anybody's."""

from __future__ import annotations

from typing import Any

from torch import nn

from pst_ds.core.schedule import Schedule
from pst_ds.errors import InputError
from pst_ds.nn.inject import freeze_scores, pst_layers
from pst_ds.parallel.steps import applied_steps, torch_optimizer, unwrapped
from pst_ds.train.mask_update import MaskStats, mask_stats, masks_of_zeros, update_masks


def update_masks_if_due(
    model: nn.Module, schedule: Schedule, step: int, *, from_zeros: bool = False
) -> MaskStats | None:
    """Select the masks anew if ``schedule`` does so after applied step ``step`` (0: before the first), and fix them for
    good once it is final. The new masks' counts, or None.

    ``from_zeros`` keeps the non-zeros of the weights instead of selecting. Collective: a schedule and a step that are
    equal on every rank update on all or on none. Raises FloatingPointError on every rank for scores that are not
    finite.
    """
    masks = None
    if schedule.updates_masks_at(step):
        target = schedule.sparsity_at(step)
        masks = masks_of_zeros(model) if from_zeros else update_masks(
            model, target, final_sparsity=schedule.final_sparsity
        )  # fmt: skip
    if schedule.is_final(step):
        freeze_scores(model)
    return masks


class MaskUpdater:
    """Keeps the masks of a model in step with a schedule, in a loop that is not ours.

        masks = MaskUpdater(model, schedule)
        for batch in loader:
            ...  # forward, backward
            optimizer.step()
            masks.after_step(optimizer)      # or the DeepSpeed engine

    Make it last before the loop: after ``deepspeed.initialize`` or ``accelerator.prepare``, and after a checkpoint was
    loaded. ``model`` may be what those return. Of a run that is continued, ``step`` is the number of optimizer steps
    applied so far; or let accelerate save and load the updater (``register_for_checkpointing``).

    Making it, and :meth:`after_step`, are collective. Raises InputError for a model without PST layers.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, step: int = 0):
        self.schedule = schedule
        self._model = unwrapped(model)
        _require_layers(self._model)
        new = update_masks_if_due(self._model, schedule, 0) if step == 0 else None
        self.step = 0
        """Applied optimizer steps."""
        self.masks: MaskStats
        """The masks as they are."""
        self.load_state_dict({"step": step})
        self.masks = new or self.masks

    def after_step(self, stepper: Any) -> MaskStats | None:
        """Call it after every ``step`` of ``stepper``: a DeepSpeed engine, or an optimizer of accelerate or torch.

        Skipped steps, and micro-batches that end no step, count for nothing. The new masks' counts if they were
        selected anew, else None. Once they are final, scores train no more: the groups named "scores" have a rate of 0.
        With a GradScaler of your own, call it only when that did not skip the step.
        """
        optimizer = torch_optimizer(stepper)
        step, new = applied_steps(stepper, self.step), None
        if step not in (self.step, self.step + 1):
            raise InputError(
                f"the engine has applied {step} optimizer steps, and the masks are those of step {self.step}: call "
                "after_step after every step, and make MaskUpdater(..., step=engine.global_steps - "
                "engine.skipped_steps) after engine.load_checkpoint"
            )
        if step > self.step:
            self.step, new = step, update_masks_if_due(self._model, self.schedule, step)
            self.masks = new or self.masks
        if self.schedule.is_final(self.step):
            for group in optimizer.param_groups:
                if group.get("name") == "scores":
                    group["lr"] = 0.0
        return new

    def state_dict(self) -> dict[str, int]:
        """The step; masks are part of the model."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the step of ``state``, with the masks that the model has by now. Collective."""
        self.step, self.masks = state["step"], mask_stats(self._model)
        if self.schedule.is_final(self.step):
            freeze_scores(self._model)


def _require_layers(model: nn.Module) -> None:
    layers = pst_layers(model)
    if not layers:
        raise InputError("the model has no PST layers; call inject_pst(model, PSTConfig(...)) first")
    config = getattr(model, "pst_config", None)
    if config is not None and config.magnitude == "activation":
        for name, layer in layers.items():
            if layer.input_norms is None:
                raise InputError(
                    f'magnitude = "activation", but {name} has no norms of its inputs; set them with '
                    'pst_ds.train.calibration.set_norms, or take PSTConfig(magnitude="weight")'
                )
