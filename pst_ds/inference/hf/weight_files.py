"""Headers of packed weight files: which parts belong to which weight, checked before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.formats import FORMATS, FormatError, PackedFormat, form_of
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile, TensorFileError

_PARTS_OF_CODES = ("codes", "bitmask", "scales", "shape")


class PackedFolderError(InputError):
    """A packed folder that is invalid or loaded with unsuitable options; the message names the tensor or setting."""


class CodedModule(Protocol):
    """A module that holds quantised values and their scales."""

    scales: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a weight file."""

    name: str
    source: TensorFile

    @property
    def dtype(self) -> torch.dtype:
        return self.source.slots[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.slots[self.name].shape

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.source.path.name

    def read(self) -> Tensor:
        """Return the tensor as stored, on the CPU."""
        return self.source.read(self.name)


Groups = Mapping[str, Mapping[str, StoredTensor]]
"""Headers of the parts of packed weights, by module name and part."""


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Return every tensor of the files by name.

    Raises:
        PackedFolderError: a file is damaged or not safetensors, files are in several folders, or a name is repeated.
    """
    paths = [Path(file) for file in files]
    if len({path.parent for path in paths}) != 1:
        raise PackedFolderError(f"the weight files of a model must be in one folder, got {', '.join(map(str, paths))}")
    found: dict[str, StoredTensor] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise PackedFolderError(f"{path}: packed weights are read from safetensors files only")
        try:
            source = TensorFile(path)
        except (TensorFileError, OSError) as error:
            raise PackedFolderError(
                f"{path}: not a readable safetensors file: {error}. Export the model again."
            ) from None
        for name in source.slots:
            if name in found:
                raise PackedFolderError(f"{name}: stored in {found[name].file} and in {path.name}. Export again.")
            found[name] = StoredTensor(name, source)
    return found


def packed_groups(headers: Mapping[str, StoredTensor], packing: str) -> dict[str, dict[str, StoredTensor]]:
    """Return the parts of weights that are packed as ``packing`` or quantised, by module name and part.

    Unrelated tensors whose names end like a part may be among them.
    """
    known = {*_PARTS_OF_CODES, *(FORMATS[packing].part_names if packing in FORMATS else ())}
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in headers.items():
        module, _, part = name.rpartition(".")
        if part in known:
            groups.setdefault(module, {})[part] = stored
    return groups


def form_of_group(name: str, packing: str, group: Mapping[str, StoredTensor], columns: int) -> PackedFormat:
    """Return the format of the weight ``name`` with ``columns`` inputs, given the headers of its parts.

    Raises PackedFolderError if they fit no format.
    """
    sizes = {part: (stored.dtype, stored.shape) for part, stored in group.items()}
    try:
        return form_of(packing, sizes, columns)
    except ValueError as error:  # FormatError is one
        raise PackedFolderError(f"{name}: {error}. Export again.") from None


def kept_values(name: str, form: PackedFormat, group: Mapping[str, StoredTensor], shape: tuple[int, int]) -> int:
    """Return how many values are stored for the weight ``name``, (O, I) = ``shape``, given the headers of its parts.

    Raises PackedFolderError if a part is missing, or its dtype or shape does not fit the weight.
    """
    absent = [part for part in form.part_names if part not in group]
    if absent:
        file, part = next(iter(group.values())).file, absent[0]
        raise PackedFolderError(f"{name}.{part}: not in the folder, though other parts are in {file}. Export again.")
    values = group[form.values_name]
    count = form.stored_of(math.prod(values.shape))
    if values.dtype not in form.value_dtypes:
        code = CODE_OF_DTYPE[values.dtype]
        raise PackedFolderError(
            f"{name}.{form.values_name}: {code} in {values.file} is not a dtype of packed weights. Export again."
        )
    try:
        expected = form.parts(shape, count, values.dtype)
    except FormatError as error:
        raise PackedFolderError(f"{name}: {error}") from None
    for part, (dtype, dims) in expected.items():
        stored = group[part]
        if stored.dtype != dtype or stored.shape != dims:
            raise PackedFolderError(
                f"{name}.{part}: a {shape[0]} x {shape[1]} weight with {count} values needs {dtype} of shape {dims}, "
                f"{stored.file} has {CODE_OF_DTYPE[stored.dtype]} of shape {stored.shape}. "
                "Is it the folder of another model?"
            )
    return count


def loaded_dtype(module: CodedModule) -> torch.dtype:
    """Return the dtype that a module of quantised values must have after loading.

    transformers casts the scales of modules that the model keeps in fp32, which is how they are recognised. Call it
    before :func:`reread_parts`.
    """
    return torch.float32 if module.scales.dtype == torch.float32 else module.dtype


def reread_parts(module: nn.Module, form: PackedFormat, group: Mapping[str, StoredTensor]) -> None:
    """Restore the stored dtype of parts that the loader has cast, except values in the model's dtype.

    transformers casts every float tensor, including scales; some versions cast all tensors of modules kept in fp32.
    """
    for part in form.part_names:
        tensor, stored = getattr(module, part), group[part]
        if tensor.dtype != stored.dtype and (part != form.values_name or not stored.dtype.is_floating_point):
            setattr(module, part, stored.read().to(tensor.device))


def outside_base_model(names: Iterable[str], base_prefix: str) -> set[str]:
    """Return the tensors of a head: names without the base model's prefix, if other names have it."""
    names = set(names)
    inside = {name for name in names if base_prefix and name.startswith(f"{base_prefix}.")}
    return names - inside if inside else set()
