"""A trained prompt: m vectors that are inserted into every example of a batch, before or after its first token."""

from __future__ import annotations

import torch
from torch import Tensor


def adapted(states: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """Return P = H + H V' U', (m, d), for H (m, d), U (d, r) and V (r, d); H + H U' without V, H without both."""
    if left is None:
        return states
    return states + (states if right is None else states @ right.t()) @ left.t()


def with_prompt(values: Tensor, prompt: Tensor, after: int) -> Tensor:
    """Insert ``prompt`` (m, ...) into every row of ``values`` (batch, length, ...), after ``after`` of its entries."""
    own = prompt.to(values).expand(values.shape[0], *prompt.shape)
    return torch.cat([values[:, :after], own, values[:, after:]], 1)


def without_prompt(values: Tensor, size: int, after: int) -> Tensor:
    """Return ``values`` (batch, m + length, ...) without the ``size`` entries that :func:`with_prompt` inserted."""
    return values[:, size:] if after == 0 else torch.cat([values[:, :after], values[:, after + size :]], 1)
