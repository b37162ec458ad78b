"""The engine that the training loop drives: DeepSpeed's, or a small one for a single process without it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.parallel.master_adamw import MasterAdamW


class Engine(Protocol):
    """The parts of an engine that the training loop uses; DeepSpeed's ``DeepSpeedEngine`` has them all."""

    module: nn.Module
    optimizer: Any  # DeepSpeed's wrappers share no base class
    global_steps: int
    """Optimizer steps tried, including those that were skipped."""
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
    """One process, AdamW on fp32 masters, accumulation and clipping; skips a step whose gradient is not finite."""

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[dict[str, Any]],
        *,
        gradient_accumulation_steps: int = 1,
        gradient_clipping: float = 0.0,
    ):
        self.module = module
        self.global_steps = self.skipped_steps = self._micro_steps = 0
        self._accumulation, self._clipping = gradient_accumulation_steps, gradient_clipping
        self._applied = False
        self._grad_norm: float | None = None
        params = [param for group in param_groups for param in group["params"]]
        on_cpu = all(param.device.type == "cpu" for param in params)
        self.optimizer = MasterAdamW(list(param_groups), fused=on_cpu)  # on a CPU four times as fast
        self.optimizer.masters()  # there from the first mask update on

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

    def train(self, mode: bool = True) -> LocalEngine:
        self.module.train(mode)
        return self

    def eval(self) -> LocalEngine:
        return self.train(False)

    def get_global_grad_norm(self) -> float | None:
        return self._grad_norm


def build_engine(
    model: nn.Module,
    param_groups: Sequence[dict[str, Any]],
    *,
    ds_config: JsonObject | None,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float = 0.0,
) -> Engine:
    """Return DeepSpeed's engine for a resolved ``ds_config``, or a LocalEngine without one. Collective.

    Raises InputError when the trainable parameters mix dtypes, which DeepSpeed answers with a bare assertion.
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
    return engine


def import_muon_without_its_compiler() -> None:
    """Import DeepSpeed's Muon, as its check of any optimizer does, without wrapping its functions in ``torch.compile``.

    Nothing here uses Muon, and torch's compiler costs every rank seconds at the start, and where Triton is a pool of
    worker processes.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile then returns the function itself
    try:
        with suppress(ImportError):  # DeepSpeed does without it too
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def note_masters(optimizer: object) -> None:
    """Let :func:`pst_ds.parallel.zero3.fp32_masters` find those of DeepSpeed's ``optimizer`` at stage 0 in 16 bits: it
    tells no parameter of its own."""
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    for params, masters in groups:
        for param, master in zip(params, masters, strict=True):
            param.fp32_master = master


def optimizer_bytes(engine: Engine) -> int:
    """Bytes of optimizer state on this rank: Adam's two moments, and the fp32 masters where they are kept apart."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    model_storage = {p.untyped_storage().data_ptr() for p in engine.module.parameters() if p.numel()}
    total = 0
    for master, state in inner.state.items():
        total += sum(t.nbytes for key, t in state.items() if key != "step" and torch.is_tensor(t))
        if master.untyped_storage().data_ptr() not in model_storage:
            total += master.nbytes
    return total


def release(engine: Engine) -> None:
    """Free the weights and the optimizer state of an engine that is no longer used.

    DeepSpeed holds on to every ZeRO-3 model of a process; what it then holds is empty.
    """
    if isinstance(engine, LocalEngine):
        return
    params = list(engine.module.parameters())
    cast(Any, engine).destroy()
    for param in params:
        param.grad = None
        for tensor in (param, getattr(param, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.new_empty(0)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    inner.state.clear()
    inner.param_groups.clear()
    vars(engine.optimizer).clear()
