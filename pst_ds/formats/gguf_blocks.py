"""Quantise weights to GGUF's blocks of 32: Q8_0 and Q4_0.

As in ggml's source (ggml-common.h), a block is an fp16 scale followed by 32 codes. Q8_0 has a byte per code. Q4_0 has
16 bytes; byte j holds code j plus 8 in its lower half and code j + 16 plus 8 in its upper half. Code 0 is
a weight of 0.
"""

import torch
from torch import Tensor

from pst_ds.core.quantization import Grid, limited, nearest_codes, quantize

BLOCK = 32
_LEAST_HALF = 2.0**-24
"""Smallest positive fp16 number."""


def gguf_blocks(weight: Tensor, keep: Tensor | None, grid: Grid, scales: Tensor | None = None) -> tuple[Tensor, int]:
    """Quantise a matrix to blocks.

    Scales come from :func:`~pst_ds.core.quantization.quantize` and are rounded to fp16. If that changes a scale (below
    2^-17, or above 65,504), its codes are computed again.

    Args:
        weight: (O, I) of any float dtype, on the CPU; I must be a multiple of 32.
        keep: (O, I) bool, true for kept weights; None keeps all.
        grid: the quantisation; blocks of a wider group share its scale.
        scales: known scales; None computes them.

    Returns:
        uint8 (O, I / 32 * (34 or 18)), and the number of blocks whose scale fp16 cannot hold exactly.

    Raises ValueError.
    """
    columns = weight.shape[1]
    if columns == 0 or columns % BLOCK:
        raise ValueError(f"GGUF has blocks of {BLOCK} inputs, which do not divide {columns}")
    codes, group_scales = quantize(weight, keep, grid, scales)
    blocks_per_group = columns // BLOCK // grid.num_groups(columns)
    exact = group_scales.float().repeat_interleave(blocks_per_group, 1)  # (O, I / 32)
    half = limited(exact, _LEAST_HALF, torch.finfo(torch.float16).max).half()
    changed = half.float() != exact
    if changed.any():
        kept = weight.float()
        if keep is not None:
            kept = torch.where(keep, kept, 0.0)
        # codes were for the exact scale, and another one has other nearest codes
        anew = nearest_codes(kept.unflatten(1, (-1, BLOCK)), half.unsqueeze(2), grid)
        codes = torch.where(changed.unsqueeze(2), anew, codes.unflatten(1, (-1, BLOCK))).flatten(1)
    grouped = codes.unflatten(1, (-1, BLOCK))  # (O, I / 32, 32)
    if grid.bits == 4:
        raw = (grouped.to(torch.int16) + 8).to(torch.uint8)  # -8 to 7 becomes 0 to 15
        stored = raw[..., : BLOCK // 2] | raw[..., BLOCK // 2 :] << 4
    else:
        stored = grouped.contiguous().view(torch.uint8)
    scale_bytes = half.contiguous().view(torch.uint8).unflatten(1, (-1, 2))  # (O, I / 32, 2)
    return torch.cat([scale_bytes, stored], -1).flatten(1), int(changed.sum())
