"""The outcome of pruning a layer, which the record of a pruned folder keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """The outcome for one layer."""

    name: str
    shape: tuple[int, int]
    """(O, I); (E*O, I) of a stack of experts."""
    matrices: int
    """Fused matrices, each pruned separately."""
    pattern: str
    sparsity_requested: float
    pruned: int
    """Weights that the mask prunes."""
    zeros: int
    """Zeros in the weight, including kept weights that are zero."""
    dtype: str = ""
    expert_zeros: tuple[int, ...] = ()
    """Zeros of each expert of a stack; empty for a linear layer."""
    expert_tokens: tuple[int, ...] = ()
    """Calibration tokens of each expert of a stack; empty without calibration data."""
    scales: Tensor | None = field(default=None, repr=False, compare=False)
    """(O, groups) bf16, on the CPU, of a quantised weight."""
