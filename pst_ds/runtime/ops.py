"""Products with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, layer: Any) -> Tensor:
    """x W' + bias of a :class:`~pst_ds.runtime.linear.SparseLinear`."""
    return torch.nn.functional.linear(x, layer.dense_weight().to(x.dtype), layer.bias)
