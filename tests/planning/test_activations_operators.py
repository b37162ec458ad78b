"""Traffic of operators against what they read and write, written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pst_ds.planning.activations import operator_traffic


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        launches, moved = operator_traffic(func, args, kwargs or {}, out)
        self.launches += launches
        self.moved += moved
        return out


X, Y, OUT = torch.ones(4, 6), torch.ones(4, 6), torch.empty(4, 6)
HALF = X.bfloat16()


@pytest.mark.parametrize(
    ("function", "launches", "moved"),
    [
        (lambda: X + Y, 1, 3 * 96),
        (lambda: torch.add(X, Y, out=OUT), 1, 3 * 96),  # what is written is not read
        (lambda: OUT.add_(Y), 1, 3 * 96),
        (lambda: OUT.copy_(Y), 1, 2 * 96),
        (lambda: OUT.zero_(), 1, 96),
        (lambda: X + Y[0].expand(4, 6), 1, 2 * 96 + 24),
        (lambda: X.to(torch.bfloat16), 1, 96 + 48),
        (lambda: HALF.float(), 1, 96 + 48),
        (lambda: X.t().view(6, 4)[:3], 0, 0),
        (lambda: torch.empty_like(X), 0, 0),
        (lambda: X.device, 0, 0),
        (lambda: X @ Y.t(), 1, 0),
        (lambda: X[torch.tensor([1])], 1, 8 + 2 * 24),  # one row, wherever it is
        (lambda: torch.nn.functional.scaled_dot_product_attention(X[None, None], Y[None, None], Y[None, None]), 1, 0),
    ],
)
def test_an_operator_moves_what_it_reads_and_writes(function, launches, moved):
    with _Counted() as counted:
        function()
    assert (counted.launches, counted.moved) == (launches, moved)
