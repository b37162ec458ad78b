"""Headers of packed weight files: find the parts of each weight of a model, and check them before reading."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds.errors import InputError
from pst_ds.formats import FormatError, PackedFormat
from pst_ds.formats.base_weights import names_in_files
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile, TensorFileError
from pst_ds.nn.model_structure import is_linear, known_stacks
from pst_ds.storage_format import form_of, storage_format


class PackedFolderError(InputError):
    """A packed folder that is invalid, or loaded with unsuitable options."""


class StoredTensor(NamedTuple):
    """A tensor in a weight file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    read: Callable[[], Tensor]
    """Returns the tensor as stored, on the CPU."""


Groups = Mapping[str, Mapping[str, StoredTensor]]
"""Headers of the parts of packed weights, by module name and part."""


def read_headers(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Return every tensor of the files by name. Raises PackedFolderError, also for a name in two files."""
    paths = [Path(file) for file in files]
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise PackedFolderError(f"the weight files of a model must be in one folder, got {', '.join(map(str, paths))}")
    found: dict[str, StoredTensor] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise PackedFolderError(f"{path}: packed weights are read from safetensors files only")
        try:
            source = TensorFile(path)
        except (TensorFileError, OSError) as error:
            raise PackedFolderError(f"{path}: not a readable safetensors file: {error}. Export again.") from None
        for name, slot in source.slots.items():
            if name in found:
                raise PackedFolderError(f"{name}: stored in {found[name].file} and in {path.name}. Export again.")
            found[name] = StoredTensor(
                dtype=slot.dtype, shape=slot.shape, file=path.name, read=partial(source.read, name)
            )
    return found


def packed_groups(headers: Mapping[str, StoredTensor], packing: str) -> dict[str, dict[str, StoredTensor]]:
    """Return tensors that are named like parts of packed or quantised weights, by module name and part."""
    known = storage_format(packing).all_part_names()
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in headers.items():
        module, _, part = name.rpartition(".")
        if part in known:
            groups.setdefault(module, {})[part] = stored
    return groups


def named_groups(model: nn.Module, groups: Groups) -> Groups:
    """Return the ``groups`` of linear layers, embeddings and expert stacks, by name in ``model``.

    Files of ``LlamaForCausalLM`` have "model.layers.0...", files of the base model "layers.0...": the prefix is added
    or removed as transformers does. Raises PackedFolderError if two groups belong to one layer.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".removeprefix(".")  # "" without one, not "."
    layers = _layers_by_name(model)
    named: dict[str, Mapping[str, StoredTensor]] = {}
    for name, group in groups.items():
        candidates = (name.removeprefix(prefix), name, prefix + name)
        layer = next((layers[candidate] for candidate in candidates if candidate in layers), None)
        if layer is None:  # of a part that this model does not have; the quantizer compares all names later
            continue
        if layer in named:
            raise PackedFolderError(
                f"{name}: the folder has this layer twice, with and without its prefix. Export again."
            )
        named[layer] = group
    return named


def _layers_by_name(model: nn.Module) -> dict[str, str]:
    """Return the names in ``model`` of linear layers, embeddings and stacks, by their names in files and in the model.

    Where one layer's name in files is another's name in the model, the latter counts.
    """
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding):
            weights[f"{name}.weight"] = module.get_parameter("weight")
    layers: dict[str, str] = {}
    # transformers renames weights of some models while it loads them.
    for in_files, in_model in names_in_files(model, weights).items():
        layers[in_files.removesuffix(".weight")] = in_model.removesuffix(".weight")
    for weight in weights:
        name = weight.removesuffix(".weight")
        layers[name] = name
    for name in known_stacks(model):
        layers[name] = name
    return layers


def form_of_group(name: str, packing: str, group: Mapping[str, StoredTensor], columns: int) -> PackedFormat:
    """Return the format of a weight with ``columns`` inputs, given its parts. Raises PackedFolderError."""
    sizes = {part: (stored.dtype, stored.shape) for part, stored in group.items()}
    try:
        return form_of(packing, sizes, columns)
    except ValueError as error:  # FormatError is one
        raise PackedFolderError(f"{name}: {error}. Export again.") from None


def kept_values(name: str, form: PackedFormat, group: Mapping[str, StoredTensor], shape: tuple[int, int]) -> int:
    """Return how many values are stored for a weight (O, I). Raises PackedFolderError if the parts do not fit."""
    absent = [part for part in form.part_names if part not in group]
    if absent:
        file = next(iter(group.values())).file
        raise PackedFolderError(
            f"{name}.{absent[0]}: not in the folder, though other parts are in {file}. Export again."
        )
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
    if "bitmask" in expected and len(group["bitmask"].shape) == 1:  # compressed, to a length that the data decide
        expected["bitmask"] = torch.uint8, group["bitmask"].shape
    for part, (dtype, dims) in expected.items():
        stored = group[part]
        if stored.dtype != dtype or stored.shape != dims:
            raise PackedFolderError(
                f"{name}.{part}: a {shape[0]} x {shape[1]} weight with {count} values needs {dtype} of shape {dims}, "
                f"{stored.file} has {stored.dtype} of shape {stored.shape}. Is it the folder of another model?"
            )
    return count


def loaded_dtype(scales: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a quantised weight of ``dtype`` after loading. Call it before :func:`reread_parts`.

    transformers casts the scales of modules that the model keeps in fp32, which is how they are recognised.
    """
    if scales.dtype == torch.float32:
        return torch.float32
    return dtype


def reread_parts(module: nn.Module, form: PackedFormat, group: Mapping[str, StoredTensor]) -> None:
    """Restore the stored dtype of scales and other parts that transformers has cast, except float values."""
    for part in form.part_names:
        tensor = getattr(module, part)
        stored = group[part]
        # Float values have the dtype that the user loads with. A cast of anything else changes weights or positions.
        is_float_weight = part == form.values_name and stored.dtype.is_floating_point
        if tensor.dtype != stored.dtype and not is_float_weight:
            setattr(module, part, stored.read().to(tensor.device))


def outside_base_model(names: Iterable[str], model: PreTrainedModel) -> set[str]:
    """Return the tensors of a head: names without the base model's prefix, if other names have it."""
    prefix = model.base_model_prefix
    if not prefix:
        return set()
    inside: set[str] = set()
    outside: set[str] = set()
    for name in names:
        if name.startswith(f"{prefix}."):
            inside.add(name)
        else:
            outside.add(name)
    if not inside:  # files without prefixed names are of the base model, which has no head
        return set()
    return outside
