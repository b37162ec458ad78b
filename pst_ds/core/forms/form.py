"""The extension point "update form": the parameters of a layer's update, and the weight that they make of W0.

A form works on one matrix at a time, always as (outputs, inputs): layers that store their weight transposed, fused
projections and stacks of experts are cut and oriented before a form sees them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RESERVED_NAMES = frozenset({"A", "B", "R", "C", "x", "weight", "bias", "mask", "scales", "base_codes", "base_scales"})
"""Names of what else a layer has, or has a gradient, which a form must not use."""
GROUPS = ("updates", "embeddings", "head")
"""The optimizer groups that a parameter can be in. That of the scores stops learning once masks are fixed."""


class UpdateSettings(Protocol):
    """The settings of ``[pst]`` that forms read; :class:`pst_ds.config.pst.PSTConfig` has them."""

    @property
    def update_rank(self) -> int: ...
    @property
    def update_init(self) -> str: ...
    @property
    def update_init_scale(self) -> float: ...
    @property
    def update_penalty(self) -> float: ...


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of an update, for one matrix. A layer of P matrices stacks theirs along the first dimension."""

    shape: tuple[int, ...]
    """Shape for one matrix, with at least one dimension."""
    mean: float = 0.0
    std: float = 0.0
    """Initial values are N(mean, std**2). They depend on the seed and the layer's name, not on the number of ranks."""
    group: str = "updates"
    """Optimizer group, one of :data:`GROUPS`, whose peak learning rate it has."""
    rate: float = 1.0
    """Multiplier of that rate, above 0."""
    decay: float = 0.0
    """AdamW's weight decay, at least 0: a penalty of decay / 2 times the sum of squares, apart from the gradient."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of one matrix of ``num_outputs`` x ``num_inputs`` weights."""

    outputs: slice
    inputs: slice
    num_outputs: int
    num_inputs: int

    @property
    def is_whole(self) -> bool:
        """True if the tile is the whole matrix."""
        whole_outputs = slice(0, self.num_outputs)
        whole_inputs = slice(0, self.num_inputs)
        return self.outputs == whole_outputs and self.inputs == whole_inputs


class UpdateForm(ABC):
    """Base class of update forms. :meth:`parameters` and :meth:`apply` are enough to train, save, resume and export.

    A form has no state: two of one class are equal.
    """

    exact_in_slices: bool = True
    """True if a weight of a tile is bit-identical to the same weight of the whole matrix, as for formulas without sums
    over weights. Otherwise only whole matrices are updated, and mask updates gather one layer at a time."""
    has_kernels: bool = False
    """True if the update is beta U V with parameters U (O, r) and V (r, I), which compiled kernels compute."""
    is_beside: bool = False
    """True if parameters U (O, r) and V (r, I) update the output, y = x (M . W0)' + beta (x V') U', and not the
    weight."""
    rate_factor: float = 1.0
    """Multiplier of the default peak rate of group "updates", which was measured for U V. A rate that the user sets is
    used unchanged."""

    @property
    def is_product(self) -> bool:
        """True if the update is beta U V with parameters U (O, r) and V (r, I), under the mask or next to it."""
        return self.has_kernels or self.is_beside

    @abstractmethod
    def parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        """Return the parameters by name for one matrix of ``outputs`` x ``inputs``; None for those not in the settings.

        Names are identifiers outside of :data:`RESERVED_NAMES`; the layer's parameter is called "pst_" and the name.
        """

    @abstractmethod
    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        """Return the updated weight of a tile.

        Args:
            weight: W0 of the tile, (outputs, inputs), fp32 (fp64 for fp64 models). Must not be modified.
            parameters: those of the whole matrix, with the shapes of :meth:`parameters` and the dtype of ``weight``.
            tile: where the tile is in the matrix.
            beta: ``pst.beta``, weight of the update.
        """

    def gradients(
        self, weight: Tensor, weight_gradient: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float
    ) -> dict[str, Tensor]:
        """Return a tile's terms of the gradients of the whole matrix's parameters, by name.

        The default differentiates :meth:`apply`. A parameter that does not influence the tile may be omitted.

        Args:
            weight_gradient: gradient of the updated weight of the tile, like ``weight``.
            weight, parameters, tile, beta: as in :meth:`apply`.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        # The backward pass of a layer runs without grad mode.
        with torch.enable_grad():
            updated = self.apply(weight, leaves, tile, beta)
        terms = torch.autograd.grad(updated, list(leaves.values()), weight_gradient, allow_unused=True)
        return {name: term for name, term in zip(leaves, terms, strict=True) if term is not None}

    def describe(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Return numbers about a layer's trained parameters, by heading, for ``pst-ds inspect``; {} by default.

        Args:
            parameters: of one layer, fp32, by name. Layers of several matrices stack theirs along the first dimension.
        """
        return {}

    def checked_parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        """Return :meth:`parameters`. Raises ValueError, naming the class, for those that a layer cannot hold."""
        specs = self.parameters(outputs, inputs, settings)
        for name, spec in specs.items():
            problem = ""
            if spec is not None:
                problem = _problem_of(name, spec)
            if problem:
                raise ValueError(f"the parameter {name!r} of the update form {type(self).__name__} {problem}")
        return specs

    # Layers and saved adapters are compared with their constants, which contain the form.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateForm) and type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _problem_of(name: str, spec: ParamSpec) -> str:
    """Return what keeps a layer from holding a parameter, and the fix; "" if nothing does."""
    if name in RESERVED_NAMES or not name.isidentifier():
        return "has a name that a layer cannot use. Choose another"
    if not spec.shape or min(spec.shape) < 1:
        return f"has the shape {spec.shape}. Give it at least one dimension, each of at least 1"
    if spec.group not in GROUPS:
        return f"is in the optimizer group {spec.group!r}. Choose one of {', '.join(GROUPS)}"
    if spec.rate <= 0.0:
        return f"has the rate {spec.rate}. Set one above 0"
    if spec.decay < 0.0:
        return f"has the decay {spec.decay}. Set one of at least 0"
    return ""
