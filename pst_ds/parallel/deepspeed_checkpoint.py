"""DeepSpeed's own checkpoints without the frozen weights, for models that say so."""

from __future__ import annotations

import functools
import sys

from torch import nn

_MARK = "pst_leaves_out_frozen"


def leave_out_frozen(model: nn.Module) -> None:
    """Let ``save_checkpoint`` of every DeepSpeed engine of ``model`` leave out what is frozen, unless told otherwise.

    HF Trainer saves so for PEFT's models alone, and a callback meets no engine. Other models' engines save as ever.
    Nothing to do where nobody has imported DeepSpeed.
    """
    setattr(model, _MARK, True)
    if "deepspeed" not in sys.modules:
        return
    from deepspeed import DeepSpeedEngine

    save_checkpoint = DeepSpeedEngine.save_checkpoint
    if getattr(save_checkpoint, _MARK, False):
        return

    @functools.wraps(save_checkpoint)
    def without_frozen(self: DeepSpeedEngine, *args: object, **kwargs: object) -> object:
        if getattr(self.module, _MARK, False):
            kwargs.setdefault("exclude_frozen_parameters", True)
        return save_checkpoint(self, *args, **kwargs)

    setattr(without_frozen, _MARK, True)
    DeepSpeedEngine.save_checkpoint = without_frozen


def keep_frozen(model: nn.Module) -> None:
    """Undo :func:`leave_out_frozen`."""
    vars(model).pop(_MARK, None)
