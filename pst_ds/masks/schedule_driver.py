"""Update masks and quantisation scales when their schedules say so."""

import json
import re
import warnings
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from pst_ds.config.pst import PSTConfig
from pst_ds.core.criteria.criterion import Criterion, WeightSlice
from pst_ds.core.schedule import RoundingSchedule, Schedule, Schedules
from pst_ds.errors import InputError, shortened
from pst_ds.masks.choose_source import choose_source
from pst_ds.masks.mask_source import MaskSource
from pst_ds.masks.scales import RoundingStats, update_scales
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.nn.inject import freeze_scores, injected_config, layers_never_called, pst_layers, round_weights
from pst_ds.nn.model_structure import is_inside_block
from pst_ds.nn.tables.rounded import round_tables
from pst_ds.nn.targets import listed
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import all_gather_objects, is_main
from pst_ds.parallel.steps import applied_steps, steps_noted, torch_optimizer, unwrapped
from pst_ds.parallel.watchdog import heartbeat

SPARSITY_TOLERANCE = 0.01
"""Largest difference between requested and measured sparsity, which rounds down in every row or group."""


def update_if_due(
    model: nn.Module, schedules: Schedules, step: int, source: MaskSource
) -> tuple[MaskStats | None, RoundingStats | None]:
    """Update masks and quantisation scales if they are due after applied step ``step`` (0: before the first). Once the
    masks are final, fix the scores; from the first search of scales on, quantise the weights. Return the statistics of
    both updates; None for one that was not due.

    ``source`` chooses the masks, and is closed once they are final. Collective: schedules and step are equal on every
    rank, so all ranks update or none does.

    Raises:
        InputError: after the first step, for layers that no forward pass has called (``PSTConfig.prune_uncalled``).
        FloatingPointError: scores, updates or weights are not finite; raised on every rank.
    """
    masks = None if schedules.masks is None else _update_masks(model, schedules.masks, step, source)
    scales = None
    if schedules.updates_scales_at(step) and any(layer.stored_grid for layer in pst_layers(model).values()):
        heartbeat("the search of scales")
        scales = update_scales(model)
        round_weights(model)
    if schedules.quantises_at(step):
        round_tables(model)
    return masks, scales


def _update_masks(model: nn.Module, schedule: Schedule, step: int, source: MaskSource) -> MaskStats | None:
    """Select masks if ``schedule`` does so after ``step``."""
    if step == 0:  # a forward pass before training may call layers whose weight training reads without a call
        for layer in pst_layers(model).values():
            layer.was_called = False
    if step == 1:
        _require_called(model)
    masks = None
    if schedule.updates_masks_at(step):
        masks = source.update(schedule.sparsity_at(step), schedule.progress_at(step))
    if schedule.is_final(step):
        freeze_scores(model)
        source.close()
    return masks


class MaskUpdater:
    """Keep the masks of a model in step with a schedule, in your own training loop.

        masks = MaskUpdater(model, schedule)
        for batch in loader:
            ...  # forward, backward
            optimizer.step()
            masks.after_step(optimizer)      # or the DeepSpeed engine

    Create it right before the loop: after ``deepspeed.initialize`` or ``accelerator.prepare``, and after loading a
    checkpoint. Creating it is collective, and so is :meth:`after_step`. From then on the schedule decides whether
    scores train, even if the masks were final before. Rank 0 warns if the schedule starts below the current sparsity.

    Args:
        model: the model that ``inject_pst`` was called on, or its wrapper from DeepSpeed or accelerate.
        schedule: sparsity of the masks, and the steps at which they change.
        step: optimizer steps applied so far, to resume a run. Alternatively let accelerate save and load the updater
            (``register_for_checkpointing``).
        rounding: steps from which on weights are quantised with the ``grid`` of ``inject_pst``, and at which their
            scales are searched; None for never.
        criterion: how weights are ranked: a :class:`pst_ds.Criterion`, or a function of a slice of a weight that
            returns its scores; None for the criterion of the model's PSTConfig.

    Raises:
        InputError: ``inject_pst`` was not called on ``model``; the schedule, ``rounding`` or ``criterion`` does not
            fit the model or each other.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        step: int = 0,
        rounding: RoundingSchedule | None = None,
        criterion: "Criterion | Callable[[WeightSlice], Tensor] | None" = None,
    ):
        _require_schedule(schedule)
        self.schedule = schedule
        self._model = unwrapped(model)
        _require_pst(self._model)
        self.schedules = Schedules(schedule, rounding)
        self._source = choose_source(self._model, self.schedules, criterion=criterion)
        self._source.require_ready()
        if _keeps_zeros(self._model) and not schedule.is_final(0):
            raise InputError(
                f'initial_mask = "zeros": {type(schedule).__name__} would prune other weights than the base model. '
                "Give MaskUpdater OneShotSchedule(final_sparsity=…) with the sparsity of the base model"
            )
        _require_rounding_fits(self._model, schedule, rounding)
        self.step = 0
        """Applied optimizer steps."""
        self.masks: MaskStats
        """Counts and checksum of the current masks."""
        self.rounding_stats: RoundingStats | None = None
        """Result of this process's last search for quantisation scales."""
        self._noted: int
        self.load_state_dict({"step": step})
        if step == 0:
            self._begin()

    @property
    def is_final(self) -> bool:
        """True if the masks no longer change."""
        return self.schedule.is_final(self.step)

    def after_step(self, stepper: Engine | Optimizer) -> MaskStats | None:
        """Update the masks if they are due. Call it after every ``step`` of ``stepper``. Collective.

        Skipped steps, including those of a GradScaler, and micro-batches before the end of a step do not count. Once
        the masks are final, scores stop training: groups named "scores" get a learning rate of 0.

        Args:
            stepper: a DeepSpeed engine, or an optimizer of accelerate or torch.

        Returns:
            The new masks' counts and checksum, or None if the masks did not change.

        Raises:
            InputError: more than one step was applied since the last call, or the first step left layers uncalled.
            FloatingPointError: scores are not finite; raised on every rank.
        """
        optimizer = torch_optimizer(stepper)
        step = applied_steps(stepper, self.step, noted=self._noted)
        new = None
        self._noted = steps_noted()
        if step not in (self.step, self.step + 1):
            raise InputError(
                f"the engine has applied {step} optimizer steps, but the masks are at step {self.step}: call "
                "after_step after every step, and make MaskUpdater(..., step=engine.global_steps - "
                "engine.skipped_steps) after engine.load_checkpoint"
            )
        if step > self.step:
            self.step = step
            new = self._update(step)
            self._listen()
        _stop_scores(optimizer, self._scores_are_fixed)
        return new

    def state_dict(self) -> dict[str, int]:
        """Return the step; the masks are part of the model."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the step of ``state`` with the model's current masks. Collective."""
        self.step = state["step"]
        self.masks = mask_stats(self._model)
        self._noted = steps_noted()
        freeze_scores(self._model, frozen=self._scores_are_fixed)
        if self.schedules.rounding is not None:
            round_weights(self._model, rounds=self.schedules.quantises_at(self.step))
        self._listen()

    @property
    def _scores_are_fixed(self) -> bool:
        """True if the learned scores have no effect on masks, now or later."""
        return self.is_final or not self._source.learns_scores

    def _listen(self) -> None:
        """Collect what the criterion needs of the next step, if masks are updated after it."""
        self._source.before_batch(self.schedules, self.step)

    def _update(self, step: int) -> MaskStats | None:
        masks, scales = update_if_due(self._model, self.schedules, step, self._source)
        self.masks = masks or self.masks
        self.rounding_stats = scales or self.rounding_stats
        return masks

    def _begin(self) -> None:
        """Select the masks before the first step, and check that they fit those that the model came with."""
        found = self.masks.sparsity
        self._source.close()  # there was no batch yet
        new = self._update(0)
        self._listen()
        if new and _keeps_zeros(self._model) and abs(new.sparsity - self.schedule.final_sparsity) > SPARSITY_TOLERANCE:
            raise InputError(
                f"final_sparsity = {self.schedule.final_sparsity}, but {new.sparsity:.4f} of the pruned weights are "
                f'zero, and initial_mask = "zeros" keeps these. Set final_sparsity = {new.sparsity:.4f}'
            )
        start = self.schedule.sparsity_at(0)
        if new:
            start = new.sparsity
        if start + SPARSITY_TOLERANCE < found and is_main():
            warnings.warn(
                f"the model's masks have a sparsity of {found:.3g}, and the schedule starts at {start:.3g}: pruned "
                f"weights are restored before they are pruned again. Give the schedule initial_sparsity = {found:.3g} "
                "to continue from here",
                stacklevel=3,
            )


def _keeps_zeros(model: nn.Module) -> bool:
    """Return whether the masks are those of the base model's zeros, which no schedule changes."""
    return injected_config(model).initial_mask == "zeros"


def _require_schedule(schedule: object) -> None:
    """Raise InputError for an object without the methods of a schedule, and for one that solves."""
    wanted = ("final_sparsity", "sparsity_at", "progress_at", "updates_masks_at", "is_final")
    missing = [name for name in wanted if not hasattr(schedule, name)]
    if getattr(schedule, "solves", 0):
        raise InputError(
            f"{schedule}: runs of pst-ds train collect what solves need, MaskUpdater does not. Give it solves = 0"
        )
    if missing:
        raise InputError(
            f"{type(schedule).__name__} is not a schedule: it lacks {', '.join(missing)}. Use pst_ds.CubicSchedule, or "
            "a subclass with another sparsity_at"
        )


def _require_rounding_fits(model: nn.Module, schedule: Schedule, rounding: RoundingSchedule | None) -> None:
    """Raise InputError for rounding without a quantisation scheme, or before the masks are final."""
    if rounding is None:
        return
    if not any(layer.stored_grid for layer in pst_layers(model).values()):
        raise InputError(
            "rounding: the model has no quantisation scheme. Call inject_pst with grid=Grid(bits=4, group=64)"
        )
    if not schedule.is_final(rounding.start):
        raise InputError(
            f"rounding.start = {rounding.start} is before the schedule's last mask update. Start when the kept "
            "weights, which determine the scales, are final: once schedule.is_final(start)"
        )


def _stop_scores(optimizer: Optimizer, stop: bool) -> None:
    """Set the rate of scores to 0, or restore it: without a gradient Adam's momentum would still change them."""
    for group in optimizer.param_groups:
        if group.get("name") == "scores":
            if stop:
                # a second stop finds a rate of 0, which must not replace the remembered one
                group["lr_of_ramp"] = group["lr"] or group.get("lr_of_ramp", 0.0)
                group["lr"] = 0.0
            elif "lr_of_ramp" in group:
                # another schedule, or a step further back
                group["lr"] = group["lr"] or group["lr_of_ramp"]
                del group["lr_of_ramp"]


def _require_called(model: nn.Module) -> None:
    """Raise InputError on every rank for pruned layers that no rank has called. Collective."""
    layers = list(pst_layers(model))
    config = getattr(model, "pst_config", PSTConfig())
    idle = set(layers_never_called(model))
    # a byte per layer: names of all layers from all ranks would be megabytes
    called_by_rank = all_gather_objects(bytes(name not in idle for name in layers))
    called: set[str] = set()
    for name, *flags in zip(layers, *called_by_rank, strict=True):
        # ranks may call different experts
        if any(flags):
            called.add(name)
    called |= _left_to_chance(model, set(layers) - called, called)
    names = [name for name in layers if name not in called]
    if names and not config.prune_uncalled:
        raise InputError(
            f"the first step has called {len(called)} of {len(layers)} pruned layers, and not {shortened(names)}: "
            "masks there prune what is not trained, or do nothing where other code reads the weight. Leave them dense "
            f"with exclude_modules = {_excluding(names, called, config.exclude_modules)}, or prune them all the same "
            "with prune_uncalled = true"
        )


def _left_to_chance(model: nn.Module, idle: set[str], called: set[str]) -> set[str]:
    """Return the ``idle`` layers that later steps may call: siblings of called experts, and blocks under layerdrop."""
    config = getattr(model, "config", None)
    drops_blocks = False
    if config is not None:
        # "layerdrop", "encoder_layerdrop", ...
        drops_blocks = any(value for key, value in vars(config).items() if "layerdrop" in key)
    return {name for name in idle if _has_called_sibling(name, model, called, drops_blocks=drops_blocks)}


def _has_called_sibling(name: str, model: nn.Module, called: set[str], *, drops_blocks: bool) -> bool:
    """Return whether a layer was called that differs from ``name`` only in the number of an expert, or of a block."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if not part.isdigit():
            continue
        stack = ".".join(parts[:position])
        items = model.get_submodule(stack)
        # a list inside a block has experts; the blocks themselves are all called unless some are dropped
        if not isinstance(items, nn.ModuleList) or not (drops_blocks or is_inside_block(stack, model)):
            continue
        for number in range(len(items)):
            if ".".join([*parts[:position], str(number), *parts[position + 1 :]]) in called:
                return True
    return False


def _excluding(names: list[str], called: set[str], excluded: str | tuple[str, ...]) -> str:
    """Return a value of ``exclude_modules`` that covers ``names``: the outermost modules without a called layer."""
    # the called layers, and the modules around them, down to the model itself: ""
    alive = {""}
    for name in called:
        alive.update(_modules_around(name))
    endings_of_alive = {name.rpartition(".")[2] for name in alive}
    modules: dict[str, None] = {}  # each once, in the order of the layers
    for name in names:
        outermost = next(module for module in _modules_around(name) if module not in alive)
        ending = outermost.rpartition(".")[2]
        # the ending covers the same module of other blocks, unless it would cover called layers
        if ending.isdigit() or ending in endings_of_alive:
            modules[outermost] = None
        else:
            modules[ending] = None
    if isinstance(excluded, str):
        return json.dumps(f"{excluded}|(.*\\.)?({'|'.join(map(re.escape, modules))})(\\..*)?")
    return listed([*excluded, *modules])


def _modules_around(name: str) -> list[str]:
    """Return the names of the modules that contain a layer, the outermost first, and of the layer itself."""
    modules: list[str] = []
    for part in name.split("."):
        if modules:
            part = f"{modules[-1]}.{part}"
        modules.append(part)
    return modules


def _require_pst(model: nn.Module) -> None:
    """Raise InputError for a model whose masks are of whole experts, which need what a run measures."""
    if injected_config(model).pattern == "experts":
        raise InputError(
            'pattern = "experts": only runs of pst-ds train with method = "experts" measure what experts contribute. '
            "Choose another pattern, or remove experts with pst-ds prune --method reap"
        )
