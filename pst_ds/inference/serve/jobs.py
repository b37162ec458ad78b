"""Requests for generated tokens, and the interface of workers that answer them."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pst_ds.checkpoint.user_store import State
from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.serve.grammar import Grammar, GrammarError
from pst_ds.inference.serve.queue import Worker

DONE_LENGTH = "length"
DONE_STOP = "stop"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. With :attr:`Job.likeliest`: its log-probability before penalties and temperature."""

    number: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities."""


# jobs are compared by identity: two requests with equal prompts are different jobs in the queue
@dataclass(slots=True, eq=False)
class Job:
    """A request for generated tokens."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    put: Callable[[Token | str | Exception], None]
    """Receives each token, and finally the finish reason or an error; called in another thread."""
    state: State | None = None
    """Adapter state of the user; None for the base model."""
    grammar: Grammar | None = None
    likeliest: int | None = None
    """Number of most likely tokens to deliver with each token; None to deliver no log-probabilities."""
    reused: int = field(default=0, init=False)
    """Tokens of the prompt whose keys and values were cached."""
    cancelled: bool = False
    """True once nobody reads the answer."""
    is_finished: bool = field(default=False, init=False)
    written: list[int] = field(default_factory=list, init=False)
    """Tokens that were delivered."""
    generator: torch.Generator = field(default_factory=torch.Generator, init=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def begin(self) -> bool:
        """Return whether the job shall be answered; :attr:`cancelled` also ends an answer in progress."""
        return not self.cancelled

    def end(self, outcome: str | Exception) -> None:
        """Deliver the finish reason or an error."""
        self.is_finished = True
        self.put(outcome)

    def take(self, logits: Tensor, ends: Collection[int]) -> int | None:
        """Choose and deliver the next token from its logits (1, vocabulary); None if the job is finished.

        ``ends``: tokens that end an answer. An error ends the job.
        """
        if self.is_finished:
            return None
        try:
            # a NaN anywhere makes the maximum NaN; single tokens may have -inf
            if not logits.max().isfinite():
                raise ValueError("the model's logits are not finite")
            token = self._choose(logits[0])
        except GrammarError as error:
            # without the error's text, which may quote the schema: logs have nothing that clients wrote
            _LOG.warning("an answer ended after %d tokens: its JSON schema cannot be followed", len(self.written))
            self.end(error)
            return None
        except Exception as error:
            _LOG.exception("a request failed")
            self.end(error)
            return None
        if token.number in ends:
            # the end token is not part of the answer, so it is not delivered
            self.end(DONE_STOP)
            return None
        self.written.append(token.number)
        self.put(token)
        # a complete value ends the answer; a model that was not trained on JSON would not write an end token
        if self.grammar is not None and self.grammar.is_complete:
            self.end(DONE_STOP)
        elif len(self.written) >= self.max_tokens or self.cancelled:
            self.end(DONE_LENGTH)
        if self.is_finished:
            return None
        return token.number

    def _choose(self, logits: Tensor) -> Token:
        wanted = self.sampling.penalised(logits, self.prompt, self.written)
        if self.grammar is not None:
            wanted = self.grammar.allowed(wanted)
        number = int(self.sampling.choose(wanted[None], self.generator)[0])
        if self.grammar is not None:
            self.grammar.accept(number)
        if self.likeliest is None:
            return Token(number)
        # of the model's own logits: penalties, the grammar and the temperature do not change log-probabilities
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(self.likeliest)
        likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Token(number, float(logprobs[number]), likeliest)


class Answering(Worker[Job]):
    """A worker that generates answers."""

    @abstractmethod
    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        """Compute what a job with each of ``states`` computes before any job, so that everything is compiled.

        Only the native decoder has states of users.
        """
