"""Interface of the packed formats, and checks that they share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.formats.rows import bytes_of_row, row_bits

VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_BYTES = 1 << 62
"""Largest dense matrix in bytes; sizes and offsets stay far below the limit of int64."""

Part = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a part."""


class FormatError(ValueError):
    """An invalid packed tensor, or a matrix that a format cannot hold; the message starts with its name."""


class PackedFormat(ABC):
    """A packed format, without state: one object serves all tensors."""

    name: str
    part_names: tuple[str, ...]
    values_name: str
    """Name of the part with the values."""
    value_dtypes: tuple[torch.dtype, ...] = VALUE_DTYPES
    """Dtypes that this part may have."""
    shape_name: str = "shape"
    """Name of the part with the shape of the matrix."""
    shape_dims: tuple[int, ...] = (2,)
    """Shape of that part."""
    has_row_bits = False
    """True if "bitmask" has the row bits and the values follow row by row, which our kernels multiply with directly."""
    holds_stacks = False
    """True if :meth:`rows_of` is defined, so that a stack of experts can be packed as one matrix."""

    @abstractmethod
    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        """Return dtype and shape of every part of a matrix.

        Args:
            shape: (O, I).
            nonzero: number of stored values, from :meth:`stored`.
            dtype: dtype of the values.

        Raises FormatError for a shape that the format cannot hold.
        """

    def stored(self, counts: Tensor) -> int:
        """Return the number of stored values for :meth:`parts`; ``counts``: kept positions per row, (O,) int64."""
        return int(counts.sum())

    def accepts(self, bits: Tensor, shape: tuple[int, int]) -> bool:
        """Return whether a matrix with the kept positions ``bits``, (O, ceil(I / 8)) uint8, can be packed."""
        return bits.shape == (shape[0], bytes_of_row(shape[1]))

    def pack(self, weight: Tensor, keep: Tensor | None = None, name: str = "") -> dict[str, Tensor]:
        """Pack a matrix; return its parts on the CPU, which share no memory with the arguments.

        A kept position is stored even if its value is 0; a stored -0.0 becomes +0.0.

        Args:
            weight: (O, I) float. Values that are not kept are not read, so it may be an unmasked weight.
            keep: row bits of the kept positions, (O, ceil(I / 8)) uint8; None keeps all values but 0.
            name: name for messages.

        Raises FormatError.
        """
        assert weight.dtype in VALUE_DTYPES
        weight = weight.detach().cpu().contiguous()
        if keep is None:
            return self._pack(weight, row_bits(weight), name)
        assert keep.dtype == torch.uint8
        assert keep.shape == (weight.shape[0], bytes_of_row(weight.shape[1]))
        # a copy, because the bits become a part, and callers change their masks later
        keep = keep.cpu().clone(memory_format=torch.contiguous_format)
        require_no_padding(name, "the kept positions", keep, weight.shape[1])
        return self._pack(weight, keep, name)

    def check(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int] | None = None) -> tuple[int, int]:
        """Check every invariant; return (O, I). Allocates no more memory than the parts have.

        Args:
            name: start of messages.
            parts: the parts.
            shape: (O, I) that the matrix must have. Give it if it is known: the parts of csr do not bound I, so a
                small file may claim a matrix that exceeds memory.

        Raises FormatError.
        """
        if set(parts) != set(self.part_names):
            wanted = ", ".join(sorted(self.part_names))
            stored = ", ".join(sorted(map(str, parts))) or "none"
            raise FormatError(f"{name}: {self.name} must have the parts {wanted}, found {stored}")
        plain = {part: self._plain(name, part, parts[part]) for part in self.part_names}
        rows, columns = self._claimed_shape(name, plain)
        # Python's integers do not overflow, which the sizes below would do in torch; an empty matrix may not claim
        # 2**62 rows either
        if max(rows, 1) * max(columns, 1) * plain[self.values_name].dtype.itemsize > MAX_BYTES:
            raise FormatError(f"{name}: no matrix has the shape {(rows, columns)}")
        if shape is not None and (rows, columns) != tuple(shape):
            raise FormatError(f"{name}: its shape is {(rows, columns)}, but must be {tuple(shape)}")
        values = plain[self.values_name]
        try:
            expected = self.parts((rows, columns), self.stored_of(values.numel()), values.dtype)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        for part, (dtype, dims) in expected.items():
            if plain[part].dtype != dtype or tuple(plain[part].shape) != dims:
                raise FormatError(
                    f"{name}: {part} of a {rows} x {columns} matrix with {values.numel()} values must be {dtype} of "
                    f"shape {dims}, found {_described(plain[part])}"
                )
        # last, because it reads values at places that dtypes and shapes must allow
        self._check_contents(name, plain, (rows, columns))
        if values.is_floating_point():
            _require_no_negative_zero(name, self.values_name, values)
        return rows, columns

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return the (O, I) matrix on the CPU, with +0.0 at pruned positions. Call :meth:`check` first.

        ``dtype``: dtype of the matrix; None is that of the values, or fp32 for quantised values, which is exact.
        """
        # C++ loops read the memory of a part from its start, without strides
        on_cpu = {part: parts[part].detach().cpu().contiguous() for part in self.part_names}
        dense = self._unpack(on_cpu, dtype)
        if dtype is None:
            return dense
        return dense.to(dtype)

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the index of the first element of every row in the flattened values, (O,) int64, on their device."""
        raise NotImplementedError(f"{self.name} has no index of rows")

    def rows_of(self, parts: Mapping[str, Tensor], rows: slice, values: slice, starts: Tensor) -> dict[str, Tensor]:
        """Return views of the parts of some ``rows``, which are a packed matrix themselves.

        Args:
            parts: checked parts of the whole matrix.
            rows: range of rows, with start and stop.
            values: range of their elements in the part with the values.
            starts: :meth:`row_starts` of these rows, counted from the first of the ``values``.
        """
        num_rows = rows.stop - rows.start
        outputs = int(parts[self.shape_name].flatten()[0])
        columns = int(parts[self.shape_name].flatten()[1])
        views = {self.shape_name: torch.tensor([num_rows, columns]).view(self.shape_dims)}
        for name, part in parts.items():
            if name == "row_offsets":
                views[name] = starts
            elif name == self.shape_name:
                continue
            elif part.dim() == 2 and part.shape[0] == outputs:
                # a row per output: bits, scales, and the values of 2:4
                views[name] = part[rows]
            else:
                views[name] = part[values]
        return views

    @abstractmethod
    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        """Implement ``pack`` for a contiguous weight and bits that were checked and copied."""

    @abstractmethod
    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        """Implement ``unpack`` for contiguous parts on the CPU; may ignore ``dtype``."""

    @abstractmethod
    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        """Check the values of the parts; dtypes and shapes were checked before."""

    def stored_of(self, num_values: int) -> int:
        """Return the number of stored values for :meth:`parts`, given the size of the part with the values."""
        return num_values

    def _shape_part(self, shape: tuple[int, int] | torch.Size) -> Tensor:
        return torch.tensor(tuple(shape), dtype=torch.int64).view(self.shape_dims)

    def _plain(self, name: str, part: str, tensor: Tensor) -> Tensor:
        """Check how a part is stored, and return it on the CPU."""
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{name}: {part} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.is_contiguous():
            raise FormatError(f"{name}: {part} must be a contiguous tensor with values, found {_described(tensor)}")
        if part == self.values_name and tensor.dtype not in self.value_dtypes:
            known: object = self.value_dtypes[0]
            if self.value_dtypes == VALUE_DTYPES:
                known = "bf16, fp16, fp32 or fp64"
            raise FormatError(f"{name}: {part} must be {known}, found {_described(tensor)}")
        return tensor.detach().cpu()

    def _claimed_shape(self, name: str, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return (O, I) as claimed by the parts; their names are right, but dtypes and shapes were not checked yet."""
        part = parts[self.shape_name]
        if part.dtype != torch.int64 or tuple(part.shape) != self.shape_dims:
            raise FormatError(
                f"{name}: {self.shape_name} must be int64 of shape {self.shape_dims}, found {_described(part)}"
            )
        rows, columns = part.flatten().tolist()
        if rows < 0 or columns < 0:
            raise FormatError(f"{name}: no matrix has the shape {(rows, columns)}")
        return rows, columns


def require_no_padding(name: str, part: str, bits: Tensor, columns: int) -> None:
    """Raise FormatError if a row of ``bits`` has a bit set beyond its ``columns``."""
    if columns % 8 == 0 or not bits.numel():
        return
    # bits are little-endian within a byte, so that padding is in the upper bits of a row's last byte
    padded = (bits[:, -1] >> (columns % 8)) != 0
    if padded.any():
        row = int(padded.to(torch.uint8).argmax())
        raise FormatError(
            f"{name}: {part} has a bit set beyond the {columns} inputs of row {row}; padding bits must be 0"
        )


def _require_no_negative_zero(name: str, part: str, values: Tensor) -> None:
    """Raise FormatError if a value is -0.0, the float whose only set bit is the sign."""
    # as integers, because -0.0 == 0.0 in a comparison of floats
    as_int = values.view(INT_OF_SIZE[values.element_size()])
    negative = as_int == torch.iinfo(as_int.dtype).min
    if negative.any():
        first = int(negative.flatten().to(torch.uint8).argmax())
        raise FormatError(f"{name}: {part} has -0.0 at position {first}; packed zeros must be +0.0")


def _described(tensor: Tensor) -> str:
    """Return dtype, shape, device and memory layout of a tensor, for messages."""
    storage = str(tensor.layout)
    if tensor.layout == torch.strided:
        storage = f"strides {tensor.stride()}"
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device.type}, {storage}"
