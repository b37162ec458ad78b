"""The engine that the training loop drives: DeepSpeed's, or a small one for a single process without DeepSpeed."""

import gc
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import wraps
from typing import Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.parallel import sharding
from pst_ds.parallel.master_adamw import MasterAdamW
from pst_ds.third_party import Code, PatchHolder, patched, require

ParamGroup: TypeAlias = dict[str, Any]
"""A parameter group of torch's optimizers."""
_OMITS_FROZEN = "pst_leaves_out_frozen"
"""Attribute of a model whose frozen parameters are not saved."""
_TIMED = "pst_timed"
"""Attribute of an engine: what undoes its :func:`time_waits`."""


class Engine(Protocol):
    """Interface of an engine for the training loop; ``deepspeed.DeepSpeedEngine`` implements it."""

    module: nn.Module
    optimizer: Any  # DeepSpeed's wrappers share no base class
    global_steps: int
    """Optimizer steps, including skipped ones."""
    skipped_steps: int

    def __call__(self, *args: object, **kwargs: object) -> Any: ...
    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> None:
        """End a micro-batch; apply the optimizer at an accumulation boundary."""

    def was_step_applied(self) -> bool: ...
    def train(self, mode: bool = True) -> object: ...
    def eval(self) -> object: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...


class LocalEngine:
    """Engine of one process: AdamW on fp32 masters, accumulation, clipping; skips steps with infinite gradients."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[ParamGroup],
        *,
        gradient_accumulation_steps: int = 1,
        gradient_clipping: float = 0.0,
    ):
        self.module = module
        self.global_steps = self.skipped_steps = self._micro_steps = 0
        self._accumulation = gradient_accumulation_steps
        self._clipping = gradient_clipping
        self._applied = False
        self._grad_norm: float | None = None
        params = [param for group in param_groups for param in group["params"]]
        on_cpu = all(param.device.type == "cpu" for param in params)
        self.optimizer = MasterAdamW(list(param_groups), fused=on_cpu)  # fused is four times as fast on a CPU
        self.optimizer.masters()  # the first mask update needs them

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._applied = False
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        masters = self.optimizer.take_gradients()
        self._grad_norm = float(nn.utils.clip_grad_norm_(masters, self._clipping or math.inf))
        self._applied = math.isfinite(self._grad_norm)
        if self._applied:
            self.optimizer.step()
        else:
            self.skipped_steps += 1
        self.global_steps += 1
        self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return self._applied

    def train(self, mode: bool = True) -> Self:
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def get_global_grad_norm(self) -> float | None:
        return self._grad_norm


def build_engine(
    model: nn.Module,
    param_groups: Sequence[ParamGroup],
    *,
    ds_config: JsonObject | None,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float = 0.0,
) -> Engine:
    """Return DeepSpeed's engine for a resolved ``ds_config``, or a LocalEngine without one. Collective.

    Raises InputError when the trainable parameters mix dtypes, for which DeepSpeed has a bare assertion.
    """
    dtypes = {p.dtype for group in param_groups for p in group["params"]}
    if len(dtypes) > 1:
        raise InputError(
            f"trainable parameters mix {', '.join(sorted(map(str, dtypes)))}; load the whole model in one dtype"
        )
    if ds_config is None:
        return LocalEngine(
            model,
            param_groups,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clipping=gradient_clipping,
        )
    import deepspeed

    import_muon_without_its_compiler()
    optimizer = torch.optim.AdamW(list(param_groups), weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    note_masters(engine.optimizer)
    # ZeRO-3 gathers these after every step, and frozen ones again in the next pass
    kept = getattr(engine.optimizer, "persistent_parameters", [])
    kept[:] = [param for param in kept if param.requires_grad]
    return engine


def import_muon_without_its_compiler() -> None:
    """Import DeepSpeed's Muon, which it checks for, without wrapping its functions in ``torch.compile``.

    Nothing here uses Muon, and torch's compiler costs every rank seconds, and with Triton a pool of worker processes.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile then returns the function itself
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def note_masters(optimizer: object) -> None:
    """Set ``fp32_master`` of each parameter of DeepSpeed's 16-bit ``optimizer`` at stage 0, which does not set it."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    for params, masters in groups:
        for param, master in zip(params, masters, strict=True):
            param.fp32_master = master


def skips_non_finite(engine: Engine) -> bool:
    """Return whether ``engine`` certainly skips a step whose gradients are not finite, on all ranks.

    DeepSpeed does at stage 3, and at stages 1 and 2 unless its JSON switches the checks off.
    """
    if isinstance(engine, LocalEngine):
        return True
    stage = getattr(engine, "zero_optimization_stage", int)()
    if stage in (0, 3):  # at stage 0, not all of its optimizers do
        return bool(stage)
    optimizer = engine.optimizer
    checks_values = getattr(optimizer, "check_grad_overflow", False)
    checks_norm = getattr(optimizer, "compute_grad_norm", False) and optimizer.dtype != torch.bfloat16
    return bool(checks_values or checks_norm)


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return torch's optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def optimizer_bytes(engine: Engine) -> int:
    """Return the bytes of optimizer state on this rank: Adam's two moments, and fp32 masters of 16-bit parameters."""
    model_storage = {p.untyped_storage().data_ptr() for p in engine.module.parameters() if p.numel()}
    total = 0
    for master, state in inner_optimizer(engine).state.items():
        total += sum(t.nbytes for key, t in state.items() if key != "step" and torch.is_tensor(t))
        if master.untyped_storage().data_ptr() not in model_storage:
            total += master.nbytes
    return total


def release(engine: Engine) -> None:
    """Free the weights and the optimizer state of an engine; DeepSpeed keeps every ZeRO-3 model of a process alive."""
    if isinstance(engine, LocalEngine):
        return
    _stop_timing(engine)
    params = list(engine.module.parameters())
    engine.destroy()  # type: ignore[attr-defined]
    for param in params:
        param.grad = None
        for tensor in (param, *(getattr(param, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))):
            if tensor is not None:
                tensor.data = tensor.new_empty(0)
    inner = inner_optimizer(engine)
    inner.state.clear()
    inner.param_groups.clear()
    vars(engine.optimizer).clear()


def free_released() -> None:
    """Free what engines of finished runs leave in this process."""
    gc.collect()  # an engine and its model hold each other
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def time_waits(engine: Engine, timing: Callable[[], AbstractContextManager[None]]) -> None:
    """Make ``engine`` enter ``timing()`` whenever it waits for other ranks, instead of an earlier call's.

    :func:`release` of the engine undoes it.

    On a GPU that is the time for which its stream waits. It excludes gradients that DeepSpeed reduces within a backward
    pass, but ranks that gather weights there are never far apart. Raises ThirdPartyError.
    """
    if isinstance(engine, LocalEngine):
        return
    _stop_timing(engine)

    def timed(action: Code) -> Code:
        @wraps(action)
        def within(*args: object, **kwargs: object) -> object:
            with timing():
                return action(*args, **kwargs)

        return within

    changes = ExitStack()
    changes.enter_context(patched(engine, "allreduce_gradients", timed))
    if any(map(sharding.is_partitioned, engine.module.parameters())):
        offload = require(engine.optimizer, "parameter_offload")
        changes.enter_context(patched(require(offload, "param_coordinator"), "fetch_sub_module", timed))
    setattr(engine, _TIMED, changes)


def _stop_timing(engine: Engine) -> None:
    """Undo :func:`time_waits`, if it was called."""
    changes = vars(engine).pop(_TIMED, None)
    if changes is not None:
        changes.close()


def omit_frozen(model: nn.Module) -> None:
    """Omit frozen parameters from ``save_checkpoint`` of every DeepSpeed engine of ``model``, unless told otherwise.

    HF Trainer only does so for PEFT's models, and a callback cannot access the engine. Does nothing if DeepSpeed is not
    imported yet. :func:`keep_frozen`, or the end of the model's life, undoes it. Raises ThirdPartyError.
    """
    if "deepspeed" in sys.modules:
        setattr(model, _OMITS_FROZEN, _OmitsFrozen())


def keep_frozen(model: nn.Module) -> None:
    """Undo :func:`omit_frozen`."""
    holder = vars(model).pop(_OMITS_FROZEN, None)
    if holder is not None:
        holder.close()


class _OmitsFrozen(PatchHolder):
    """Makes DeepSpeed's engines omit the frozen parameters of models that have the attribute."""

    @classmethod
    def change(cls) -> AbstractContextManager[object]:
        from deepspeed import DeepSpeedEngine

        def without_frozen(save_checkpoint: Code) -> Code:
            @wraps(save_checkpoint)
            def saves(self: Engine, *args: object, **kwargs: object) -> object:
                if hasattr(self.module, _OMITS_FROZEN):
                    kwargs.setdefault("exclude_frozen_parameters", True)
                return save_checkpoint(self, *args, **kwargs)

            return saves

        return patched(DeepSpeedEngine, "save_checkpoint", without_frozen)
