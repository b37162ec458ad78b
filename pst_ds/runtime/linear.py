"""A linear layer whose weight stays packed."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from pst_ds.formats import FormatError, PackedFormat, QuantizedFormat
from pst_ds.runtime import ops
from pst_ds.storage_format import packed_format


class SparseLinear(nn.Module):
    """y = x W' + bias with a packed W: (..., in_features) to (..., out_features).

    For inference: x may have a gradient, the weight does not. It replaces ``nn.Linear`` and GPT-2's ``Conv1D``. The
    parts of the weight (:mod:`pst_ds.formats`) are tensors of this module, named as in the files, and empty at first:
    load them, then call :meth:`check` before the first forward pass, and again after every load_state_dict.
    """

    bitmask: Tensor
    row_offsets: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzero: int,
        *,
        format: str | PackedFormat = "bitmask",
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._is_checked = False
        self.format = packed_format(format) if isinstance(format, str) else format
        self._dtype = dtype
        for name, (part_dtype, shape) in self.format.parts((out_features, in_features), nonzero, dtype).items():
            part = torch.empty(shape, dtype=part_dtype, device=device)
            # float values count as parameters, as those of nn.Linear do; masks and codes are not weights by themselves
            if part_dtype.is_floating_point and name == self.format.values_name:
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
            else:
                self.register_buffer(name, part)
        self.bias: nn.Parameter | None
        if bias:
            values = torch.empty(out_features, dtype=dtype, device=device)
            self.register_parameter("bias", nn.Parameter(values, requires_grad=False))
        else:
            self.register_parameter("bias", None)

    def parts(self) -> dict[str, Tensor]:
        """Return the parts of the weight by name."""
        return {name: getattr(self, name).detach() for name in self.format.part_names}

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the computation: the dtype of the values, or of the weight that codes represent."""
        return self._dtype if self.is_quantized else getattr(self, self.format.values_name).dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        """Set the dtype to which the weight of a quantised layer is expanded."""
        assert self.is_quantized
        self._dtype = dtype

    @property
    def is_quantized(self) -> bool:
        """True if the values are quantised."""
        return isinstance(self.format, QuantizedFormat)

    def check(self, name: str) -> None:
        """Raise FormatError, naming ``name``, unless the parts and the bias fit a layer of this shape."""
        self.format.check(name, self.parts(), (self.out_features, self.in_features))
        bias = self.bias
        dtype = self.dtype
        shape = (self.out_features,)
        # the C++ kernel reads the bias by address, without strides
        if bias is not None and (bias.dtype != dtype or tuple(bias.shape) != shape or not bias.is_contiguous()):
            raise FormatError(
                f"{name}: bias must be a contiguous {dtype} of shape {shape}, found {bias.dtype} of shape "
                f"{tuple(bias.shape)}, strides {bias.stride()}"
            )
        self._prepare()

    def _prepare(self) -> None:
        """Compute the offsets of rows that the product needs."""
        self._is_checked = True
        form = self.format
        if (form.has_row_bits or self.is_quantized) and "row_offsets" not in form.part_names:
            self.register_buffer("row_offsets", form.row_starts(self.parts()), persistent=False)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        # kernels trust the parts, and other parts could make them read beyond the tensors
        self._is_checked = False
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert as ``.to`` does, but undo casts of small negative values to -0.0, and of scales."""
        if self.is_quantized:
            return self._apply_to_codes(fn, recurse)
        before = getattr(self, self.format.values_name)
        dtype = before.dtype
        had_values = not before.is_meta
        super()._apply(fn, recurse)
        values = getattr(self, self.format.values_name)
        # a layer that leaves the meta device has parts without content
        self._is_checked = self._is_checked and had_values
        if self._is_checked and values.dtype != dtype:
            with torch.no_grad():
                values.add_(0.0)  # turns -0.0 into +0.0
        return self

    def _apply_to_codes(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Self:
        """Convert a quantised layer: a cast changes the dtype of the computation, but not the scales."""
        scales = self.scales
        had_values = not scales.is_meta
        super()._apply(fn, recurse)
        self._is_checked = self._is_checked and had_values
        if self.scales.dtype != scales.dtype:
            # from the values before the cast, which may have rounded them
            self.scales = scales.to(self.scales.device)
        # ``fn`` tells its dtype only by what it returns
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=scales.device)).dtype
        return self

    def _refuse_unchecked(self) -> None:
        if not self._is_checked:
            raise RuntimeError("the parts of this sparse layer have not been checked. Call check(name) first")

    @torch.compiler.disable
    def dense_weight(self) -> Tensor:
        """Return the (O, I) weight, +0.0 where pruned. Raises RuntimeError before :meth:`check`."""
        self._refuse_unchecked()
        return self.format.unpack(self.parts(), self.dtype if self.is_quantized else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) in the weight's dtype, also under autocast, where x may have another dtype."""
        if not self._is_checked:  # here too, because the call of a method takes time
            self._refuse_unchecked()
        form = self.format
        values: Tensor
        if self.is_quantized:
            values = self.codes
            dtype = self._dtype
        else:
            values = self._parameters[form.values_name]  # type: ignore[assignment]
            dtype = values.dtype
        x = self._accepted(x, dtype)
        has_kernel = form.has_row_bits or self.is_quantized
        if not has_kernel or (x.requires_grad and torch.is_grad_enabled()):
            return ops.dense_linear(x, self.dense_weight().to(x.device), self.bias)
        # compilers trace operators, and subclasses of Tensor such as fake tensors intercept them; neither sees through
        # the Python functions, which take addresses of data
        in_eager = type(x) is Tensor and not torch.compiler.is_compiling()
        if isinstance(form, QuantizedFormat):
            product = ops.quantized_linear if in_eager else torch.ops.pst_ds.quantized_linear
            bits = None
            if not form.is_dense:
                bits = self.bitmask
            return product(x, values, self.scales, bits, self.row_offsets, self.bias, form.packing)
        if in_eager:
            # read the dictionaries directly: four look-ups of nn.Module take as long as a small product
            buffers = self._buffers
            flat = values
            if values.dim() != 1:
                flat = values.view(-1)
            return ops.bitmask_linear(x, flat, buffers["bitmask"], buffers["row_offsets"], self._parameters["bias"])  # type: ignore[arg-type]
        return torch.ops.pst_ds.bitmask_linear(x, values.view(-1), self.bitmask, self.row_offsets, self.bias)

    def _accepted(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype != dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x is {x.dtype}, the sparse weight {dtype}. Convert one of them")
            x = x.to(dtype)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}, the layer takes {self.in_features} features")
        return x

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Return the sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
