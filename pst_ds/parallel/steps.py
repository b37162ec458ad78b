"""Count the optimizer steps of any training loop, through its engine or its optimizer."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from pst_ds.parallel.engine import Engine, note_masters

_num_steps = 0
_LAST_STEPS: WeakKeyDictionary[Optimizer, tuple[int, Tensor | None]] = WeakKeyDictionary()
"""Number of each optimizer's last step, and the flag with which a GradScaler makes a fused one skip it."""

_WRAPPERS = {
    "DistributedDataParallel": "module", "DataParallel": "module", "AveragedModel": "module",
    "DeepSpeedEngine": "module", "OptimizedModule": "_orig_mod",
}  # fmt: skip
"""Attribute of the wrapped model in classes of torch and DeepSpeed, by name, so that neither is imported for it."""


def _note_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    global _num_steps
    _num_steps += 1
    _LAST_STEPS[optimizer] = _num_steps, getattr(optimizer, "found_inf", None)


register_optimizer_step_post_hook(_note_step)


def steps_noted() -> int:
    """Return how many steps torch's optimizers have made in this process, all together."""
    return _num_steps


def applied_steps(stepper: Engine | Optimizer, before: int, *, noted: int) -> int:
    """Return the applied optimizer steps of ``stepper``, the same on every rank.

    Args:
        stepper: an engine, which counts its steps; accelerate's optimizer, which knows of skipped steps and of gradient
            accumulation; or torch's, of which at most one step is counted per call. An optimizer of another kind is
            assumed to have made one.
        before: applied steps at the previous call.
        noted: :func:`steps_noted` at the previous call.
    """
    steps = getattr(stepper, "global_steps", None)
    if steps is not None:
        return steps - getattr(stepper, "skipped_steps", 0)
    accumulation = getattr(stepper, "gradient_state", None)
    if accumulation is not None and not accumulation.sync_gradients:
        return before
    if accumulation is None and isinstance(stepper, Optimizer):
        number, skipped = _LAST_STEPS.get(stepper, (0, None))
        return before + (number > noted and not skipped)
    return before + (not getattr(stepper, "step_was_skipped", False))


def torch_optimizer(stepper: Engine | Optimizer) -> Optimizer:
    """Return the innermost optimizer of ``stepper``; note DeepSpeed's masters on the way."""
    inner: Any = stepper
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
        note_masters(inner)
    return inner


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine, DistributedDataParallel and torch.compile.

    Other wrappers are not recognised: a ``module`` inside any other model is a part of it.
    """
    while "pst_config" not in vars(model):
        kinds = (kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] in ("torch", "deepspeed"))
        attribute = next((_WRAPPERS[kind.__name__] for kind in kinds if kind.__name__ in _WRAPPERS), None)
        if attribute is None:
            break
        model = getattr(model, attribute)
    return model
