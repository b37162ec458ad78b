"""The queue of waiting requests and the thread that works on them: admission, cancellation, batches and closing."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from pst_ds.inference.serve.protocol import ProtocolError

_JOIN_SECONDS = 60.0
"""Longest time that closing waits for the answers in progress."""
_LOG = logging.getLogger(__name__)


def busy() -> ProtocolError:
    """Return the error of a request that finds the queue full."""
    return ProtocolError(429, "too many requests are waiting. Try again later", code="rate_limit_exceeded")


def closing() -> ProtocolError:
    """Return the error of a request that waits when the server closes."""
    return ProtocolError(503, "the server is closing. Try again later")


class Queued(Protocol):
    """What a worker asks of its jobs."""

    @property
    def cancelled(self) -> bool:
        """True once nobody reads the outcome."""

    @property
    def is_finished(self) -> bool:
        """True once the outcome was delivered."""

    def begin(self) -> bool:
        """Start the job, once. Return False if it was cancelled before."""

    def end(self, outcome: Exception, /) -> None:
        """Deliver an error as the outcome."""


J = TypeVar("J", bound=Queued)


class Worker(ABC, Generic[J]):
    """A thread that admits waiting jobs and works on them once it is started, until the server closes."""

    def __init__(self, most_waiting: int):
        """``most_waiting``: jobs that may wait."""
        self.most_waiting = most_waiting
        self._waiting: list[J] = []
        self._closing = False
        self._changed = threading.Condition()
        """Guards the two attributes above; notified when they change."""
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of jobs that are being processed."""

    @abstractmethod
    def _select(self, waiting: Sequence[J]) -> list[J]:
        """Return the jobs for which there is room now, in the order in which they start. Called under the lock.

        ``waiting``: at least one job, in the order of arrival.
        """

    @abstractmethod
    def _place(self, job: J) -> None:
        """Count a selected job among the running ones. Called under the lock."""

    @abstractmethod
    def _work(self) -> None:
        """Process the running jobs: to their end, or by one pass of the model, after which others may join."""

    def _has_room(self, number: int) -> bool:
        """Return whether ``number`` further jobs may wait. Called under the lock."""
        return len(self._waiting) + number <= self.most_waiting

    @property
    def load(self) -> dict[str, int]:
        """Numbers of running and of waiting jobs."""
        return {"running": self.running, "waiting": len(self._waiting)}

    @property
    def waiting(self) -> int:
        """Number of waiting jobs whose outcome somebody awaits."""
        return sum(not job.cancelled for job in self._waiting)

    def submit(self, *jobs: J) -> None:
        """Queue jobs. Raises ProtocolError if too many wait."""
        with self._changed:
            # a client that has gone must not keep its place from others
            self._waiting = [job for job in self._waiting if not job.cancelled]
            if not self._has_room(len(jobs)):
                raise busy()
            self._waiting += jobs
            self._changed.notify()

    def start(self) -> None:
        """Start the thread; jobs that were submitted before are processed then."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while jobs are processed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread after the jobs that are being processed; those that wait get an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while self._admit():
            # all jobs that were selected may have been cancelled meanwhile
            if self.running:
                self._work()

    def _admit(self) -> bool:
        """Start waiting jobs for which there is room; wait for one if none runs. Return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing or self.running)
            if self._closing:
                for job in self._waiting:
                    if job.begin():
                        job.end(closing())
                self._waiting.clear()
            self._waiting = [job for job in self._waiting if not job.cancelled]
            if self._waiting:
                selected = self._select(self._waiting)
                self._waiting = [job for job in self._waiting if job not in selected]
                for job in selected:
                    if job.begin():
                        self._place(job)
            # a closing server still finishes the answers in progress
            return self.running > 0 or not self._closing


class BatchWorker(Worker[J]):
    """A worker that computes jobs in batches. A batch runs until its last job ends, and others wait."""

    def __init__(self, most_waiting: int):
        super().__init__(most_waiting)
        self._batch: list[J] = []

    @abstractmethod
    def _compute(self, jobs: list[J]) -> None:
        """Deliver the outcomes of a batch."""

    @property
    def running(self) -> int:
        return sum(not job.is_finished for job in self._batch)

    def _place(self, job: J) -> None:
        self._batch.append(job)

    def _work(self) -> None:
        self._compute_or_split(self._batch)
        self._batch = []

    def _compute_or_split(self, jobs: list[J]) -> None:
        """Compute a batch. If it fails, compute its jobs one by one: only those that fail alone get an error."""
        try:
            self._compute(jobs)
            return
        except Exception as error:  # of the model; the next batch may succeed
            _LOG.exception("a batch of %d requests failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].end(error)
        for job in jobs:  # after the except clause, whose traceback holds the memory of the batch
            if not job.is_finished:
                self._compute_or_split([job])
