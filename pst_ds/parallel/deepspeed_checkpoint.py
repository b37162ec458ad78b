"""DeepSpeed's own checkpoints without the frozen weights, for models that say so."""

from __future__ import annotations

import functools
import sys

from torch import nn

from pst_ds.parallel.engine import Engine
from pst_ds.third_party import Code, patch

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

    if not hasattr(DeepSpeedEngine.save_checkpoint, _MARK):
        patch(DeepSpeedEngine, "save_checkpoint", _without_frozen)


def _without_frozen(save_checkpoint: Code) -> Code:
    @functools.wraps(save_checkpoint)
    def saves(self: Engine, *args: object, **kwargs: object) -> object:
        if hasattr(self.module, _MARK):
            kwargs.setdefault("exclude_frozen_parameters", True)
        return save_checkpoint(self, *args, **kwargs)

    setattr(saves, _MARK, True)
    return saves


def keep_frozen(model: nn.Module) -> None:
    """Undo :func:`leave_out_frozen`."""
    vars(model).pop(_MARK, None)
