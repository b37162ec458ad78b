"""Outcomes of pruning layers, which the record of a pruned folder keeps."""

from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

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


@dataclass(frozen=True, slots=True)
class CutLayer:
    """The outcome for a layer that lost inputs, or for a module of experts."""

    name: str
    channels: int
    """Inputs before."""
    kept: int
    error: float
    """Squared change of the layer's outputs on the calibration data, relative to their squares, or to their variance
    with a bias; the mean over experts."""
    removed: tuple[int, ...] = ()
    """Channels, the least important first; empty for experts, each of which has others."""
    scores: tuple[float, ...] = ()
    """Error of each removal."""

    @property
    def facts(self) -> dict[str, object]:
        """For the pruning record."""
        facts: dict[str, object] = {"channels": self.channels, "kept": self.kept, "error": self.error}
        if self.removed:
            facts["removed"] = self.removed
            facts["scores"] = self.scores
        return facts


Outcome: TypeAlias = PrunedLayer | CutLayer
OutcomeT = TypeVar("OutcomeT", PrunedLayer, CutLayer)
