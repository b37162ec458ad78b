"""A stack of experts with packed weights, each multiplied as a slice of the packed matrix's rows."""

import torch
from torch import Tensor

from pst_ds.core.experts.routing import Routing
from pst_ds.formats import PackedFormat, QuantizedFormat
from pst_ds.runtime import gpu, native, ops
from pst_ds.runtime.linear import SparseLinear

FEW_PAIRS = 64
"""Most (token, expert) pairs that one call for all experts processes, with a copy of ``x`` for each."""


class SparseExperts(SparseLinear):
    """y = x W' with the expert of each token and a packed W. The parts belong to the (E*O, I) matrix of all experts.

    For inference, with the same parts and checks as :class:`SparseLinear`. On a GPU one launch multiplies with all
    experts that have tokens. It replaces a stack (E, O, I), or (E, I, O), in a transformers experts module.
    """

    expert_offsets: Tensor

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        nonzero: int,
        *,
        format: str | PackedFormat = "bitmask",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        """``out_features``: per expert. ``nonzero``: of all experts. The others are as in :class:`SparseLinear`."""
        outputs = num_experts * out_features
        super().__init__(in_features, outputs, nonzero, format=format, bias=False, dtype=dtype, device=device)
        self.num_experts = num_experts
        self._starts: list[int] = []

    @property
    def rows_of_expert(self) -> int:
        """Outputs per expert."""
        return self.out_features // self.num_experts

    def _prepare(self) -> None:
        """Compute where the values of each expert start, and the offsets of its rows from there."""
        super()._prepare()
        rows = self.rows_of_expert
        values: Tensor = getattr(self, self.format.values_name)
        offsets = self.format.row_starts(self.parts())
        first = offsets[::rows]
        self._starts = [*first.tolist(), values.numel()]
        self.register_buffer("expert_offsets", offsets - first.repeat_interleave(rows), persistent=False)

    def expert_parts(self, expert: int) -> dict[str, Tensor]:
        """Return views of the parts of one expert's (O, I) matrix; offsets count from its first value."""
        count = self.rows_of_expert
        rows = slice(expert * count, (expert + 1) * count)
        values = slice(self._starts[expert], self._starts[expert + 1])
        return self.format.rows_of(self.parts(), rows, values, self.expert_offsets[rows])

    def forward(self, x: Tensor, routing: Routing, by_token: bool) -> Tensor:  # type: ignore[override]
        """Multiply with the expert of each (token, expert) pair: (N*k, O) in the order of the experts.

        ``x``: (N, I) if ``by_token``, or (N*k, I) in the order of the experts.
        """
        if not self._is_checked:
            self._refuse_unchecked()
        x = self._accepted(x, self.dtype)
        values: Tensor = getattr(self, self.format.values_name)
        num_pairs = routing.order.numel()
        # the packed kernels have no gradient
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        has_kernel = self.format.has_row_bits or self.is_quantized
        in_one_launch = has_kernel and not needs_gradient and gpu.multiplies(x, values)
        if num_pairs <= FEW_PAIRS and not in_one_launch and not needs_gradient and self._is_native(x, values):
            if by_token:
                x = x[routing.tokens]  # (N*k, I)
            return native.bitmask_experts(
                x,
                values.view(-1),
                self.bitmask,
                self.expert_offsets,
                self._starts,
                list(routing.runs()),
                native.best_level(),
            )
        y = x.new_empty(num_pairs, self.rows_of_expert)
        if in_one_launch and num_pairs <= gpu.MOST_WALKED * min(num_pairs, self.num_experts):
            weight = gpu.PackedWeight(
                values, self._buffers.get("bitmask"), self.row_offsets, self._buffers.get("scales")
            )
            if by_token:
                x = x[routing.tokens]  # (N*k, I)
            gpu.packed_experts(x, weight, routing.experts, y)
            return y
        for expert, rows in routing.runs():
            y[rows] = self.product(expert, routing.rows_of(x, rows, by_token))
        return y

    def _is_native(self, x: Tensor, values: Tensor) -> bool:
        """Return whether our CPU kernel multiplies a few vectors with an expert."""
        if not self.format.has_row_bits or values.dtype != x.dtype or not self.in_features:
            return False
        return ops.backend_for(x.dtype, x.device.type, FEW_PAIRS) == "native"

    def product(self, expert: int, x: Tensor) -> Tensor:
        """Return x W' of one expert: (n, I) to (n, O)."""
        form = self.format
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        rows = slice(expert * self.rows_of_expert, (expert + 1) * self.rows_of_expert)
        offsets = self.expert_offsets[rows]
        # only slices, because the product of a token is short
        if not needs_gradient and form.has_row_bits:
            start, stop = self._starts[expert : expert + 2]
            values = getattr(self, form.values_name).view(-1)[start:stop]
            return ops.bitmask_linear(x, values, self.bitmask[rows], offsets, bias=None)
        parts = self.expert_parts(expert)
        if isinstance(form, QuantizedFormat) and not needs_gradient:
            bits = parts.get("bitmask")
            return ops.quantized_linear(x, parts["codes"], parts["scales"], bits, offsets, None, form.packing)
        dense = form.unpack(parts, self.dtype if self.is_quantized else None)
        return ops.dense_linear(x, dense.to(x.device), None)
