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
    next_tokens: list[int] = field(default_factory=list)
    """Tokens to append: the end of the prompt, or the last token of the answer. Empty before a job's first pass."""
    job_number: int = 0
    """Number of its latest job, in the order in which jobs got slots."""

    def shared(self, job: Job, *, later: bool = False) -> int:
        """Return how many tokens of the job's prompt, without its last one, are cached for its user.

        ``later``: once :attr:`next_tokens` are, too.
        """
        # keys and values depend on the user's weights; a store returns the same object for a user's unchanged state
        if job.state is not self.state:
            return 0
        tokens = self.tokens
        if later:
            tokens = tokens + self.next_tokens
        # the last token of the prompt is always computed, since its logits choose the first token of the answer
        limit = min(len(tokens), len(job.prompt) - 1)
        for index in range(limit):
            if tokens[index] != job.prompt[index]:
                return index
        return limit


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
        self._last_job_number = 0

    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        # in the first sequence, which no job has yet
        for state in states:
            self._decoder.assign(state)
            self._decoder.forward(prompt)
            self._decoder.reset()
        # every slot starts without a user, as its sequence does
        self._decoder.assign(None)

    @property
    def running(self) -> int:
        return sum(slot.job is not None for slot in self._slots)

    def _select(self, waiting: Sequence[Job]) -> list[Job]:
        return list(waiting[: len(self._free)])

    def _work(self) -> None:
        active = [slot for slot in self._slots if slot.job is not None]
        active.sort(key=lambda slot: slot.job_number)
        try:
            self._advance(active)
        except Exception as error:  # such as too little memory
            _LOG.exception("a pass of %d requests failed", len(active))
            for slot in active:
                # the pass may have written some of its keys and values, so no cache can be reused
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
            slot = min(self._free, key=lambda slot: slot.job_number)
        self._last_job_number += 1
        slot.job_number = self._last_job_number
        slot.job = job

    def _begin(self, slot: _Slot, job: Job) -> bool:
        """Start a job with the tokens of its prompt that any slot has cached.

        Return False if another slot will have considerably more of them after its next passes.
        """
        # the job's own slot comes first: max returns the first of equals, and its tokens need no copy
        nearest = max([slot, *self._slots], key=lambda other: other.shared(job))
        if nearest.shared(job) < SHORTEST_COPY:
            nearest = slot
        length = nearest.shared(job)
        for other in self._slots:
            # waiting for another prompt to be computed is cheaper than computing the same tokens twice
            if other.shared(job, later=True) >= length + SHORTEST_COPY:
                return False
        # in this order: assigning another user empties the sequence, and only sequences of one user can be copied
        self._decoder.assign(job.state, slot.number)
        if nearest is not slot:
            self._decoder.copy(nearest.number, slot.number, length)
        self._decoder.reset(length, slot.number)
        slot.state = job.state
        slot.tokens = job.prompt[:length]
        slot.next_tokens = job.prompt[length:]
        job.reused = length
        return True

    def _advance(self, active: Sequence[_Slot]) -> None:
        """Compute one pass for the ``active`` slots, oldest first, and deliver its tokens."""
        answered: list[_Slot] = []
        for slot in active:
            assert slot.job is not None
            if slot.job.cancelled:
                # nobody reads this reason, but it ends the job
                self._finish(slot, DONE_LENGTH)
            else:
                answered.append(slot)
        added = self._tokens_of_pass(answered)
        if not added:
            return
        # only slots that append all their tokens need logits: a piece of a prompt has no next token
        complete = [slot for slot in answered if added.get(slot.number) == slot.next_tokens]
        logits = self._decoder.extend(added, [slot.number for slot in complete])  # (complete, vocabulary)
        # after the pass, so that one that fails leaves the tokens unchanged
        for slot in answered:
            tokens = added.get(slot.number, [])
            slot.tokens += tokens
            slot.next_tokens = slot.next_tokens[len(tokens) :]
        for slot, row in zip(complete, logits, strict=True):
            self._deliver(slot, row[None])

    def _tokens_of_pass(self, active: Sequence[_Slot]) -> dict[int, list[int]]:
        """Return the tokens to append in the next pass, by the number of the slot."""
        # a single token is the next one of an answer, or the end of a prompt: both need no more room than their own
        running = [slot for slot in active if len(slot.next_tokens) == 1]
        # never negative, because a pass has room for a token of every sequence
        room = self._decoder.most - len(running)
        if running:
            # a long prompt comes in pieces, so that the answers of others do not wait for it
            room = min(room, max(LEAST_PROMPT, PROMPT_PER_ANSWER * len(running)))
        added = {slot.number: slot.next_tokens for slot in running}
        # oldest first, so that a prompt is finished before the next one gets room
        for slot in active:
            assert slot.job is not None
            if room == 0:
                break
            if slot.number in added:
                continue
            has_tokens = bool(slot.next_tokens)
            if has_tokens or self._begin(slot, slot.job):
                piece = slot.next_tokens[:room]
                added[slot.number] = piece
                room -= len(piece)
        return added

    def _deliver(self, slot: _Slot, logits: Tensor) -> None:
        assert slot.job is not None
        token = slot.job.take(logits, self._ends)
        if token is None:
            self._finish(slot)
        elif len(slot.tokens) == self._decoder.context:
            self._finish(slot, DONE_LENGTH)
        else:
            slot.next_tokens = [token]

    def _finish(self, slot: _Slot, outcome: str | Exception | None = None) -> None:
        """Free a slot; end its job, if it has one, with ``outcome`` unless it has ended."""
        if slot.job is not None and outcome is not None and not slot.job.is_finished:
            slot.job.end(outcome)
        # its tokens stay in the cache, for a later prompt that starts with them
        slot.job = None
        slot.next_tokens = []
