"""The training loop: optimizer steps, with mask updates as the schedule says."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.core.schedule import Schedules, learning_rate_factor
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.errors import shortened
from pst_ds.masks.layer_stats import chosen_layers, measure
from pst_ds.masks.schedule_driver import SPARSITY_TOLERANCE, update_if_due
from pst_ds.masks.update import MaskStats
from pst_ds.nn.inject import (
    freeze_scores,
    persistent_buffers,
    pst_layers,
    set_score_penalty,
)
from pst_ds.parallel import stop_signals
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import all_gather_numbers, all_gather_objects, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.batches import OwnBatch, Places, agreed, next_or_problem, own_batches
from pst_ds.train.divergence import DivergedError, MicroBatch, fault_of_batch, require_finite
from pst_ds.train.expert_tokens import token_figures, tokens_by_module
from pst_ds.train.monitor.curves import STRAGGLER
from pst_ds.train.monitor.metrics import MetricsWriter, peak_memory_bytes
from pst_ds.train.objective import Objective
from pst_ds.train.prefetch import Prefetched
from pst_ds.train.timing.profiling import recording
from pst_ds.train.timing.step_clock import StepClock
from pst_ds.train.timing.stragglers import OwnTime, Pace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SKIPPED_IN_A_ROW = 100
FINAL_TAGS = ("loss", "sparsity/actual", "tokens_per_second")
"""The reported values that a run is judged by at its end, besides its evaluation."""


@dataclass(slots=True)
class LoopState:
    """Where the run is. ``step`` counts applied optimizer steps, ``batch`` global batches, with skipped ones."""

    step: int = 0
    batch: int = 0
    masks: MaskStats | None = None
    losses: list[float] = field(default_factory=list)
    """Mean loss of each global batch since the last report; the same on every rank."""
    tokens: int = 0
    """Tokens of these batches."""
    waited_seconds: float = 0.0
    """How long this rank has waited for data since the last report."""
    last_report_seconds: float = 0.0
    skipped_in_a_row: int = 0
    streams: list[Places] = field(default_factory=list)
    """Where each reader of streams is, the same on every rank; empty for a run without."""
    stopped_by: int = 0
    """The signal that asked some rank to stop; the same on every rank, after the same step. 0 for none."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Trains one run; whoever iterates over :meth:`steps` evaluates, saves and decides when to stop."""

    run: RunConfig
    engine: Engine
    schedules: Schedules
    examples: ExampleSet
    tokenizer: PreTrainedTokenizerBase
    num_steps: int
    device: str
    metrics: MetricsWriter
    objective: Objective
    clock: StepClock = field(init=False)
    own_time: OwnTime = field(init=False)
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        """Collective."""
        object.__setattr__(self, "clock", StepClock(self.device))
        object.__setattr__(self, "own_time", OwnTime(self.device, self.engine))
        object.__setattr__(self, "pace", Pace(all_gather_objects(socket.gethostname())))

    def steps(self, state: LoopState) -> Iterator[LoopState]:
        """Train from ``state`` to the last step; yield ``state`` after each applied step, once it is reported.

        Collective. Raises DivergedError on every rank.
        """
        engine = self.engine
        engine.train()
        if not state.batch:
            _update_if_due(self, state)
            _picture_if_due(self, state)
        elif self.schedules.masks_final_at(state.step):
            freeze_scores(engine.module)
        if state.step >= self.num_steps:
            return
        buffers = {name: buffer.clone() for name, buffer in persistent_buffers(engine.module).items()}
        recorded = recording(self.run.train.profiled, self.num_steps, Path(self.run.output_dir))
        make = partial(own_batches, self.run, self.examples, self.tokenizer, self.device, state.batch, state.streams)
        with Prefetched(make) as batches, recorded as recorder:
            while state.step < self.num_steps:
                recorder.before(state.step + 1)
                before = batches.waited_seconds
                with self.own_time.working():
                    batch = self._next(batches, state)
                    state.waited_seconds += batches.waited_seconds - before
                    self._train_on(batch.micro_batches, state)
                state.tokens += batch.tokens
                if not engine.was_step_applied():
                    _stop_if_stuck(state)
                    continue
                state.step += 1
                state.skipped_in_a_row = 0
                if buffers:
                    _require_unchanged(engine.module, buffers)
                    buffers = {}
                with self.clock.timing("masks"):
                    _update_if_due(self, state)
                recorder.after(state.step)
                _name_straggler(self, state)
                _picture_if_due(self, state)
                _report_if_due(self, state)
                yield state

    def _next(self, batches: Iterator[OwnBatch], state: LoopState) -> OwnBatch:
        """Return this rank's part of the next batch. Collective where data is read from streams."""
        if not task_of(self.run).has_streams(self.examples):
            return next(batches)
        taken = next_or_problem(batches)
        with self.own_time.waiting():
            batch, state.streams = agreed(taken, self.run.train.sequence_parallel)
        return batch

    def _saving(self) -> AbstractContextManager[object]:
        """Decide where tensors lie that a forward pass saves."""
        if not self.run.model.activation_offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.startswith("cuda"))

    def _train_on(self, micro_batches: Sequence[MicroBatch], state: LoopState) -> None:
        """Take one optimizer step, or try to; none if a loss is not finite. Collective."""
        set_rates(self, state.step)
        seed_random_numbers(self.run.seed, state.batch)
        losses: list[Tensor] = []
        for number, batch in enumerate(micro_batches, 1):
            heartbeat(f"the forward and backward pass of batch {state.batch + 1}")
            with self.clock.timing("forward"), self._saving():
                loss = batch.share * self._loss(batch)
            with self.clock.timing("backward"):
                self.engine.backward(loss)
            losses.append(loss.detach())
            if number == len(micro_batches):
                self._agree_on_batch(state, losses, micro_batches)
            with self.clock.timing("optimizer"):
                self.engine.step()

    def _loss(self, batch: MicroBatch) -> Tensor:
        inputs = {name: values.to(self.device, non_blocking=True) for name, values in batch.inputs.items()}
        return self.objective(self.engine, inputs)

    def _agree_on_batch(self, state: LoopState, losses: list[Tensor], micro_batches: Sequence[MicroBatch]) -> None:
        """Exchange the mean loss of the batch, whether a rank was asked to stop, and how it got on. Collective.
        DeepSpeed skips a step for a bad gradient (not at stage 0 in fp32); a bad loss ends the run, on all ranks,
        before it is taken."""
        loss = torch.stack(losses).double().mean()
        others = [float(stop_signals.asked_by()), self.own_time.seconds, float(peak_memory_bytes(self.device))]
        with self.own_time.exchanging():
            by_rank = all_gather_numbers(torch.cat([loss[None], loss.new_tensor(others)])).tolist()
        of_ranks, stops, seconds, memory = zip(*by_rank, strict=True)

        def find() -> str:
            seed_random_numbers(self.run.seed, state.batch)
            return fault_of_batch(self.engine.module, micro_batches, self._loss, Path(self.run.output_dir))

        require_finite(of_ranks, state.batch + 1, state.step, find)
        state.batch += 1
        state.stopped_by = int(max(stops))
        self.pace.add(seconds, memory)
        state.losses.append(sum(of_ranks) / len(of_ranks))


def _require_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise ConfigError on every rank if a buffer has changed, since checkpoints have none. Collective."""
    now = persistent_buffers(model)
    changed = sorted(name for name in before if not torch.equal(now[name], before[name]))
    names = sorted({name for of_rank in all_gather_objects(changed) for name in of_rank})
    if names:
        raise ConfigError(
            f"the forward pass of model.path changes {shortened(names)}, and the checkpoints of a run have no buffers. "
            "Train it in your own loop with pst_ds.MaskUpdater: pst_ds.save_pretrained keeps them"
        )


def seed_random_numbers(seed: int, batch: int) -> None:
    """Seed all generators from the run's seed, the number of the global batch and the rank.

    No generator state needs saving: a resumed run draws the same numbers as an uninterrupted one.
    """
    digest = hashlib.blake2b(f"{seed}/{batch}/{rank()}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest) >> 1
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % (1 << 32))


def set_rates(loop: Loop, step: int) -> None:
    """Set every group's learning rate for the step after ``step``, the scores' to zero once the masks are fixed; and
    the penalty on scores."""
    if loop.run.train.score_penalty:
        penalty = loop.run.train.score_penalty * loop.schedules.progress_at(step)
        backward_passes = loop.run.train.gradient_accumulation_steps  # each adds its share
        set_score_penalty(loop.engine.module, penalty / backward_passes)
    factor = learning_rate_factor(step, loop.num_steps, loop.run.train.learning_rate_warmup_fraction)
    masks_fixed = loop.schedules.masks_final_at(step)
    for group in loop.engine.optimizer.param_groups:
        group["lr"] = 0.0 if masks_fixed and group["name"] == "scores" else group["peak_lr"] * factor


def _update_if_due(loop: Loop, state: LoopState) -> None:
    """Update masks, update ranks and quantisation scales where the schedules say so, and log it. Collective: schedules
    and ``state.step`` are equal on every rank."""
    done = update_if_due(loop.engine.module, loop.schedules, state.step)
    if done.ranks is not None:
        loop.metrics.write(state.step, {"event": "rank_update", "mean_rank": done.ranks.mean_rank})
        loop.metrics.ranks(state.step, done.ranks)
    if done.masks is not None:
        masks = state.masks = done.masks
        if loop.run.pst.initial_mask == "zeros":
            _require_sparsity(loop.run, masks)
        target = loop.schedules.sparsity_at(state.step)
        sparsity = {"sparsity/target": target, "sparsity/actual": masks.sparsity}
        change = {"flip_rate": masks.flip_rate, "mask_checksum": masks.checksum}
        loop.metrics.write(state.step, {"event": "mask_update", **sparsity, **change})
        loop.metrics.masks(state.step, masks)
    if done.scales is not None:
        loop.metrics.write(state.step, {"event": "rounding", "rounding_error": done.scales.error})
        loop.metrics.rounding(state.step, done.scales.layer_errors)


def _require_sparsity(run: RunConfig, masks: MaskStats) -> None:
    """Raise ConfigError on every rank if the model has another share of zeros than the run requests."""
    requested = run.schedule.final_sparsity
    if abs(masks.sparsity - requested) > SPARSITY_TOLERANCE:
        raise ConfigError(
            f"schedule.final_sparsity = {requested}, but {masks.sparsity:.4f} of the pruned weights of model.path = "
            f'{run.model.path!r} are zero, and pst.initial_mask = "zeros" keeps just the others. Fix: '
            f"schedule.final_sparsity = {masks.sparsity:.4f}, or another model folder"
        )


def _stop_if_stuck(state: LoopState) -> None:
    """Raise DivergedError after too many skipped steps in a row; engines skip together, so all ranks stop here."""
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"{MAX_SKIPPED_IN_A_ROW} optimizer steps in a row were skipped for gradients that are not finite (after "
            f"{state.step} applied steps); lower the learning rates, alphas or beta. Nothing was saved for this step"
        )


def _picture_if_due(loop: Loop, state: LoopState) -> None:
    """Measure every layer, and draw some. Once the masks are fixed, only the updates still change. Collective."""
    pictures, layers = loop.run.pictures, list(pst_layers(loop.engine.module))
    if not layers or not pictures.is_due(state.step, loop.num_steps):
        return
    heartbeat("the figures of the layers")
    before = pictures.last_before(state.step, loop.num_steps)
    masks_change = loop.schedules.masks is not None and (before < 0 or not loop.schedules.masks_final_at(before))
    stats = measure(loop.engine.module, chosen_layers(layers, pictures.layers), with_scores=masks_change)
    if stats.mean_correlation is not None:
        loop.metrics.write(state.step, {"event": "scores", "correlation": stats.mean_correlation})
    loop.metrics.figures(state.step, stats)


def _gradient_norm(engine: Engine) -> dict[str, float]:
    """Return the norm of the last step's gradient before it was clipped; nothing where the engine keeps none."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}


def _name_straggler(loop: Loop, state: LoopState) -> None:
    """Say which rank the others wait for, once until it is another."""
    if found := loop.pace.newly_slow():
        loop.metrics.write(state.step, {"event": STRAGGLER, **asdict(found)})
        loop.metrics.say(f"step {state.step}: {found}")


def _report_if_due(loop: Loop, state: LoopState) -> None:
    if state.step % loop.run.train.log_interval and state.step not in (1, loop.num_steps):
        return
    losses, tokens = [float(f"{value:.6g}") for value in state.losses], state.tokens
    loss = sum(state.losses) / len(state.losses)
    parts = loop.clock.read()
    own = [peak_memory_bytes(loop.device), state.waited_seconds, *parts.values()]
    of_ranks = all_gather_numbers(torch.tensor(own, dtype=torch.float64, device=loop.device))
    memory, waited, *spent = of_ranks.amax(0).tolist()
    state.losses.clear()
    state.tokens, state.waited_seconds = 0, 0.0
    elapsed = loop.metrics.seconds - state.last_report_seconds
    state.last_report_seconds = loop.metrics.seconds
    sparsity, flip_rate = (state.masks.sparsity, state.masks.flip_rate) if state.masks else (0.0, 0.0)
    per_second = tokens / elapsed if elapsed > 0 else 0.0
    values = {
        "event": "step",
        "loss": loss,
        "losses": losses,
        **_gradient_norm(loop.engine),
        **{f"lr/{group['name']}": group["lr"] for group in loop.engine.optimizer.param_groups},
        "sparsity/target": loop.schedules.sparsity_at(state.step),
        "sparsity/actual": sparsity,
        "flip_rate": flip_rate,
        "tokens_per_second": per_second,
        "tokens_per_second_per_rank": per_second / world_size(),
        **{f"time/{part}": seconds / elapsed for part, seconds in zip(parts, spent, strict=True) if elapsed > 0},
        "data_wait": waited / elapsed if elapsed > 0 else 0.0,
        "peak_memory_bytes": int(memory),
        "skipped_steps": loop.engine.skipped_steps,
        **loop.pace.figures(),
        **token_figures(tokens_by_module(loop.engine.module)),
    }
    loop.metrics.write(state.step, values)
    progress: dict[str, object] = {"loss": loss, "sparsity": round(sparsity, 4), "tok/s": round(per_second)}
    progress["GiB"] = round(memory / 2**30, 2)
    if slow := loop.pace.slow():
        progress["slow rank"] = f"{slow.rank} ({slow.host})"
    loop.metrics.progress(state.step, progress, batches=len(losses))
