"""Train with HF Trainer: mask updates on a schedule, their figures in the logs, adapter checkpoints, optimizer."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from pst_ds.checkpoint.adapter import CONFIG_FILE, adapter_state, save_pretrained, write_adapter_state
from pst_ds.core.criteria.criterion import Criterion, WeightSlice
from pst_ds.core.schedule import CubicSchedule, Schedule
from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.nn.adapter_checkpoints import adapter_checkpoints
from pst_ds.nn.inject import injected_config, settled_layers
from pst_ds.nn.optimizer import pst_optimizer, pst_parameter_groups
from pst_ds.parallel import sharding
from pst_ds.parallel.ds_config import validate_deepspeed_config
from pst_ds.parallel.master_adamw import MasterAdamW
from pst_ds.parallel.ranks import all_gather_objects, is_main
from pst_ds.parallel.steps import torch_optimizer, unwrapped
from pst_ds.third_party import PatchHolder, appended, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _LogFigures(TrainerCallback):
    """Adds figures to the logs. It comes before the callbacks that report; a user's own callback comes after them."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any) -> None:
        logs = passed["logs"]
        saver = _saver_of(passed["model"])
        if saver is not None and "loss" in logs:  # logs of evaluations have "eval_loss"
            logs.update(saver.figures)
            # The Trainer has already copied the logs to the history, which trainer_state.json keeps.
            state.log_history[-1].update(saver.figures)


class _LogsFigures(PatchHolder):
    """Makes every Trainer that is created have :class:`_LogFigures`, while a PSTCallback exists."""

    @classmethod
    def change(cls) -> AbstractContextManager[object]:
        from transformers import trainer

        # Only default callbacks come before those of report_to, which send the logs away.
        return appended(require(trainer, "DEFAULT_CALLBACKS"), _LogFigures)


class PSTCallback(_LogFigures, ExportableState):
    """Prune the Trainer's model, which has PST layers (``inject_pst``), on a schedule.

        PSTCallback(final_sparsity=0.9)         # fields of CubicSchedule; num_steps is the Trainer's max_steps
        PSTCallback(CubicSchedule(...))         # or any other schedule

    Masks are selected after *applied* optimizer steps; steps that a loss scaler or DeepSpeed skips do not count. From
    the end of the ramp on, the scores are no longer trained. "sparsity/target", "sparsity/actual" and "flip_rate" go
    into the Trainer's logs, and so to TensorBoard, W&B or MLflow.

    Evaluations on the ramp, where the model is denser, do not count for the Trainer's best metric, so
    ``load_best_model_at_end`` and EarlyStoppingCallback start at the end of the ramp. Training that ends before it
    warns.

    Checkpoints have what training changed, without the frozen base: pst_config.json and pst_model.safetensors, for
    :func:`pst_ds.load_pretrained` and ``Trainer.train(resume_from_checkpoint=...)``; under DeepSpeed its own files too,
    without the frozen weights. ``model.save_pretrained`` writes the same.

    Args:
        schedule: Any schedule; None for a CubicSchedule of ``fields``.
        criterion: How weights are ranked, as in :class:`pst_ds.MaskUpdater`.
        fields: Fields of CubicSchedule; ``num_steps`` is the Trainer's ``max_steps`` by default.

    Raises:
        InputError: Neither or both were given, or the Trainer, its model or its optimizer cannot train with masks.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        criterion: "Criterion | Callable[[WeightSlice], Tensor] | None" = None,
        **fields: Any,
    ):
        if (schedule is None) == (not fields):
            raise InputError(
                "PSTCallback takes a schedule, or the fields of one: PSTCallback(final_sparsity=0.9), with "
                "initial_sparsity, warmup_fraction, cooldown_fraction, update_interval and num_steps"
            )
        # Fields fit in trainer_state.json, a schedule does not. A subclass has another ramp, so it is kept.
        if type(schedule) is CubicSchedule:
            fields = dataclasses.asdict(schedule)
            schedule = None
        self._schedule = schedule
        self._fields = fields
        self._criterion = criterion
        if schedule is None:
            _cubic(1, **fields)  # rejects bad fields now, not when training starts
        self._masks: MaskUpdater | None = None
        self._came_with_trainer = False
        self._logs_figures = _LogsFigures()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any) -> None:
        """Reject what masks cannot train with, and let the model read and write adapter checkpoints."""
        config = _deepspeed_config()
        model = passed["model"]
        if config is not None:
            # The Trainer makes optimizer and scheduler itself, and pst-ds refuses them in DeepSpeed's config.
            without_optimizer = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
            validate_deepspeed_config(without_optimizer, source="the Trainer's DeepSpeed config")
        injected_config(model)  # rejects a model without PST, or with PST in a part
        not_in_json: Schedule | Criterion | Callable[[WeightSlice], Tensor] | None = self._schedule
        if not_in_json is None:
            not_in_json = self._criterion
        if not_in_json is not None and args.restore_callback_states_from_checkpoint:
            raise InputError(
                f"restore_callback_states_from_checkpoint = True makes a new PSTCallback from JSON, which holds no "
                f"{type(not_in_json).__name__}; leave it out (the masks continue at their step anyway), or give "
                "PSTCallback the fields of CubicSchedule"
            )
        adapter_checkpoints(model)
        model.save_pretrained = _SavesAdapterState(model)
        self._came_with_trainer = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """Start or resume the masks. Raises InputError for another model, optimizer or checkpoint. Collective."""
        model = passed["model"]
        self._require_prepared(model)
        _require_groups(torch_optimizer(passed["optimizer"]), model)
        schedule = self._schedule or _cubic(state.max_steps, **self._fields)
        step = 0
        if state.global_step:
            step = self._saved_step(state)
        self._masks = MaskUpdater(model, schedule, step=step, criterion=self._criterion)
        self._note_figures(model)
        self._forget_best_of_ramp(state)
        # `step` counts applied steps, the Trainer also counts those that a loss scaler skips.
        last = step + state.max_steps - state.global_step
        if not schedule.is_final(last) and is_main():
            warnings.warn(
                f"the Trainer ends at step {state.max_steps}, ahead of the schedule's end: at a sparsity of "
                f"{schedule.sparsity_at(last):.3g}, not {schedule.final_sparsity:.3g}. Leave out num_steps, or give a "
                "schedule of so many steps",
                stacklevel=2,
            )

    def _require_prepared(self, model: nn.Module) -> None:
        """Raise InputError unless :meth:`on_init_end` has seen ``model``."""
        if _saver_of(model) is not None:
            return
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

    def _saved_step(self, state: TrainerState) -> int:
        """Return the applied steps of the checkpoint to resume from. Raises InputError if it does not have them."""
        # The Trainer keeps a list for several callbacks of one class.
        saved = state.stateful_callbacks.get(type(self).__name__)  # type: ignore[union-attr]
        if not isinstance(saved, dict):
            raise InputError(
                "the checkpoint to resume from was written without a PSTCallback, or with several: its masks "
                "cannot be continued"
            )
        return saved["attributes"]["step"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any) -> None:
        """Update the masks if they are due. Collective."""
        assert self._masks is not None
        self._forget_best_of_ramp(state)
        self._masks.after_step(passed["optimizer"])
        self._note_figures(passed["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any) -> None:
        """Save the adapter under DeepSpeed and FSDP2, where ``save_pretrained`` is called on one rank, without all
        masters. Collective."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        layers = settled_layers(passed["model"]).values()
        is_split = any(sharding.is_partitioned(layer.pst_mask) for layer in layers)
        if not is_split and _deepspeed_config() is None:
            return
        # Rank 0 decides for all, because saving is collective and another node may not see rank 0's disk.
        if all_gather_objects(folder.is_dir())[0]:
            save_pretrained(passed["model"], folder, step=self._step, writes=args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        """Take step and masks from the best checkpoint if the Trainer has loaded it. Collective."""
        assert self._masks is not None
        if args.load_best_model_at_end:
            # Rank 0's, because another node may not see the folder, and the masks' step must be the same on all ranks.
            loaded = all_gather_objects(_step_of(state.best_model_checkpoint))[0]
            if loaded is not None:
                self._masks.load_state_dict({"step": loaded})
                self._note_figures(passed["model"])
        if not self._masks.is_final and is_main():
            warnings.warn(
                f"training ended after {self._step} applied steps, ahead of the schedule's end: the masks have a "
                f"sparsity of {self._masks.masks.sparsity:.3g}, not {self._masks.schedule.final_sparsity:.3g}",
                stacklevel=2,
            )

    def state(self) -> dict[str, object]:
        """Return what trainer_state.json keeps."""
        return {"args": self._fields, "attributes": {"step": self._step}}

    @property
    def _step(self) -> int:
        """Applied steps; 0 before training starts."""
        if self._masks is None:
            return 0
        return self._masks.step

    def _forget_best_of_ramp(self, state: TrainerState) -> None:
        """Forget earlier evaluations if the masks could still change after them. Call it before the masks' step: the
        first evaluation that counts follows the step that ends the ramp."""
        assert self._masks is not None
        if not self._masks.is_final:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def _note_figures(self, model: "PreTrainedModel") -> None:
        """Give the figures of the masks to the model, from which the logs take them."""
        assert self._masks is not None
        masks = self._masks.masks
        saver = vars(model)["save_pretrained"]
        saver.step = self._masks.step
        saver.figures = {
            "sparsity/target": self._masks.schedule.sparsity_at(saver.step),
            "sparsity/actual": masks.sparsity,
            "flip_rate": masks.flip_rate,
        }


class _SavesAdapterState:
    """Replaces a model's ``save_pretrained``, and has the figures to log; pickled and copied with the model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.step = 0
        """Applied steps."""
        self.figures: dict[str, float] = {}

    def __call__(
        self,
        save_directory: str,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        **_: object,
    ) -> None:
        """Write the adapter state on the rank that calls.

        Under ZeRO-3 without gathered weights the Trainer passes an empty ``state_dict``. Then it writes nothing, and
        :meth:`PSTCallback.on_save` follows.
        """
        if is_main_process and state_dict != {}:
            tensors = adapter_state(self.model, state_dict, keep=True)
            write_adapter_state(self.model, save_directory, tensors, step=self.step)


def _saver_of(model: nn.Module) -> _SavesAdapterState | None:
    """Return what a PSTCallback has put in place of the model's ``save_pretrained``; None without one."""
    # Not getattr, which finds the method of the class.
    saver = vars(model).get("save_pretrained")
    return saver if isinstance(saver, _SavesAdapterState) else None


def trainer_optimizer(model: nn.Module, **rates: Any) -> tuple[type[MasterAdamW], dict[str, Any]]:
    """Return the Trainer's ``optimizer_cls_and_kwargs`` for training with :func:`pst_ds.pst_optimizer`.

        Trainer(model, ..., optimizer_cls_and_kwargs=trainer_optimizer(model))

    The optimizer is made when training starts. This also works under DeepSpeed, where the Trainer drops an optimizer
    that it was given.

    Args:
        model: The Trainer's model, with PST modules.
        rates: Learning rates and betas, as :func:`pst_ds.pst_parameter_groups` takes them.

    Raises:
        InputError: The model cannot be trained; or, when training starts, the Trainer has another model.
    """
    # Made now to reject what cannot be trained, and thrown away: the Trainer may still move the model to a device.
    like = pst_optimizer(model, **rates)
    return _TrainerAdamW, {"trained": model, "rates": rates, "fused": like.defaults["fused"]}


class _TrainerAdamW(MasterAdamW):
    """AdamW over PST's groups; the Trainer's groups only show whether it has the same model."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, trained: nn.Module, rates: dict[str, Any], fused: bool):
        parameters = {id(param) for param in trained.parameters()}
        for group in groups:
            if any(id(param) not in parameters for param in group["params"]):
                raise InputError(
                    "trainer_optimizer(model) was given another model than the Trainer, which would train nothing: "
                    "give both the same. model_init, and hyperparameter_search with it, makes a new one in train(), so "
                    "PST cannot be used with it"
                )
        super().__init__(pst_parameter_groups(trained, **rates), fused=fused)


def _step_of(folder: str | None) -> int | None:
    """Return the applied steps of a checkpoint; None if it does not have them."""
    if folder is None:
        return None
    try:
        return json.loads((Path(folder) / CONFIG_FILE).read_bytes())["step"]
    except (OSError, ValueError, KeyError):  # a checkpoint without the adapter, or with one saved outside of training
        return None


def _deepspeed_config() -> JsonObject | None:
    """Return the DeepSpeed config of the current Trainer; None without DeepSpeed."""
    from accelerate.state import AcceleratorState

    plugin = AcceleratorState().deepspeed_plugin
    if plugin is None:
        return None
    return plugin.deepspeed_config


def _cubic(max_steps: int, **fields: Any) -> CubicSchedule:
    """Return the schedule of ``fields``, with ``max_steps`` unless they have num_steps. Raises InputError."""
    try:
        return CubicSchedule(**{"num_steps": max_steps, **fields})
    except (TypeError, ValueError) as error:
        raise InputError(f"PSTCallback: {error}") from None


def _require_groups(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise InputError unless the optimizer has the groups of :func:`pst_parameter_groups`, with every parameter."""
    expected = {group["name"] for group in pst_parameter_groups(unwrapped(model))}
    names = {group.get("name") for group in optimizer.param_groups}
    if names != expected:
        raise InputError(
            f"the optimizer's groups are named {sorted(map(str, names))}, not {sorted(expected)}: scores and updates "
            "need separate rates. Pass Trainer(optimizer_cls_and_kwargs=trainer_optimizer(model)). Under DeepSpeed the "
            "Trainer drops optimizers=(pst_optimizer(model), None), and an optimizer in its JSON replaces both"
        )
    if _deepspeed_config() is not None:
        return  # its groups have flat tensors, in which parameters cannot be recognised
    held: set[int] = set()
    for group in optimizer.param_groups:
        held.update(id(param) for param in group["params"])
    for name, param in unwrapped(model).named_parameters():
        if param.requires_grad and id(param) not in held:
            raise InputError(
                f"the optimizer does not hold {name}, which is trained: it was made of another model, or before all "
                "of this one was there. Make it of the Trainer's model: pst_optimizer(model), after inject_pst"
            )
