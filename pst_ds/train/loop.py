"""The training loop: optimizer steps, mask updates and reports."""

import hashlib
import random
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pst_ds.config.run import ConfigError
from pst_ds.core.schedule import Schedules, learning_rate_factor
from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import shortened
from pst_ds.masks.choose_source import choose_source
from pst_ds.masks.layer_stats import measure
from pst_ds.masks.schedule_driver import SPARSITY_TOLERANCE, update_if_due
from pst_ds.masks.update import MaskStats
from pst_ds.nn.addition import inputs_of_layers
from pst_ds.nn.inject import freeze_scores, persistent_buffers, pst_layers
from pst_ds.parallel import stop_signals, traffic
from pst_ds.parallel.engine import Engine, skips_non_finite
from pst_ds.parallel.links import NOTHING, Received
from pst_ds.parallel.ranks import all_gather_numbers, all_gather_objects, rank, start_all_gather_numbers, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.batches import Prefetched, own_batches
from pst_ds.train.calibration import observe_calibration
from pst_ds.train.divergence import (
    DivergedError,
    MicroBatch,
    fault_of_batch,
    require_finite,
    with_its_fault_in_gradients,
)
from pst_ds.train.expert_tokens import token_figures
from pst_ds.train.monitor.json_lines import STRAGGLER
from pst_ds.train.monitor.metrics import MetricsWriter, peak_memory_bytes
from pst_ds.train.objective import Objective
from pst_ds.train.profile import StepProfile
from pst_ds.train.run_context import RunContext
from pst_ds.train.timing import OwnTime, Pace, StepClock

MAX_SKIPPED_IN_A_ROW = 100


@dataclass(slots=True)
class LoopState:
    """Where the training loop is; the same on every rank."""

    step: int = 0
    """Optimizer steps applied."""
    batch: int = 0
    """Global batches trained on, skipped steps included."""
    masks: MaskStats | None = None
    """Statistics of the last mask update."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each global batch since the last line of metrics.jsonl."""
    tokens: int = 0
    """Tokens of these batches."""
    expert_sums: dict[str, list[list[int]]] = field(default_factory=dict)
    """Sums of :class:`ExpertScores` over all ranks so far, by experts module; empty once no more are removed."""
    last_report_seconds: float = 0.0
    """Seconds into the run at the last line of metrics.jsonl."""
    skipped_in_a_row: int = 0
    stopped_by: int = 0
    """Signal that asked some rank to stop; 0 for none."""

    def as_json(self) -> dict[str, object]:
        """Return a copy of what a checkpoint keeps, except the step, as JSON values."""
        saved = {**asdict(replace(self, masks=None)), "masks": self.masks.totals() if self.masks else None}
        return {name: value for name, value in saved.items() if name not in ("step", "stopped_by")}

    @classmethod
    def from_json(cls, step: int, values: Mapping[str, Any]) -> "LoopState":
        """Restore the state after ``step`` from what :meth:`as_json` returned. Raises TypeError for other fields."""
        masks = values.get("masks")
        return cls(step=step, **{**values, "masks": None if masks is None else MaskStats(**masks)})


class Loop:
    """Trains one run; the caller iterates over :meth:`steps`, evaluates, saves and decides when to stop.

    Creating it and calling any method is collective.

    Args:
        engine: Engine of the run's model.
        examples: Examples to train on.
        schedules: When masks and quantisation scales change.
        metrics: Where progress is reported.
        objective: Loss of a micro-batch.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        examples: ExampleSet,
        schedules: Schedules,
        metrics: MetricsWriter,
        objective: Objective,
    ):
        self.context = context
        self.engine = engine
        self.examples = examples
        self.schedules = schedules
        self.metrics = metrics
        self.objective = objective
        self.run = context.run
        self.device = context.device
        self.num_steps = context.run.num_steps(len(examples))
        self.clock = StepClock(context.device, ("forward", "backward", "optimizer", "masks"))
        self.data_clock = StepClock("cpu", ("data_wait",))
        self.own_time = OwnTime(context.device, engine)
        self.pace = Pace(all_gather_objects(socket.gethostname()))
        self.received: list[Received] = []
        """Bytes that each batch brought to this rank, since the last line of metrics.jsonl."""
        self.source = choose_source(
            engine.module,
            schedules,
            device=torch.device(context.device),
            by_token=not context.run.task_facts.predicts_tokens,
        )
        """What chooses the masks."""
        self._skips_non_finite = skips_non_finite(engine)
        self._saved_tensors: AbstractContextManager[object] = nullcontext()
        """Decides where a forward pass keeps tensors for the backward pass."""
        if self.run.model.activation_offload:
            self._saved_tensors = torch.autograd.graph.save_on_cpu(pin_memory=self.device.startswith("cuda"))

    def steps(self, state: LoopState) -> Iterator[LoopState]:
        """Train from ``state`` to the last step; yield ``state`` after each applied step, once it is reported.

        Raises DivergedError on every rank.
        """
        with traffic.counting(self.context.launch.node_size):
            yield from self._counted_steps(state)

    def _counted_steps(self, state: LoopState) -> Iterator[LoopState]:
        engine = self.engine
        engine.train()
        self.source.restore(state.expert_sums)
        if not state.batch:
            if self.source.needs_calibration:
                observe_calibration(self.context, engine, self.examples, self.source)
            _update_if_due(self, state)
            _measure_layers_if_due(self, state)
        elif self.schedules.masks_final_at(state.step):
            freeze_scores(engine.module)
            self.source.close()
        if state.step >= self.num_steps:
            return
        buffers = {name: buffer.clone() for name, buffer in persistent_buffers(engine.module).items()}
        rest_of_run = own_batches(self.context, self.examples, state.batch)
        with Prefetched(rest_of_run) as batches, closing(StepProfile(self.run, self.device)) as profile:
            while state.step < self.num_steps:
                profile.begin(state.step + 1)
                traffic.take()  # of evaluations and checkpoints
                with self.own_time.working():
                    with self.data_clock.timing("data_wait"):
                        batch = next(batches)
                    self._train_on(batch.micro_batches, state)
                self.received.append(traffic.take())
                state.tokens += batch.tokens
                # a skipped step has used up a batch, but changes neither the masks nor the rates
                if not engine.was_step_applied():
                    _stop_if_stuck(state)
                    continue
                state.step += 1
                state.skipped_in_a_row = 0
                if buffers:  # one step is enough to see whether the forward pass changes them
                    _require_unchanged(engine.module, buffers)
                    buffers = {}
                with self._timing("masks"):
                    _update_if_due(self, state)
                _report_straggler(self, state)
                _measure_layers_if_due(self, state)
                _report_if_due(self, state)
                profile.end(state.step)
                yield state

    def _train_on(self, micro_batches: Sequence[MicroBatch], state: LoopState) -> None:
        """Take one optimizer step, which the engine may skip; raise DivergedError if a loss is not finite."""
        set_rates(self, state.step)
        seed_random_numbers(self.run.seed, state.batch)
        self.source.before_batch(self.schedules, state.step)
        losses: list[Tensor] = []
        for number, batch in enumerate(micro_batches, 1):
            heartbeat(f"the forward and backward pass of batch {state.batch + 1}")
            with self._timing("forward"), self._saved_tensors:
                loss = batch.share * self._loss(batch)
            with self._timing("backward"):
                self.engine.backward(with_its_fault_in_gradients(loss))
            losses.append(loss.detach())
            if number < len(micro_batches):
                self._step()
        # The optimizer waits neither for the host nor for other ranks: the exchange is read after it.
        gather = self._start_exchange(losses)
        if self._skips_non_finite:
            self._step()
            self._agree_on_batch(state, gather, micro_batches)
        else:
            self._agree_on_batch(state, gather, micro_batches)
            self._step()
        self.source.after_batch()
        state.expert_sums = self.source.collected()

    def _step(self) -> None:
        """End a micro-batch; apply the optimizer after the last one."""
        with self._timing("optimizer"):
            self.engine.step()

    @contextmanager
    def _timing(self, part: str) -> Iterator[None]:
        """Count the time inside as ``part`` of the step, and mark it in a profile."""
        with self.clock.timing(part), record_function(part):
            yield

    def _loss(self, batch: MicroBatch) -> Tensor:
        inputs = {name: values.to(self.device, non_blocking=True) for name, values in batch.inputs.items()}
        self.source.expect(inputs_of_layers(self.engine.module, inputs))
        with self.source.observing():
            return self.objective(self.engine, inputs)

    def _start_exchange(self, losses: list[Tensor]) -> Callable[[], Tensor]:
        """Start to exchange the mean loss of the batch, stop signals, and each rank's time and memory. Collective."""
        loss = torch.stack(losses).double().mean()
        signal = float(stop_signals.asked_by())
        memory = float(peak_memory_bytes(self.device))
        # one collective and one wait on the device per batch, so all numbers travel in one fp64 tensor; filled in by
        # kernels, since a copy from the host would wait for the backward pass
        numbers = [loss.new_full((1,), value) for value in (signal, self.own_time.seconds, memory)]
        return start_all_gather_numbers(torch.cat([loss[None], *numbers]))

    def _agree_on_batch(
        self, state: LoopState, gather: Callable[[], Tensor], micro_batches: Sequence[MicroBatch]
    ) -> None:
        """Read what :meth:`_start_exchange` has exchanged; ``gather`` waits for it. Collective.

        A loss that is not finite ends the run on all ranks. The step was not applied: the engine has skipped it, or, if
        it does not skip such steps, has not come to it.
        """
        with self.own_time.exchanging():
            by_rank = gather().tolist()
        loss_by_rank, signal_by_rank, seconds_by_rank, memory_by_rank = zip(*by_rank, strict=True)

        def find_fault() -> str:
            # the same random numbers, so that dropout drops the same values as in the failed pass
            seed_random_numbers(self.run.seed, state.batch)
            return fault_of_batch(self.engine.module, micro_batches, self._loss, Path(self.run.output_dir))

        require_finite(loss_by_rank, state.batch + 1, state.step, find_fault)
        state.batch += 1
        # every rank stops at the same batch, whichever of them got the signal
        state.stopped_by = int(max(signal_by_rank))
        self.pace.add(seconds_by_rank, memory_by_rank)
        state.losses.append(sum(loss_by_rank) / len(loss_by_rank))


def _require_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise ConfigError on every rank if a buffer has changed, since checkpoints have no buffers. Collective."""
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
    """Set the learning rates for the step after ``step``. Scores have rate 0 once the masks are final."""
    factor = learning_rate_factor(step, loop.num_steps, loop.run.train.learning_rate_warmup_fraction)
    masks_final = loop.schedules.masks_final_at(step)
    for group in loop.engine.optimizer.param_groups:
        # without a gradient, Adam's moments would still move the scores
        if masks_final and group["name"] == "scores":
            group["lr"] = 0.0
        else:
            group["lr"] = group["peak_lr"] * factor


def _update_if_due(loop: Loop, state: LoopState) -> None:
    """Update masks and quantisation scales if they are due, and log it. Collective.

    Raises ConfigError, on every rank, if masks that keep the base model's zeros have another sparsity than requested.
    """
    traffic.take()
    masks, scales = update_if_due(loop.engine.module, loop.schedules, state.step, loop.source)
    received = _received_bytes([traffic.take()], "update/")
    if masks is not None:
        state.masks = masks
        if loop.schedules.masks_final_at(state.step):
            state.expert_sums = {}
        requested = loop.run.schedule.final_sparsity
        target = loop.schedules.sparsity_at(state.step)
        if loop.run.pst.initial_mask == "zeros" and abs(masks.sparsity - requested) > SPARSITY_TOLERANCE:
            raise ConfigError(
                f"schedule.final_sparsity = {requested}, but {masks.sparsity:.4f} of the pruned weights of model.path "
                f'= {loop.run.model.path!r} are zero, and pst.initial_mask = "zeros" keeps just the others. Fix: '
                f"schedule.final_sparsity = {masks.sparsity:.4f}, or another model folder"
            )
        sparsity = {"sparsity/target": target, "sparsity/actual": masks.sparsity}
        change = {"flip_rate": masks.flip_rate, "mask_checksum": masks.checksum}
        loop.metrics.write(state.step, {"event": "mask_update", **sparsity, **change, **received})
        if loop.metrics.layers is not None:
            loop.metrics.layers.masks(state.step, masks)
    if scales is not None:
        loop.metrics.write(state.step, {"event": "rounding", "rounding_error": scales.error})
        if loop.metrics.layers is not None:
            loop.metrics.layers.rounding(state.step, scales.layer_errors)


def _stop_if_stuck(state: LoopState) -> None:
    """Raise DivergedError after too many skipped steps in a row. Engines skip together, so all ranks raise here."""
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"{MAX_SKIPPED_IN_A_ROW} optimizer steps in a row were skipped for gradients that are not finite (after "
            f"{state.step} applied steps); lower the learning rates, alphas or beta. Nothing was saved for this step"
        )


def _measure_layers_if_due(loop: Loop, state: LoopState) -> None:
    """Record statistics of every layer, if due. Collective."""
    statistics = loop.run.layer_statistics
    if not pst_layers(loop.engine.module) or not statistics.is_due(state.step, loop.num_steps):
        return
    heartbeat("the statistics of the layers")
    before = statistics.last_before(state.step, loop.num_steps)
    # once the masks are final, only the updates still change
    masks_change = loop.schedules.masks is not None and (before < 0 or not loop.schedules.masks_final_at(before))
    stats = measure(loop.engine.module, with_scores=masks_change)
    if stats.mean_correlation is not None:
        loop.metrics.write(state.step, {"event": "scores", "correlation": stats.mean_correlation})
    if loop.metrics.layers is not None:
        loop.metrics.layers.figures(state.step, stats)


def _report_straggler(loop: Loop, state: LoopState) -> None:
    """Report the slowest rank, once per change."""
    if slow_rank := loop.pace.newly_slow():
        loop.metrics.write(state.step, {"event": STRAGGLER, **asdict(slow_rank)})
        loop.metrics.say(f"step {state.step}: {slow_rank}")


def _report_if_due(loop: Loop, state: LoopState) -> None:
    """Write a line of metrics.jsonl about the steps since the last one, and show progress. Collective."""
    if state.step % loop.run.train.log_interval and state.step not in (1, loop.num_steps):
        return
    losses = [float(f"{value:.6g}") for value in state.losses]
    loss = sum(state.losses) / len(state.losses)
    memory, seconds = _memory_and_seconds(loop)
    elapsed = loop.metrics.seconds - state.last_report_seconds  # after waiting for the device and the other ranks
    state.last_report_seconds = loop.metrics.seconds
    per_second = state.tokens / elapsed if elapsed > 0 else 0.0
    sparsity = 0.0
    flip_rate = 0.0
    if state.masks:
        sparsity = state.masks.sparsity
        flip_rate = state.masks.flip_rate
    norm = loop.engine.get_global_grad_norm()  # before clipping
    state.losses.clear()
    state.tokens = 0
    values = {
        "event": "step",
        "ranks": world_size(),
        "loss": loss,
        "losses": losses,
        **({} if norm is None else {"grad_norm": float(norm)}),
        **{f"lr/{group['name']}": group["lr"] for group in loop.engine.optimizer.param_groups},
        "sparsity/target": loop.schedules.sparsity_at(state.step),
        "sparsity/actual": sparsity,
        "flip_rate": flip_rate,
        "tokens_per_second": per_second,
        "tokens_per_second_per_rank": per_second / world_size(),
        **{name: spent / elapsed if elapsed > 0 else 0.0 for name, spent in seconds.items()},
        "peak_memory_bytes": memory,
        **_received_bytes(loop.received),
        "skipped_steps": loop.engine.skipped_steps,
        **loop.pace.figures(),
        **token_figures(loop.engine.module),
    }
    loop.received.clear()
    loop.metrics.write(state.step, values)
    progress: dict[str, object] = {"loss": loss, "sparsity": round(sparsity, 4), "tok/s": round(per_second)}
    progress["GiB"] = round(memory / 2**30, 2)
    if slow := loop.pace.slow():
        progress["slow rank"] = f"{slow.rank} ({slow.host})"
    loop.metrics.progress(state.step, progress)


def _received_bytes(batches: Sequence[Received], prefix: str = "") -> dict[str, int]:
    """Return the mean bytes that this rank received in ``batches``, by link; nothing for a single rank."""
    if world_size() == 1:
        return {}
    total = sum(batches, NOTHING) * (1 / max(len(batches), 1))
    return {f"{prefix}bytes_within_node": round(total.within), f"{prefix}bytes_between_nodes": round(total.between)}


def _memory_and_seconds(loop: Loop) -> tuple[int, dict[str, float]]:
    """Return (peak memory in bytes, seconds since the last report by part of a step), the maxima over ranks.

    Collective; waits for the device.
    """
    parts = {f"time/{part}": seconds for part, seconds in loop.clock.read().items()}
    parts |= loop.data_clock.read()
    own_numbers = [peak_memory_bytes(loop.device), *parts.values()]
    by_rank = all_gather_numbers(torch.tensor(own_numbers, dtype=torch.float64, device=loop.device))
    memory, *seconds = by_rank.amax(0).tolist()
    return int(memory), dict(zip(parts, seconds, strict=True))
