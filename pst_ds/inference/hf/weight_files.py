"""The headers of packed weight files, read before any tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pst_ds.errors import InputError
from pst_ds.formats import FORMATS, FormatError, PackedFormat, form_of
from pst_ds.formats.tensor_layout import DTYPE_OF_CODE

_PARTS_OF_CODES = ("codes", "bitmask", "scales", "shape")


class PackedFolderError(InputError):
    """A packed folder, or the way it is loaded, cannot be used; the message names the tensor, file or setting."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's line in a header."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def file(self) -> str:
        return self.path.name

    def read(self) -> torch.Tensor:
        """The tensor as it is stored, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


Groups = Mapping[str, Mapping[str, StoredTensor]]
"""Headers of the parts of packed weights, by module name and part."""


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor of the files by name. Raises PackedFolderError for a bad file and for a name that comes twice."""
    paths = [Path(file) for file in files]
    if len({path.parent for path in paths}) != 1:
        raise PackedFolderError(f"weight files of one model lie in one folder, got {', '.join(map(str, paths))}")
    found: dict[str, StoredTensor] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise PackedFolderError(f"{path}: packed weights are read from safetensors files alone")
        for name, stored in _header(path).items():
            if name in found:
                raise PackedFolderError(f"{name}: stands in {found[name].file} and in {path.name}. Export again.")
            found[name] = stored
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {n: StoredTensor(n, path, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise PackedFolderError(f"{path}: not a readable safetensors file: {error}; export the model again") from None


def packed_groups(headers: Mapping[str, StoredTensor], packing: str) -> dict[str, dict[str, StoredTensor]]:
    """The parts of what is packed so, or has codes, by module name and part; a name that only ends like a part may be
    among them."""
    known = {*_PARTS_OF_CODES, *(FORMATS[packing].part_names if packing in FORMATS else ())}
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in headers.items():
        module, _, part = name.rpartition(".")
        if part in known:
            groups.setdefault(module, {})[part] = stored
    return groups


def form_of_group(name: str, packing: str, group: Mapping[str, StoredTensor], columns: int) -> PackedFormat:
    """Return the format of the weight ``name`` of so many inputs, by the headers of its parts.

    Raises PackedFolderError where they fit no format.
    """
    sizes = {part: (DTYPE_OF_CODE.get(stored.dtype, torch.bool), stored.shape) for part, stored in group.items()}
    try:
        return form_of(packing, sizes, columns)
    except ValueError as error:  # FormatError is one
        raise PackedFolderError(f"{name}: {error}. Export again.") from None


def kept_values(name: str, form: PackedFormat, group: Mapping[str, StoredTensor], shape: tuple[int, int]) -> int:
    """Number of stored values of the matrix ``name``, (O, I) = ``shape``, whose parts' headers are ``group``.

    Raises PackedFolderError when a part is absent, or has another dtype or shape than this matrix needs.
    """
    absent = [part for part in form.part_names if part not in group]
    if absent:
        file, part = next(iter(group.values())).file, absent[0]
        raise PackedFolderError(f"{name}.{part}: not in the folder, though other parts are in {file}. Export again.")
    values = group[form.values_name]
    count = form.stored_of(math.prod(values.shape))
    dtype = DTYPE_OF_CODE.get(values.dtype)
    if dtype not in form.value_dtypes:
        raise PackedFolderError(f"{name}.{form.values_name}: {values.dtype} in {values.file} is no dtype of a weight")
    try:
        expected = form.parts(shape, count, dtype)
    except FormatError as error:
        raise PackedFolderError(f"{name}: {error}") from None
    for part, (part_dtype, dims) in expected.items():
        stored = group[part]
        if DTYPE_OF_CODE.get(stored.dtype) != part_dtype or stored.shape != dims:
            raise PackedFolderError(
                f"{name}.{part}: a {shape[0]} x {shape[1]} weight with {count} values needs {part_dtype} of shape "
                f"{dims}, {stored.file} has {stored.dtype} of shape {stored.shape}. Is it the folder of another model?"
            )
    return count


def loaded_dtype(module: Any) -> torch.dtype:
    """Return the dtype that a module of codes, which was made for ``module.dtype``, is to have now that it is loaded.

    A module that the model keeps in fp32 shows by its scales, before :func:`reread_parts`: they are cast to that.
    """
    return torch.float32 if module.scales.dtype == torch.float32 else module.dtype


def reread_parts(module: nn.Module, form: PackedFormat, group: Mapping[str, StoredTensor]) -> None:
    """Read again, as stored, the parts that a loader has cast, but for values of the model's dtype.

    transformers casts every float tensor, scales among them, and some versions all of a module that it keeps in fp32.
    """
    for part in form.part_names:
        tensor, stored = getattr(module, part), DTYPE_OF_CODE[group[part].dtype]
        if tensor.dtype != stored and (part != form.values_name or not stored.is_floating_point):
            setattr(module, part, group[part].read().to(tensor.device))


def outside_base_model(names: Iterable[str], base_prefix: str) -> set[str]:
    """The names of a head's tensors: all without the base model's prefix, if some have it."""
    names = set(names)
    inside = {name for name in names if base_prefix and name.startswith(f"{base_prefix}.")}
    return names - inside if inside else set()
