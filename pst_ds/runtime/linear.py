"""A linear layer whose weight stays packed."""

from __future__ import annotations


import torch
from torch import Tensor, nn

from pst_ds.core.formats import FORMATS
from pst_ds.runtime import ops


class SparseLinear(nn.Module):
    """y = x W' + bias with W packed: (..., in_features) to (..., out_features). For inference: it has no gradient.

    The parts of the weight (:mod:`pst_ds.core.formats`) are tensors of this module, so that state-dict keys are those of
    the files. A new layer's are empty: load them, then call :meth:`check`, which must come before the first forward.
    It stands for ``nn.Linear`` and for GPT-2's ``Conv1D``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzero: int,
        *,
        format: str = "bitmask",
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = FORMATS[format]
        for name, (part_dtype, shape) in self.format.parts((out_features, in_features), nonzero, dtype).items():
            self._set_part(name, torch.empty(shape, dtype=part_dtype, device=device))
        self.bias: nn.Parameter | None
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, format: str = "bitmask") -> SparseLinear:
        """A layer that holds the non-zeros of ``weight`` (O, I)."""
        parts = FORMATS[format].pack(weight.detach())
        values = next(part for part in parts.values() if part.is_floating_point())
        layer = cls(
            weight.shape[1], weight.shape[0], values.numel(), format=format, bias=bias is not None, dtype=weight.dtype,
            device="meta",
        )  # fmt: skip
        for name, part in parts.items():
            layer._set_part(name, part)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def _set_part(self, name: str, part: Tensor) -> None:
        if part.is_floating_point():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        else:
            self.register_buffer(name, part)

    def parts(self) -> dict[str, Tensor]:
        """The parts of the weight by name."""
        return {name: getattr(self, name).detach() for name in self.format.part_names}

    def check(self, name: str) -> None:
        """Raises FormatError, naming ``name``, unless the parts are a weight of this layer's shape."""
        self.format.check(name, self.parts(), (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """(O, I), +0.0 where pruned."""
        return self.format.unpack(self.parts())

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
