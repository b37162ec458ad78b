"""A linear layer whose weight stays packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pst_ds.core.formats import FORMATS
from pst_ds.runtime import ops
from pst_ds.runtime.backends import backend_for


class SparseLinear(nn.Module):
    """y = x W' + bias with W packed: (..., in_features) to (..., out_features).

    For inference: x may have a gradient, the weight has none. The parts of the weight (:mod:`pst_ds.core.formats`) are
    tensors of this module, so that state-dict keys are those of the files. A new layer's are empty: load them, then call :meth:`check`, which must come before the first forward.
    It stands for ``nn.Linear`` and for GPT-2's ``Conv1D``.
    """

    bitmask: Tensor
    row_offsets: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    csr_columns: Tensor
    csr_values: Tensor
    values: Tensor

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
        layer._prepare()
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
        self._prepare()

    def _prepare(self) -> None:
        """What the product needs beside the parts: 2:4 has as many values in each row, torch's CSR product is fp32."""
        if self.format.name == "2:4":
            offsets = torch.arange(self.out_features, device=self.bitmask.device) * (self.in_features // 2)
            self.register_buffer("row_offsets", offsets, persistent=False)
        elif self.format.name == "csr":
            index = torch.int64 if self.crow_indices.dtype == torch.int64 else torch.int32
            self.register_buffer("csr_columns", self.col_indices.to(index), persistent=False)
            self.register_buffer("csr_values", self.values.detach().float(), persistent=False)

    def dense_weight(self) -> Tensor:
        """(O, I), +0.0 where pruned."""
        return self.format.unpack(self.parts())

    def forward(self, x: Tensor) -> Tensor:
        values = getattr(self, self.format.values_name)
        if x.dtype != values.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x is {x.dtype}, the sparse weight {values.dtype}; convert one of them")
            x = x.to(values.dtype)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}, the layer takes {self.in_features} features")
        if x.requires_grad and torch.is_grad_enabled():
            return linear(x, self.dense_weight().to(x.device), self.bias)
        in_eager = type(x) is Tensor and not torch.compiler.is_compiling()
        if self.format.name == "csr":
            density = values.numel() / max(1, self.in_features * self.out_features)
            if backend_for("csr", x.dtype, x.device.type, x.numel() // max(1, self.in_features), density) == "expand":
                return linear(x, self.dense_weight().to(x.device), self.bias)
            csr = ops.csr_linear if in_eager else torch.ops.pst_ds.csr_linear
            return csr(x, self.crow_indices, self.csr_columns, self.csr_values, self.bias)
        product = ops.bitmask_linear if in_eager else torch.ops.pst_ds.bitmask_linear
        return product(x, values.view(-1), self.bitmask, self.row_offsets, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
