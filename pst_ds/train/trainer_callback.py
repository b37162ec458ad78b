"""PST in HF Trainer: masks in step with the schedule, their figures in the Trainer's logs, adapter checkpoints."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pst_ds.checkpoint.adapter import CONFIG_FILE, adapter_state, save_pretrained, write_adapter_state
from pst_ds.core.schedule import CubicSchedule, Schedule
from pst_ds.errors import InputError
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.nn.adapter_checkpoints import adapter_checkpoints
from pst_ds.nn.inject import injected_config
from pst_ds.nn.optimizer import pst_optimizer, pst_parameter_groups
from pst_ds.parallel.ds_config import require_deepspeed, validate_deepspeed_config
from pst_ds.parallel.master_adamw import MasterAdamW
from pst_ds.parallel.ranks import all_gather_objects, is_main
from pst_ds.parallel.steps import torch_optimizer, unwrapped
from pst_ds.third_party import require

_FIGURES: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()
"""The values to log of each model that is being trained."""


class _LogFigures(TrainerCallback):
    """Ahead of the callbacks that report: a user's own callback comes after them, too late to add to the logs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        figures = {} if model is None else _FIGURES.get(model, {})
        if logs is not None and "loss" in logs:  # of training steps, and the history that trainer_state.json keeps
            for entry in (logs, state.log_history[-1]):
                entry.update(figures)


class PSTCallback(_LogFigures, ExportableState):
    """Keep the masks of the Trainer's model, which has PST layers (``inject_pst``), in step with a schedule.

        PSTCallback(final_sparsity=0.9)         # fields of CubicSchedule; num_steps is the Trainer's max_steps
        PSTCallback(CubicSchedule(...))         # or any other schedule

    Masks are selected again after *applied* optimizer steps: one that a loss scaler or DeepSpeed skips counts for
    nothing. At the end of the ramp the scores train no more. "sparsity/target", "sparsity/actual" and "flip_rate" go
    into the Trainer's logs, and so to TensorBoard, W&B or MLflow.

    The Trainer's best metric is that of the masks as they end: what was evaluated on the ramp, where the model is
    denser, is forgotten. So ``load_best_model_at_end`` and EarlyStoppingCallback begin at the end of the ramp. It is a
    warning when training ends before that.

    Checkpoints hold what training changed and not the frozen base: pst_config.json and pst_model.safetensors, for
    :func:`pst_ds.load_pretrained` and for ``Trainer.train(resume_from_checkpoint=...)``; under DeepSpeed its own files
    too, without the frozen weights. ``model.save_pretrained`` writes the same.

    Args:
        schedule: any schedule; None for a CubicSchedule of ``fields``.
        fields: those of CubicSchedule; ``num_steps`` is the Trainer's ``max_steps`` unless given.

    Raises:
        InputError: neither or both were given, or the Trainer, its model or its optimizer cannot train with masks.
    """

    def __init__(self, schedule: Schedule | None = None, **fields: Any):
        if (schedule is None) == (not fields):
            raise InputError(
                "PSTCallback takes a schedule, or the fields of one: PSTCallback(final_sparsity=0.9), with "
                "initial_sparsity, warmup_fraction, cooldown_fraction, update_interval and num_steps"
            )
        if type(schedule) is CubicSchedule:  # a subclass has a ramp of its own
            fields, schedule = dataclasses.asdict(schedule), None
        self._schedule, self._fields = schedule, fields
        if schedule is None:
            _cubic(1, **fields)  # refuses bad fields now
        self._masks: MaskUpdater | None = None
        self._came_with_trainer = False
        from transformers import trainer

        callbacks = require(trainer, "DEFAULT_CALLBACKS")
        if _LogFigures not in callbacks:
            callbacks.append(_LogFigures)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object
    ) -> None:
        config = _deepspeed_config()
        if config is not None:
            require_deepspeed()
            ours = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
            validate_deepspeed_config(ours, source="the Trainer's DeepSpeed config")
        injected_config(model)  # refuses a model without PST, or with PST in a part
        if self._schedule is not None and args.restore_callback_states_from_checkpoint:
            raise InputError(
                f"restore_callback_states_from_checkpoint = True makes a new PSTCallback from JSON, which holds no "
                f"{type(self._schedule).__name__}; leave it out (masks go on at their step all the same), or give "
                "PSTCallback the fields of CubicSchedule"
            )
        adapter_checkpoints(model)
        model.save_pretrained = _SavesAdapterState(model)
        self._came_with_trainer = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: object,
    ) -> None:
        if not isinstance(vars(model).get("save_pretrained"), _SavesAdapterState):
            if self._came_with_trainer:
                raise InputError(
                    "the Trainer's model is not the one that it was made with. model_init, and hyperparameter_search "
                    "with it, make a new model in train(), which PSTCallback does not know of: make the model, "
                    "inject_pst and the Trainer anew for each run"
                )
            raise InputError(
                "PSTCallback came after the Trainer was made: give it in Trainer(callbacks=[PSTCallback(...)]), so "
                "that checkpoints are read and written with their masks"
            )
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
        self._forget_best_of_ramp(state)
        last = step + state.max_steps - state.global_step
        if not schedule.is_final(last) and is_main():
            warnings.warn(
                f"the Trainer ends at step {state.max_steps}, ahead of the schedule's end: at a sparsity of "
                f"{schedule.sparsity_at(last):.3g}, not {schedule.final_sparsity:.3g}. Leave out num_steps, or give a "
                "schedule of so many steps",
                stacklevel=2,
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: object,
    ) -> None:
        assert self._masks is not None
        self._forget_best_of_ramp(state)
        self._masks.after_step(optimizer)
        self._note_figures(model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object
    ) -> None:
        """Under DeepSpeed ``save_pretrained`` is called on one rank, which holds no masters; here all meet."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if _deepspeed_config() is not None and all_gather_objects(folder.is_dir())[0]:
            save_pretrained(model, folder, step=self._step, writes=args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object
    ) -> None:
        """The Trainer may have loaded its best checkpoint by now: step and masks are those of its folder."""
        assert self._masks is not None
        if args.load_best_model_at_end:
            loaded = all_gather_objects(_step_of(state.best_model_checkpoint))[0]
            if loaded is not None:
                self._masks.load_state_dict({"step": loaded})
                self._note_figures(model)
        if not self._masks.is_final and is_main():
            warnings.warn(
                f"training ended after {self._step} applied steps, ahead of the schedule's end: the masks have a "
                f"sparsity of {self._masks.masks.sparsity:.3g}, not {self._masks.schedule.final_sparsity:.3g}",
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json keeps."""
        return {"args": self._fields, "attributes": {"step": self._step}}

    @property
    def _step(self) -> int:
        return 0 if self._masks is None else self._masks.step

    def _forget_best_of_ramp(self, state: TrainerState) -> None:
        """Before a step: whatever was evaluated so far had masks that still change. The step that ends the ramp is
        followed by the first evaluation that counts."""
        assert self._masks is not None
        if not self._masks.is_final:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _note_figures(self, model: Any) -> None:
        assert self._masks is not None
        masks = self._masks.masks
        model.save_pretrained.step = self._masks.step
        _FIGURES[model] = {
            "sparsity/target": self._masks.schedule.sparsity_at(self._masks.step),
            "sparsity/actual": masks.sparsity,
            "flip_rate": masks.flip_rate,
        }


class _SavesAdapterState:
    """In the place of a model's ``save_pretrained``; goes with the model where that is pickled or copied."""

    def __init__(self, model: nn.Module):
        self.model, self.step = model, 0

    def __call__(
        self, save_directory: str, state_dict: dict[str, Tensor] | None = None, is_main_process: bool = True, **_: Any
    ) -> None:
        """Write the adapter state on the rank that calls; nothing for an empty ``state_dict``, which the Trainer passes
        under ZeRO-3 where it gathers no weights: :meth:`PSTCallback.on_save` follows."""
        if is_main_process and state_dict != {}:
            tensors = adapter_state(self.model, state_dict, keep=True)
            write_adapter_state(self.model, save_directory, tensors, step=self.step)


def trainer_optimizer(model: nn.Module, **rates: Any) -> tuple[type[MasterAdamW], dict[str, Any]]:
    """Return what makes the Trainer train with :func:`pst_ds.pst_optimizer`.

        Trainer(model, ..., optimizer_cls_and_kwargs=trainer_optimizer(model))

    The optimizer is made when training begins, so also under DeepSpeed, where the Trainer drops one that it was given.

    Args:
        model: the Trainer's model, with PST modules.
        rates: learning rates and betas, as :func:`pst_ds.pst_parameter_groups` takes them.

    Raises:
        InputError: the model cannot be trained; or, when training begins, the Trainer has another model.
    """
    like = pst_optimizer(model, **rates)  # refuses what cannot be trained now
    return _TrainerAdamW, {"trained": model, "rates": rates, "fused": like.defaults["fused"]}


class _TrainerAdamW(MasterAdamW):
    """AdamW over PST's groups; the Trainer's own only tell whether it has the same model."""

    def __init__(self, groups: Any, *, trained: nn.Module, rates: dict[str, Any], fused: bool):
        own = {id(param) for param in trained.parameters()}
        if any(id(param) not in own for group in groups for param in group["params"]):
            raise InputError(
                "trainer_optimizer(model) was given another model than the Trainer, which would train nothing: give "
                "both the same. model_init, and hyperparameter_search with it, makes a new one in train(), so PST "
                "cannot be used with it"
            )
        super().__init__(pst_parameter_groups(trained, **rates), fused=fused)


def _step_of(folder: str | None) -> int | None:
    """The applied steps of a checkpoint; None where it does not say."""
    try:
        return None if folder is None else json.loads((Path(folder) / CONFIG_FILE).read_bytes())["step"]
    except (OSError, ValueError, KeyError):
        return None


def _deepspeed_config() -> dict[str, Any] | None:
    """The DeepSpeed config of the current Trainer; None without DeepSpeed."""
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
    if _deepspeed_config() is not None:
        return  # its groups hold flat tensors
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in unwrapped(model).named_parameters():
        if param.requires_grad and id(param) not in held:
            raise InputError(
                f"the optimizer does not hold {name}, which is trained: it was made of another model, or before all "
                "of this one was there. Make it of the Trainer's model: pst_optimizer(model), after inject_pst"
            )
