"""Choice of the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GREEDY_BELOW = 1e-5
"""Temperatures below it choose the most likely token: logits divided by a smaller number may overflow in fp32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The most likely token for a ``temperature`` below 1e-5; otherwise one drawn from softmax(logits / temperature).

    ``top_k``: draw from this number of most likely tokens, 0 for all. ``top_p``: draw from the fewest most likely
    tokens whose total probability reaches it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: not a number of at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p}: not above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: not at least 0")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a token for each row of fp32 ``logits`` (rows, vocabulary), (rows,) int64."""
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        ids = torch.empty(logits.shape[0], 0, dtype=torch.long)
        logits = TemperatureLogitsWarper(float(self.temperature))(ids, logits)
        if self.top_k:
            logits = TopKLogitsWarper(self.top_k)(ids, logits)
        if self.top_p < 1.0:
            logits = TopPLogitsWarper(self.top_p)(ids, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
