"""Choice of the next token from logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below it choose the most likely token: logits divided by a smaller number may overflow in fp32."""
_FEW = 256
"""Tokens that are sorted at first for ``top_p``; sorting a whole vocabulary takes as long as half a pass."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The most likely token for a ``temperature`` below 1e-5; otherwise one drawn from softmax(logits / temperature).

    ``top_k``: draw from this number of most likely tokens, 0 for all. ``top_p``: draw from the fewest most likely
    tokens whose total probability reaches it. ``min_p``: draw from tokens with at least this share of the largest
    probability. The other fields change logits first: ``repetition_penalty`` divides positive logits of earlier tokens,
    prompt included, and multiplies negative ones; ``presence_penalty`` is subtracted from those of written tokens, and
    ``frequency_penalty`` as often as they were written; ``logit_bias`` is added to single tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: not a number of at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: not above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p = {self.min_p}: not from 0 to 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: not at least 0")

    def penalised(self, logits: Tensor, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        """Return ``logits`` (vocabulary,) after penalties for the tokens of a prompt and of the answer so far."""
        if self.repetition_penalty != 1.0:
            seen = torch.tensor([*prompt, *written]).unique()
            old = logits[seen]
            new = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
            logits = logits.index_put((seen,), new)
        if written and (self.presence_penalty or self.frequency_penalty):
            tokens, times = torch.tensor(written).unique(return_counts=True)
            logits = logits.index_add(0, tokens, -(self.presence_penalty + self.frequency_penalty * times))
        if self.logit_bias:
            tokens = torch.tensor(list(self.logit_bias))
            bias = torch.tensor(list(self.logit_bias.values()))
            logits = logits.index_add(0, tokens, bias)
        return logits

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a token for each row of fp32 ``logits`` (rows, vocabulary), (rows,) int64."""
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        chances = (logits / self.temperature).softmax(-1)  # (rows, vocabulary), or fewer columns below
        tokens = None  # the token of each column, unless all tokens are there in order
        if self.top_k or self.top_p < 1.0:
            chances, tokens = self._likeliest(chances)
        if self.min_p:
            chances = chances * (chances >= self.min_p * chances.amax(-1, keepdim=True))
        drawn = torch.multinomial(chances, 1, generator=generator)
        if tokens is not None:
            drawn = tokens.gather(-1, drawn)
        return drawn[:, 0]

    def _likeliest(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of some tokens, 0 for those beyond top_k and top_p, and these tokens."""
        size = chances.shape[-1]
        # in descending order: (rows, kept)
        likeliest, tokens = chances.topk(min(self.top_k or _FEW, size))
        if not self.top_k and bool((likeliest.sum(-1) < self.top_p).any()):
            likeliest, tokens = chances.sort(descending=True)
        total: Tensor | float = 1.0
        if self.top_k:
            # top_p is a share of what top_k leaves
            total = likeliest.sum(-1, keepdim=True)
        # a token is kept if those before it do not reach top_p, so that the first one always is
        before = likeliest.cumsum(-1) - likeliest
        return likeliest * (before < self.top_p * total), tokens
