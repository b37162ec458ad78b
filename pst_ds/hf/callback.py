"""PST in HF Trainer: masks in step with the schedule, their figures in the Trainer's logs, small checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pst_ds.core.schedule import CubicSchedule, Schedule
from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.pretrained import save_pretrained, small_state, write_small_state
from pst_ds.nn.small_checkpoints import small_checkpoints
from pst_ds.parallel.ds_config import require_deepspeed, validate_deepspeed_config
from pst_ds.parallel.master_adamw import MasterAdamW
from pst_ds.parallel.steps import torch_optimizer, unwrapped
from pst_ds.train.mask_updater import MaskUpdater
from pst_ds.train.optimizer import pst_optimizer, pst_parameter_groups

_FIGURES: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()
"""What is logged of each model that is being trained."""


class _LogFigures(TrainerCallback):
    """Ahead of the callbacks that report: a user's own callback comes after them, too late to add to the logs."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        _add_figures(model, state, logs)


class PSTCallback(_LogFigures, ExportableState):
    """Keeps the masks of the Trainer's model in step with a schedule. The model must have PST layers (``inject_pst``).

        PSTCallback(final_sparsity=0.9)         # fields of CubicSchedule; num_steps is the Trainer's max_steps
        PSTCallback(CubicSchedule(...))         # or any other schedule

    Masks are selected anew after *applied* optimizer steps: one that a loss scaler or DeepSpeed skips counts for
    nothing. At the end of the ramp the scores train no more. "sparsity/target", "sparsity/actual" and "flip_rate" go
    into the Trainer's logs, and so to TensorBoard, W&B or MLflow.

    Checkpoints hold what training changed and not the frozen base: pst_config.json and pst_model.safetensors, for
    :func:`pst_ds.load_pretrained` and for ``Trainer.train(resume_from_checkpoint=...)``; under DeepSpeed its own files
    too, without the frozen weights. ``model.save_pretrained`` writes the same. Raises InputError for what cannot work.
    """

    def __init__(self, schedule: Schedule | None = None, **fields: Any):
        if (schedule is None) == (not fields):
            raise InputError(
                "PSTCallback takes a schedule, or the fields of one: PSTCallback(final_sparsity=0.9), with "
                "initial_sparsity, warmup_fraction, cooldown_fraction, update_interval and num_steps"
            )
        if isinstance(schedule, CubicSchedule):
            fields, schedule = dataclasses.asdict(schedule), None
        self._schedule, self._fields = schedule, fields
        if schedule is None:
            _cubic(1, **fields)  # refuses bad fields now
        self._masks: MaskUpdater | None = None
        _log_before_others()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        config = _deepspeed_config()
        if config is not None:
            require_deepspeed()
            ours = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
            validate_deepspeed_config(ours, source="the Trainer's DeepSpeed config")
        if not pst_layers(model):
            raise InputError("the Trainer's model has no PST layers; call inject_pst(model, PSTConfig(...)) before it")
        small_checkpoints(model)
        self._write_checkpoints_of(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        if "save_pretrained" not in vars(model):
            raise InputError(
                "PSTCallback came after the Trainer was made: give it in Trainer(callbacks=[PSTCallback(...)]), so "
                "that checkpoints are read and written with their masks"
            )
        self._write_checkpoints_of(model)  # the Trainer may have made this callback anew from a checkpoint
        _require_groups(torch_optimizer(optimizer), model)
        schedule = self._schedule or _cubic(state.max_steps, **self._fields)
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__)
        if state.global_step and not isinstance(saved, dict):
            raise InputError(
                "the checkpoint to resume from was written without a PSTCallback, or with several: its masks cannot be "
                "continued"
            )
        step = saved["attributes"]["step"] if state.global_step else 0
        self._masks = MaskUpdater(model, schedule, step=step)
        self._note_figures(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        assert self._masks is not None
        self._masks.after_step(optimizer)
        self._note_figures(model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Under DeepSpeed ``save_pretrained`` is called on one rank, which holds no masters; here all meet."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if _deepspeed_config() is not None and folder.is_dir():
            save_pretrained(model, folder, step=self._step)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": self._fields, "attributes": {"step": self._step}}

    @property
    def _step(self) -> int:
        return 0 if self._masks is None else self._masks.step

    def _write_checkpoints_of(self, model: Any) -> None:
        model.save_pretrained = MethodType(self._save_pretrained, model)

    def _note_figures(self, model: nn.Module) -> None:
        assert self._masks is not None
        masks = self._masks.masks
        _FIGURES[model] = {
            "sparsity/target": self._masks.schedule.sparsity_at(self._masks.step),
            "sparsity/actual": masks.sparsity,
            "flip_rate": masks.flip_rate,
        }

    def _save_pretrained(
        self, model: nn.Module, save_directory: str, state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True, **_: Any,
    ) -> None:  # fmt: skip
        """In the place of the model's: the small state. Nothing for an empty ``state_dict``, which the Trainer passes
        under ZeRO-3 where it gathers no weights; :meth:`on_save` follows."""
        if is_main_process and state_dict != {}:
            write_small_state(model, save_directory, small_state(model, state_dict), step=self._step)


def trainer_optimizer(model: nn.Module, **rates: Any) -> tuple[type[MasterAdamW], dict[str, Any]]:
    """For ``Trainer(optimizer_cls_and_kwargs=trainer_optimizer(model))``: :func:`pst_ds.pst_optimizer` of ``model``.

    Made when training begins, so under DeepSpeed too, where the Trainer drops an optimizer that it was given.
    """
    like = pst_optimizer(model, **rates)  # refuses what cannot be trained now

    class Optimizer(MasterAdamW):
        def __init__(self, _groups: Any):
            super().__init__(pst_parameter_groups(model, **rates), fused=like.defaults["fused"])

    return Optimizer, {}


def _log_before_others() -> None:
    from transformers import trainer

    if _LogFigures not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(_LogFigures)  # type: ignore[arg-type]


def _add_figures(model: nn.Module | None, state: TrainerState, logs: dict[str, Any] | None) -> None:
    """To the logs of training steps, which have a loss, and to the history that trainer_state.json keeps."""
    figures = {} if model is None else _FIGURES.get(model, {})
    if logs is not None and "loss" in logs:
        for entry in (logs, state.log_history[-1]):
            entry.update(figures)


def _deepspeed_config() -> dict[str, Any] | None:
    """Of the Trainer there is now; None without DeepSpeed."""
    from accelerate.state import AcceleratorState

    plugin = AcceleratorState().deepspeed_plugin
    return None if plugin is None else plugin.deepspeed_config


def _cubic(max_steps: int, **fields: Any) -> CubicSchedule:
    try:
        return CubicSchedule(**{"num_steps": max_steps, **fields})
    except (TypeError, ValueError) as error:
        raise InputError(f"PSTCallback: {error}") from None


def _require_groups(optimizer: Any, model: nn.Module) -> None:
    """Rates of their own for scores and updates, and no weight decay, are not what the Trainer's own optimizer has."""
    wanted = {group["name"] for group in pst_parameter_groups(unwrapped(model))}
    found = {group.get("name") for group in optimizer.param_groups}
    if found != wanted:
        raise InputError(
            f"the optimizer's groups are named {sorted(map(str, found))}, not {sorted(wanted)}: scores and updates "
            "need rates of their own. Pass Trainer(optimizer_cls_and_kwargs=trainer_optimizer(model)). Under DeepSpeed "
            "the Trainer drops optimizers=(pst_optimizer(model), None), and an optimizer in its JSON replaces both"
        )
