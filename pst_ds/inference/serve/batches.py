"""Generate answers for many requests concurrently, in batches; each request receives its tokens at once."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pst_ds.inference.decoder.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pst_ds.inference.serve.users import ServedUsers
    from pst_ds.train.users.store import State

DONE_LENGTH, DONE_STOP = "length", "stop"
_JOIN_SECONDS = 60.0
_LOG = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """The queue of waiting requests is full."""


class ClosingError(RuntimeError):
    """The server stops before the request was processed."""


@dataclass(slots=True, eq=False)
class Job:
    """A request for generated tokens."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    put: Callable[[int | str | Exception], None]
    """Receives each token, and finally the finish reason or an error; called in another thread."""
    state: State | None = None
    """Adapter state of the user; None for the base model."""
    cancelled: bool = False
    """True once nobody reads the answer."""
    is_finished: bool = field(default=False, init=False)
    written: list[int] = field(default_factory=list, init=False)
    """Tokens that were delivered."""
    generator: torch.Generator = field(default_factory=torch.Generator, init=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def end(self, outcome: str | Exception) -> None:
        """Deliver the finish reason or an error."""
        self.is_finished = True
        self.put(outcome)


class Batches:
    """A thread that decodes waiting jobs in batches. A batch runs until its last sequence ends, and others wait."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad: int,
        ends: Sequence[int],
        users: ServedUsers | None = None,
        most_in_batch: int = 8,
        most_waiting: int = 64,
    ):
        """``model``: a transformers causal model in eval mode. ``ends``: tokens that end a sequence."""
        self._model, self._pad, self._ends, self._users = model, pad, frozenset(ends), users
        self._most, self._most_waiting = most_in_batch, most_waiting
        self._waiting: list[Job] = []
        self._closing = False
        self._changed = threading.Condition()
        """Guards the two attributes above; notified when they change."""
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_last = "logits_to_keep" in known
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while jobs are decoded."""
        return self._thread.is_alive()

    @torch.inference_mode()
    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        """Compute two steps of a batch with ``states`` before any job, so that everything is compiled."""
        if self._users is not None:
            self._users.assign_states(states)
        ids = torch.tensor([list(prompt)] * len(states), device=self._model.device)
        mask = torch.ones_like(ids)
        _, cache = self._step(ids, mask, None)
        self._step(ids[:, -1:], torch.cat([mask, mask[:, :1]], 1), cache)
        if self._users is not None:
            self._users.assign_states(())

    def submit(self, job: Job) -> None:
        """Queue a job. Raises BusyError if too many wait."""
        with self._changed:
            self._waiting = [other for other in self._waiting if not other.cancelled]
            if len(self._waiting) >= self._most_waiting:
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the current batch; jobs that wait get an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    break
                waiting = [job for job in self._waiting if not job.cancelled]
                jobs, self._waiting = waiting[: self._most], waiting[self._most :]
            if jobs:
                self._write(jobs)
            if self._users is not None:
                self._users.assign_states(())  # which frees what the batch had of its users
        for job in self._waiting:
            job.end(ClosingError())

    def _write(self, jobs: list[Job]) -> None:
        """Decode a batch. If it fails, decode its jobs one by one: only those that fail alone get an error."""
        try:
            self._decode(jobs)
            return
        except Exception as error:  # of the model or a user's state; the next batch may succeed
            _LOG.exception("a batch of %d requests failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].end(error)
        for job in jobs:  # after the except clause, whose traceback holds the memory of the batch
            if not job.is_finished:
                self._write([job])

    @torch.inference_mode()
    def _decode(self, jobs: list[Job]) -> None:
        if self._users is not None:
            self._users.assign_states([job.state for job in jobs])
        device, prompts = self._model.device, [job.prompt + job.written for job in jobs]
        length = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        cache = None
        while not all(job.is_finished for job in jobs):
            logits, cache = self._step(ids, mask, cache)
            chosen = [self._next(job, row) for job, row in zip(jobs, logits.split(1), strict=True)]
            ids = torch.tensor(chosen, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(jobs), 1)], 1)

    def _next(self, job: Job, logits: Tensor) -> int:
        """Choose a job's next token from its logits (1, vocabulary) and hand it on. An error ends this job only."""
        if job.is_finished:
            return self._pad
        try:
            if not logits.max().isfinite():  # a NaN anywhere makes the maximum NaN
                raise ValueError("the model's logits are not finite")
            token = int(job.sampling.choose(logits, job.generator)[0])
        except Exception as error:
            _LOG.exception("a request of a batch failed")
            job.end(error)
            return self._pad
        if token in self._ends:
            job.end(DONE_STOP)
            return token
        job.written.append(token)
        job.put(token)
        if len(job.written) >= job.max_tokens or job.cancelled:
            job.end(DONE_LENGTH)
        return token

    def _step(self, ids: Tensor, mask: Tensor, cache: object) -> tuple[Tensor, object]:
        """Return the logits of the next tokens, (jobs, vocabulary) fp32 on the CPU, and the cache."""
        more: dict[str, object] = {self._cache_name: cache}
        if self._takes_positions:  # they do not start at 0 after padding
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if self._takes_last:
            more["logits_to_keep"] = 1
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        return out.logits[:, -1].float().cpu(), out[self._cache_name]
