"""Bytes and launches of PST in addition to matrix products, counted from the code.

Tests count them again: tests/device in torch on a pretended accelerator, tests/kernels with Triton kernels on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes and launches of one implementation, for 16-bit weights and the pattern "matrix"."""

    merge_bytes: float
    """A weight, to make M . W for a forward pass."""
    forward_launches: int
    """A layer's forward pass, its product included."""
    backward_bytes: float
    """A weight: M . W again, and all that is made of G."""
    layer_launches: int
    """A layer's backward pass, whatever its size."""
    band_launches: int
    """Each band of rows of a layer's backward pass, the products of its tile included."""
    update_bytes: float
    """A weight of a rank's shard, in a mask update."""
    update_launches: int
    """A matrix, in a mask update."""
    shared_launches: int
    """Of a mask update, for all matrices together; waits of the host count as launches."""
    update_instructions: float = 0.0
    """A scored weight, of 32 lanes of a GPU each; 0 where bytes decide."""


COUNTS = {
    "triton": Counts(4.1, 2, 18.1, 20, 11, 3.7, 5, 37, update_instructions=73.2),
    "torch": Counts(22.1, 9, 54.4, 20, 22, 461, 104, 103),
    "native": Counts(10, 0, 40, 0, 0, 0, 0, 0),
}
"""By the code that runs: Triton kernels (NVIDIA from sm_80 on), torch's operators alone, or loops in C++ on a CPU,
which launch nothing, keep a band in the cache, and whose mask update has a measured rate. Instructions: sm_90."""

EXPAND_BYTES = 8
"""More for a weight that is a code, in either pass: the code, unpacked, and the weight that is made of it."""
REDUCE_BYTES = 14
"""A trainable and micro-batch: its 16-bit gradient is copied into a bucket, put in the order of the ranks, divided by
their number, and sent (DeepSpeed 0.19.8, stage 3)."""
REDUCE_LAUNCHES = 3
"""A trainable tensor and micro-batch: into the bucket, and this rank's share out of it; and what a bucket takes."""
STEP_BYTES = 42
"""A trainable of a rank's share: its gradient's norm, of a copy in fp64 (18); the gradient in one run (4), as fp32 (6),
clipped (8); a 16-bit copy of the updated value (6) (DeepSpeed 0.19.8, stage 3)."""
OPTIMIZER_BYTES = STEP_BYTES + 28
"""The same with a fused AdamW, which reads four fp32 numbers and writes three."""
