"""What to inject, as a frozen dataclass."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

InitScale = Literal["normal", "rank", "width"]
Bias = Literal["none", "pst_only", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PSTConfig:
    """The PST modules of a model; defaults as docs/design.md measured them, and ``PSTConfig.paper()`` the paper's.

    S = |W| / scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V,  y = x (M . W)' + bias
    """

    target_modules: str | tuple[str, ...] = "all-linear"
    """As in PEFT: "all-linear" is every linear layer inside the blocks; another string is a regular expression for
    the whole module name; a list holds names or their dotted endings."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules left dense, matched as ``target_modules`` is."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained in full; None is the task head. An empty list trains none."""
    bias: Bias = "none"
    """Which biases train, as in PEFT: none, those of the pruned layers, or all of the model."""
    fused_modules: tuple[str, ...] = ("c_attn",)
    """Layers that hold several square matrices side by side (q, k, v), each scored and ranked by itself."""
    score_rank: int = 8
    """Rank of A B; 0 leaves both out."""
    update_rank: int = 8
    """Rank of U V; 0 leaves both out."""
    update_embeddings: tuple[str, ...] = ()
    """Embeddings that get an update U V of ``update_rank`` too, and no mask, such as "word_embeddings"; matched as a
    list in ``target_modules`` is."""
    structured_scores: bool = True
    """Whether the scores have R and C."""
    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    relative_magnitude: bool = True
    """Divide |W| in the scores by the mean of |W0|, matrix by matrix, so that scores of every layer are near 1."""
    detach_magnitude: bool = False
    """True stops the gradient of the scores from reaching U V through |W|."""
    score_init: InitScale = "normal"
    """Standard deviation of A at the start: 1, 1/sqrt(rank) or 1/sqrt(3 in_features), times ``score_init_scale``."""
    score_init_scale: float = 0.3
    update_init: InitScale = "normal"
    """The same for U (for V of an embedding, whose U starts at zero)."""
    update_init_scale: float = 0.1
    train_weights: bool = False
    """Train the pruned weights themselves, under the mask (for baselines: every weight then has optimizer state)."""
    tile_bytes: int = 0
    """Bytes that the backward pass of a layer may hold beside tensors as large as its input or its factors, on each
    rank; 0 is 64 MiB on a CPU and 512 MiB on a GPU. Smaller tiles are slower."""
    seed: int = 0
    """Seed of A and U (of V in an embedding); together with a layer's name it fixes their values, on any number of
    ranks."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            _require_regex(name, getattr(self, name))
        for name in ("score_rank", "update_rank", "tile_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        for name in ("alpha1", "alpha2", "beta", "score_init_scale", "update_init_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)} must be a finite number")
        for name in ("score_init", "update_init"):
            if getattr(self, name) not in get_args(InitScale):
                raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(get_args(InitScale))}")
        if self.update_embeddings and self.update_rank == 0:
            raise ValueError(
                f"update_embeddings = {list(self.update_embeddings)} with update_rank = 0 updates nothing; set "
                "update_rank to at least 1, or update_embeddings to []"
            )
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias = {self.bias!r} must be one of {', '.join(get_args(Bias))}")

    @classmethod
    def paper(cls, **overrides: Any) -> PSTConfig:
        """The constants of the paper: no relative scale, A and U from N(0, 1)."""
        return cls(**{**PAPER, **overrides})

    @property
    def has_scores(self) -> bool:
        return self.score_rank > 0 or self.structured_scores


def _require_regex(name: str, pattern: str | tuple[str, ...]) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} = {pattern!r} is not a regular expression: {error}") from None


PAPER: dict[str, Any] = {
    "relative_magnitude": False,
    "score_init": "normal",
    "score_init_scale": 1.0,
    "update_init": "normal",
    "update_init_scale": 1.0,
}
"""What ``preset = "paper"`` sets (arXiv 2205.11005; ranks, alphas and beta are the same in both)."""
