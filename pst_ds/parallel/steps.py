"""What a training loop of anybody's can say of its optimizer steps: through an engine, or through an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from pst_ds.parallel.engine import note_masters


def applied_steps(stepper: Any, before: int) -> int:
    """Applied optimizer steps after the call of ``step`` just made, where they were ``before`` ahead of it.

    ``stepper`` is DeepSpeed's engine or a LocalEngine, which count; or an optimizer, of accelerate (which knows of
    skipped steps and of gradient accumulation) or of torch. The same on every rank.
    """
    if hasattr(stepper, "global_steps"):
        return stepper.global_steps - stepper.skipped_steps
    accumulation = getattr(stepper, "gradient_state", None)
    if accumulation is not None and not accumulation.sync_gradients:
        return before
    return before + (not getattr(stepper, "step_was_skipped", False))


def torch_optimizer(stepper: Any) -> Any:
    """The innermost optimizer of ``stepper``, whose groups are in force; notes DeepSpeed's masters on the way."""
    while hasattr(stepper, "optimizer"):
        stepper = stepper.optimizer
        note_masters(stepper)
    return stepper


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DeepSpeed's engine, DistributedDataParallel and torch.compile; the names in it are its own."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model
