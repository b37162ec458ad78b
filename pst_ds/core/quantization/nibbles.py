"""int4 codes, two per byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int4 codes, (..., n) int8, two per byte: (..., ceil(n / 2)) uint8.

    The first of two is in the lower four bits, in two's complement. For odd n, the last upper four bits are 0.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.view(torch.uint8).bitwise_and(15)
    return pairs[..., ::2] | pairs[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` codes of each row of ``packed``: (..., ceil(count / 2)) uint8 to (..., count) int8."""
    signed = packed.view(torch.int8)
    pairs = torch.stack([(signed << 4) >> 4, signed >> 4], -1)
    return pairs.flatten(-2)[..., :count]
