"""Omit frozen weights from DeepSpeed's checkpoints of chosen models."""

from __future__ import annotations

import functools
import sys

from torch import nn

from pst_ds.parallel.engine import Engine
from pst_ds.third_party import Code, patch

_MARK = "pst_leaves_out_frozen"


def leave_out_frozen(model: nn.Module) -> None:
    """Omit frozen parameters from ``save_checkpoint`` of every DeepSpeed engine of ``model``, unless told otherwise.

    HF Trainer does so only for PEFT's models, and a callback has no access to the engine. Engines of other models are
    not affected. Does nothing if DeepSpeed was not imported. Raises ThirdPartyError.
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
