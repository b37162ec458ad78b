"""Texts for many requests at a time: waiting ones share a batch, and each gets its tokens as they come."""

from __future__ import annotations

import inspect
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pst_ds.decoder.sampling import Sampling

if TYPE_CHECKING:
    from pst_ds.users.served import ServedUsers
    from pst_ds.users.store import State

DONE_LENGTH, DONE_STOP = "length", "stop"
_JOIN_SECONDS = 60.0
_LOG = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """As many requests wait as may."""


class ClosingError(RuntimeError):
    """The server ends before the request's turn came."""


@dataclass(slots=True, eq=False)
class Job:
    """One request for a text."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    put: Callable[[int | str | Exception], None]
    """Gets the tokens as they come and at the end why it ended, or what went wrong; called in another thread."""
    state: State | None = None
    """Of the user who asks; None is the base model."""
    cancelled: bool = False
    """True once nobody reads on."""


class Batches:
    """A thread that decodes waiting jobs together, with the same tokens for each as alone, but for rounding.

    A batch runs until the last of its texts ends; jobs that come meanwhile wait for the next.
    """

    def __init__(
        self, model: Any, *, pad: int, ends: Sequence[int], users: ServedUsers | None = None, most_in_batch: int = 8,
        most_waiting: int = 64,
    ):  # fmt: skip
        """``model``: a causal model of transformers in eval mode; ``ends``: tokens that end a text."""
        self._model, self._pad, self._ends, self._users = model, pad, frozenset(ends), users
        self._most, self._places = most_in_batch, threading.BoundedSemaphore(most_waiting)
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_last = "logits_to_keep" in known
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether jobs are still decoded."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises BusyError when too many wait."""
        if not self._places.acquire(blocking=False):
            raise BusyError
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the batch that it is at; jobs that wait get an error."""
        self._jobs.put(None)
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        closing = False
        while not closing:
            batch: list[Job | None] = [self._jobs.get()]
            while len(batch) < self._most and not self._jobs.empty():
                batch.append(self._jobs.get())
            taken = [job for job in batch if job is not None]
            closing = len(taken) < len(batch)
            for _ in taken:
                self._places.release()
            jobs = [job for job in taken if not job.cancelled]
            if not jobs:
                continue
            try:
                self._decode(jobs)
            except Exception as error:  # whatever it is, the next batch may do
                _LOG.exception("a batch of %d requests failed", len(jobs))
                for job in jobs:
                    job.put(error)
            if self._users is not None:
                self._users.assign_states(())  # which frees what the batch had of its users
        while not self._jobs.empty():
            if (left := self._jobs.get()) is not None:
                left.put(ClosingError())

    @torch.inference_mode()
    def _decode(self, jobs: list[Job]) -> None:
        if self._users is not None:
            self._users.assign_states([job.state for job in jobs])
        device, length = self._model.device, max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[self._pad] * (length - len(job.prompt)) + job.prompt for job in jobs], device=device)
        mask = torch.tensor([[0] * (length - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=device)
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        counts, open_jobs, cache = [0] * len(jobs), set(range(len(jobs))), None
        while open_jobs:
            logits, cache = self._step(ids, mask, cache)
            chosen = []
            for i, job in enumerate(jobs):
                token = self._pad
                if i in open_jobs:
                    token = int(job.sampling.choose(logits[i : i + 1], generators[i])[0])
                    counts[i] += 1
                    if self._end_of(job, token, counts[i]):
                        open_jobs.discard(i)
                chosen.append(token)
            ids = torch.tensor(chosen, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(jobs), 1)], 1)

    def _end_of(self, job: Job, token: int, count: int) -> bool:
        """Hand a token on; return whether the text ends with it."""
        if token in self._ends:
            job.put(DONE_STOP)
            return True
        job.put(token)
        if count >= job.max_tokens or job.cancelled:
            job.put(DONE_LENGTH)
            return True
        return False

    def _step(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits of the next tokens, (jobs, vocabulary) fp32 on the CPU, and the cache."""
        more: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:  # of a prompt that is padded on the left they do not begin at 0
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if self._takes_last:
            more["logits_to_keep"] = 1
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        return out.logits[:, -1].float().cpu(), out[self._cache_name]
