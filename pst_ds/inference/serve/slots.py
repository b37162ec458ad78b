"""Generate answers with the native decoder. Requests join and leave between any two passes of the model."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pst_ds.checkpoint.user_store import State
from pst_ds.inference.decoder import Decoder
from pst_ds.inference.serve.jobs import DONE_LENGTH, Answering, Job

_LOG = logging.getLogger(__name__)
LEAST_PROMPT = 16
"""Fewest tokens of prompts in a pass with running answers, if prompts wait."""
PROMPT_PER_ANSWER = 4
"""Tokens of prompts in a pass for each running answer: the pass then takes two to three times as long as without."""
SHORTEST_COPY = 16
"""Equal tokens from which on their keys and values are copied between slots."""


@dataclass(slots=True)
class _Slot:
    """A sequence of the decoder, which keeps the tokens of its last job for later prompts that start with them."""

    number: int
    job: Job | None = None
    state: State | None = None
    """Adapter state of the user whose tokens are in the decoder's cache."""
    tokens: list[int] = field(default_factory=list)
    """In the decoder's cache."""
    left: list[int] = field(default_factory=list)
    """Tokens to append: the rest of the prompt, or the last token of the answer. Empty before a job's first pass."""
    began: int = 0
    """Number of its job, in the order of their arrival."""

    def shared(self, job: Job, *, later: bool = False) -> int:
        """Return how many tokens of the job's prompt, without its last one, are cached for its user.

        ``later``: once the tokens of ``left`` are, too.
        """
        if job.state is not self.state:
            return 0
        tokens = self.tokens + self.left if later else self.tokens
        # the last token of the prompt is always computed, since its logits choose the first token of the answer
        most = min(len(tokens), len(job.prompt) - 1)
        for index in range(most):
            if tokens[index] != job.prompt[index]:
                return index
        return most


class Slots(Answering):
    """Answers each job in a separate slot.

    Every pass takes the next token of each running answer and a piece of the oldest prompt. A prompt starts with the
    tokens that are cached for its user, and waits for those that another prompt is about to compute. An answer does not
    depend on other jobs: the decoder computes each token alike in any pass, and each job draws from its own seed.
    """

    def __init__(self, decoder: Decoder, *, ends: Collection[int], most_waiting: int = 64):
        super().__init__(most_waiting)
        self._ends = frozenset(ends)
        self._decoder = decoder
        self._slots = [_Slot(number) for number in range(decoder.sequences)]
        self._began = 0

    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        for state in states:
            self._decoder.assign(state)
            self._decoder.forward(prompt)
            self._decoder.reset()
        self._decoder.assign(None)

    @property
    def running(self) -> int:
        return sum(slot.job is not None for slot in self._slots)

    def _select(self, waiting: Sequence[Job]) -> list[Job]:
        return list(waiting[: len(self._free)])

    def _work(self) -> None:
        active = sorted((slot for slot in self._slots if slot.job is not None), key=lambda slot: slot.began)
        try:
            self._advance(active)
        except Exception as error:  # such as too little memory; the caches are unknown then
            _LOG.exception("a pass of %d requests failed", len(active))
            for slot in active:
                self._decoder.reset(0, slot.number)
                slot.tokens.clear()
                self._finish(slot, error)

    @property
    def _free(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.job is None]

    def _place(self, job: Job) -> None:
        """Give a job the free slot that has most of its prompt cached, or the one that has been free for longest."""
        slot = max(self._free, key=lambda slot: slot.shared(job))
        if slot.shared(job) < SHORTEST_COPY:
            slot = min(self._free, key=lambda slot: slot.began)
        self._began += 1
        slot.began = self._began
        slot.job = job

    def _begin(self, slot: _Slot, job: Job) -> bool:
        """Start a job with the tokens of its prompt that any slot has cached.

        Return False if another slot will have considerably more of them after its next passes.
        """
        nearest = max([slot, *self._slots], key=lambda other: other.shared(job))
        if nearest.shared(job) < SHORTEST_COPY:
            nearest = slot
        length = nearest.shared(job)
        if any(other.shared(job, later=True) >= length + SHORTEST_COPY for other in self._slots):
            return False
        self._decoder.assign(job.state, slot.number)
        if nearest is not slot:
            self._decoder.copy(nearest.number, slot.number, length)
        self._decoder.reset(length, slot.number)
        slot.state = job.state
        slot.tokens = job.prompt[:length]
        slot.left = job.prompt[length:]
        job.reused = length
        return True

    def _advance(self, active: Sequence[_Slot]) -> None:
        """Compute one pass for the ``active`` slots, oldest first, and deliver its tokens."""
        for slot in active:
            assert slot.job is not None
            if slot.job.cancelled:
                self._finish(slot, DONE_LENGTH)
        active = [slot for slot in active if slot.job is not None]
        added = self._tokens_of_pass(active)
        if not added:
            return
        # only slots that append all their tokens need logits: a piece of a prompt has no next token
        complete = [slot for slot in active if added.get(slot.number) == slot.left]
        logits = self._decoder.extend(added, [slot.number for slot in complete])
        for slot in active:
            tokens = added.get(slot.number, [])
            slot.tokens += tokens
            slot.left = slot.left[len(tokens) :]
        for slot, row in zip(complete, logits, strict=True):
            self._deliver(slot, row[None])

    def _tokens_of_pass(self, active: Sequence[_Slot]) -> dict[int, list[int]]:
        """Return the tokens to append in the next pass, by the number of the slot."""
        running = [slot for slot in active if len(slot.left) == 1]
        room = self._decoder.most - len(running)
        if running:
            # a long prompt comes in pieces, so that the answers of others do not wait for it
            room = min(room, max(LEAST_PROMPT, PROMPT_PER_ANSWER * len(running)))
        added = {slot.number: slot.left for slot in running}
        for slot in active:
            assert slot.job is not None
            if room > 0 and slot.number not in added and (slot.left or self._begin(slot, slot.job)):
                added[slot.number] = slot.left[:room]
                room -= len(added[slot.number])
        return added

    def _deliver(self, slot: _Slot, logits: Tensor) -> None:
        assert slot.job is not None
        token = slot.job.take(logits, self._ends)
        if token is None:
            self._finish(slot)
        elif len(slot.tokens) == self._decoder.context:
            self._finish(slot, DONE_LENGTH)
        else:
            slot.left = [token]

    def _finish(self, slot: _Slot, outcome: str | Exception | None = None) -> None:
        """Free a slot; end its job, if it has one, with ``outcome`` unless it has ended."""
        if slot.job is not None and outcome is not None and not slot.job.is_finished:
            slot.job.end(outcome)
        slot.job = None
        slot.left = []
