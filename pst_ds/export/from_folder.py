"""A model folder's tensors for an export: dense with zeros in them, from anywhere, or one of our packed folders."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.core.packings import FOR_COMPRESSED_TENSORS, GGUF
from pst_ds.core.quantization import Grid
from pst_ds.export import manifest
from pst_ds.export.encoding import QUANT_METHOD, Encoding, encoding_of
from pst_ds.export.folder_source import FolderSource, FolderTensor, StackTensor
from pst_ds.export.folder_stacks import FolderStack, folder_stacks
from pst_ds.export.manifest import DENSE, MANIFEST_FILE, About, ExportError, JsonTable, TensorEntry, read_table
from pst_ds.export.plan import PlannedTensor, TensorJob
from pst_ds.export.promised_grid import PromisedGrid, promised_grid
from pst_ds.export.rounding import embedding_tables, grids, matrix_of
from pst_ds.formats import (
    VALUE_DTYPES,
    ForeignFormat,
    FormatError,
    PackedFormat,
    QuantizedFormat,
    form_of,
    packed_format,
    row_bits,
)
from pst_ds.formats.base_weights import BaseWeights, names_in_files
from pst_ds.formats.foreign import METHODS as FOREIGN_METHODS
from pst_ds.formats.rows import row_counts
from pst_ds.formats.safetensors_file import DTYPE_OF_CODE
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture
from pst_ds.nn.model_structure import is_conv1d, linear_shape, untied_linear_layers

CONFIG_FILE = "config.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the small files that go along with the weights: tokenizer, vocabulary, settings of generation."""


@dataclass(frozen=True, slots=True)
class FolderContents:
    """A model folder, opened: its config, the model's names and shapes, and its tensors."""

    path: Path
    config: JsonTable
    """config.json."""
    model: nn.Module
    """On the meta device."""
    weights: BaseWeights
    encoding: Encoding
    entries: dict[str, TensorEntry]
    """The manifest's, by name; empty without one."""
    about: About
    promised: PromisedGrid | None
    """What ``pst-ds prune`` rounded its layers to."""
    foreign: ForeignFormat | None = None
    """Another library's, that some of its weights are in."""


def open_folder(path: Path, *, dequantize: bool = False) -> FolderContents:
    """Open a model folder. Raises InputError for what is not one, and for damaged files.

    ``dequantize``: it is one that another library has quantised.
    """
    config = read_table(path / CONFIG_FILE, f"{path.absolute()} is not a model folder: {CONFIG_FILE} is missing")
    foreign = foreign_format(path, config) if dequantize else None
    encoding, index = (Encoding(), "") if foreign else _encoding_of(path, config)
    model = model_of(path)
    entries, about = manifest.read_manifest(path) if (path / MANIFEST_FILE).exists() else ([], {})
    weights = BaseWeights(path, getattr(model, "base_model_prefix", ""), index)
    by_name = {entry.name: entry for entry in entries}
    return FolderContents(path, config, model, weights, encoding, by_name, about, promised_grid(path), foreign)


def _encoding_of(path: Path, config: JsonTable) -> tuple[Encoding, str]:
    """(how its weights are stored, weight file or index) by the config of a folder."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Encoding(), ""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        fix = "add --dequantize, or " if method in FOREIGN_METHODS else ""
        raise ExportError(f"{path} is quantised ({str(method)[:40]}); {fix}export the model before it was quantised")
    packing, version, index = (quantization.get(key) for key in ("format", "format_version", "weights_file"))
    try:
        encoding = encoding_of(packing, quantization)
    except ValueError as error:
        raise ExportError(
            f"{path} is packed as {packing!r}, version {version!r}, which this version does not read: {error}"
        ) from None
    if encoding.is_plain or version != (encoding.quantization_config(1) or {})["format_version"]:
        raise ExportError(f"{path} is packed as {packing!r}, version {version!r}, which this version does not read")
    if str(index) not in [encoding.weights_file(count) for count in (1, 2)]:
        raise ExportError(f"{path / CONFIG_FILE} names the weights {str(index)[:80]!r}, which {packing} never has")
    return encoding, str(index)


def foreign_format(path: Path, config: JsonTable) -> ForeignFormat:
    """Return the format of a folder that another library has quantised. Raises ExportError for any other."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") == QUANT_METHOD:
        raise ExportError(f"{path} is not quantised by another library: leave out --dequantize")
    try:
        return ForeignFormat(str(settings.get("quant_method"))[:40], settings)
    except FormatError as error:
        raise ExportError(f"{path / CONFIG_FILE}: {error}; export the model before it was quantised") from None


def model_of(path: Path) -> nn.Module:
    """Return the plain model of a folder's config, on the meta device. Raises InputError."""
    place = Pretrained(str(path))
    config = place.config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = architecture(config)
    if kind is None:
        raise ExportError(
            f"{path / CONFIG_FILE} names the architecture {(config.architectures or [])[:1]}, which this version of "
            "transformers does not have"
        )
    return place.shapes(kind, config)


def linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that share their weight with no other module, by its name in the model and in the files."""
    layers = {f"{name}.weight": module for name, module in untied_linear_layers(model).items()}
    in_files = names_in_files(model, {name: module.weight for name, module in layers.items()})
    return layers | {saved: layers[name] for saved, name in in_files.items()}


def plan_folder(folder: FolderContents, encoding: Encoding, dtype: str | None) -> tuple[list[TensorJob], FolderSource]:
    """Every tensor of a model folder, under the model's name for it. Reads the weights of linear layers once.

    Raises ExportError and InputError.
    """
    source, linear = FolderSource(folder.weights, folder.promised), linear_weights(folder.model)
    stacks = [] if folder.foreign else folder_stacks(folder.model, folder.weights)
    names = [stack.name for stack in stacks]
    promised = folder.promised.names(folder.model, linear, names, encoding.values) if folder.promised else {}
    rounded, cast = grids(folder.model, encoding), None if dtype is None else DTYPES[dtype]
    jobs, taken = [], set[str]()
    for stack in stacks:
        recipe = _stack_recipe(folder, stack, is_promised=stack.name in promised)
        outputs = _stack_outputs(folder, source, recipe, encoding, cast)
        if outputs:
            jobs.append(TensorJob(outputs, recipe))
            taken |= {*(recipe.packed.parts.values() if recipe.packed else ()), *stack.stored}
    of_stacks = _pieces_of_plain(stacks) if encoding.packing == GGUF else {}
    for name, parts in _tensors(folder, linear, taken).items():
        layer, rows, grid = name, None, rounded.get(name)
        if name in of_stacks:  # which GGUF stacks again, and is filled with expert by expert
            (layer, rows), grid = of_stacks[name], encoding.values
        own = replace(_recipe(folder, name, parts, linear), promised=promised.get(layer, ""), rows=rows)
        planned = _planned(folder, name, own, linear, cast).rounded(grid)
        if encoding.packing in FOR_COMPRESSED_TENSORS:
            planned = planned.for_compressed_tensors(encoding.packing)
        elif planned.is_linear and encoding.packing not in (DENSE, GGUF) and planned.grid in (None, encoding.values):
            weight = source.read(own, planned.name, planned.dtype, hashed=False)
            planned = _as_packed(weight.to(planned.dtype), planned, encoding)
        jobs.append(TensorJob((planned,), own))
    return jobs, source


def _pieces_of_plain(stacks: list[FolderStack]) -> dict[str, tuple[str, tuple[int, int]]]:
    """(stack, its rows) by the files' name of each plain tensor that is rows of one."""
    return {
        at: (stack.name, piece.rows) for stack in stacks for at, piece in zip(stack.stored, stack.pieces, strict=False)
    }


def _stack_recipe(folder: FolderContents, stack: FolderStack, *, is_promised: bool) -> StackTensor:
    facts, packed = stack.facts(folder.entries), None
    stored = {} if folder.encoding.is_plain else _parts_of(stack.name, set(folder.weights.names), folder)
    if stored:
        parts, layout = {part: name for name, part in stored.items()}, stack.layout
        entry = folder.entries.get(stack.name)
        form, dtype = _form_of_parts(folder, stack.name, parts, layout.in_features, entry)
        matrix, pruned = (layout.out_features, layout.in_features), facts.pruned_per_matrix
        packed = FolderTensor(parts, form, dtype, matrix, False, facts.sha256, pruned, facts.rounding_error)
    return StackTensor(stack, packed, facts.sha256, facts.pruned_per_matrix, is_promised)


def _stack_outputs(
    folder: FolderContents, source: FolderSource, recipe: StackTensor, encoding: Encoding, cast: torch.dtype | None
) -> tuple[PlannedTensor, ...]:
    """What a stack becomes that is packed, or is to be; nothing where its plain tensors stay ones by themselves."""
    stack = recipe.stack
    if recipe.packed is None and (
        not stack.stored or encoding.is_plain or encoding.packing in (GGUF, *FOR_COMPRESSED_TENSORS)
    ):
        return ()
    dtype = recipe.packed.dtype if recipe.packed else folder.weights.size(stack.stored[0])[0]
    origin = stack.facts(folder.entries).origin
    planned = stack.planned(cast if cast and dtype.is_floating_point else dtype, origin)
    as_one = planned
    if encoding.packing == DENSE:
        as_one = planned.rounded(encoding.values)
    elif encoding.packing not in (GGUF, *FOR_COMPRESSED_TENSORS):
        rows = source.read_stack(recipe, planned.dtype, hashed=False).to(planned.dtype)
        as_one = _as_packed(rows.view(stack.shape), planned, encoding)
    if as_one.form is not None:
        return (as_one,)
    if recipe.packed is None:
        return ()
    return stack.planned_pieces(planned.rounded(encoding.values) if encoding.packing == GGUF else planned)


def _tensors(folder: FolderContents, linear: dict[str, nn.Module], taken: set[str]) -> dict[str, dict[str, str]]:
    """By the model's name of each tensor: the files' name of each part ("" where it is stored as it is).

    Without those that are ``taken``, by their names in the files.
    """
    by_model = {}
    for name in (*dict(folder.model.named_parameters()), *dict(folder.model.named_buffers())):
        found = folder.weights.find(name)
        if found is not None:
            by_model[found] = name
    part_of: dict[str, tuple[str, str]] = {}
    if folder.foreign:
        part_of |= _foreign_parts(folder, folder.foreign)
    known = set(folder.weights.names)
    if not folder.encoding.is_plain:
        for weight in {**linear, **embedding_tables(folder.model)}:
            part_of |= {stored: (weight, part) for stored, part in _parts_of(weight, known, folder).items()}
    tensors: dict[str, dict[str, str]] = {}
    for stored in (name for name in folder.weights.names if name not in taken):
        name, part = part_of.get(stored, (by_model.get(stored, stored), ""))
        tensors.setdefault(name, {})[part] = stored
    mixed = next((name for name, parts in tensors.items() if "" in parts and len(parts) > 1), None)
    if mixed:
        raise ExportError(f"{folder.path} has {mixed} both dense and packed")
    return tensors


def _foreign_parts(folder: FolderContents, form: ForeignFormat) -> dict[str, tuple[str, str]]:
    """(model's name, part) by the files' names of what another library's weights are in. Raises ExportError."""
    prefix = f"{getattr(folder.model, 'base_model_prefix', '')}.".removeprefix(".")
    known = dict(folder.model.named_parameters())
    part_of: dict[str, tuple[str, str]] = {}
    for stored, parts in form.weights(set(folder.weights.names)).items():
        name = next((n for n in (stored, stored.removeprefix(prefix), prefix + stored) if n in known), None)
        if name is None:
            raise ExportError(f"{folder.path} has {stored} in {form.method}, and the model has no such weight")
        part_of |= {file: (name, part) for part, file in parts.items()}
    if not part_of:
        raise ExportError(f"{folder.path} has no weight in {form.method}, which its {CONFIG_FILE} says it has")
    return part_of


def _parts_of(weight: str, known: set[str], folder: FolderContents) -> dict[str, str]:
    """The part by the files' name of each that the tensor ``weight`` is stored in; none where it has no parts."""
    module, packing = weight.removesuffix(".weight"), folder.encoding.packing
    names = packed_format(packing).part_names if packing != DENSE else ()
    if f"{module}.codes" in known:
        names = packed_format(packing if f"{module}.bitmask" in known else DENSE, Grid(8)).part_names
    parts = {f"{module}.{part}": part for part in names}
    lacking = sorted(set(parts) - known) if known & set(parts) else []
    if lacking:
        raise ExportError(f"{folder.path} lacks {lacking[0]}, which a weight packed as {packing} has")
    return parts if known & set(parts) else {}


def _recipe(folder: FolderContents, name: str, parts: dict[str, str], linear: dict[str, nn.Module]) -> FolderTensor:
    entry = folder.entries.get(name)
    if folder.entries and entry is None:
        raise ExportError(f"{folder.path} has {name}, which its {MANIFEST_FILE} does not know")
    sums = {part.name: part.sha256 for part in entry.parts} if entry else {}
    pruned, error = (tuple(entry.pruned_per_matrix), entry.rounding_error) if entry else ((), 0.0)
    if "" in parts:
        return FolderTensor(parts, None, folder.weights.size(parts[""])[0], None, False, sums, pruned)
    layer = linear.get(name)
    if folder.foreign:
        return _foreign_recipe(folder, folder.foreign, name, parts, layer)
    shape = linear_shape(layer) if layer is not None else embedding_tables(folder.model)[name].shape
    matrix = (shape[0], shape[1])
    form, dtype = _form_of_parts(folder, name, parts, matrix[1], entry)
    return FolderTensor(parts, form, dtype, matrix, layer is not None and is_conv1d(layer), sums, pruned, error)


def _form_of_parts(
    folder: FolderContents, name: str, parts: dict[str, str], inputs: int, entry: TensorEntry | None
) -> tuple[PackedFormat, torch.dtype]:
    """Return the format of a weight's parts, and the dtype of the weight. Raises ExportError."""
    sizes = {part: folder.weights.size(stored) for part, stored in parts.items()}
    try:
        form = form_of(folder.encoding.packing, sizes, inputs)
    except FormatError as broken:
        raise ExportError(f"{folder.path}: {name}: {broken}") from None
    dtype = sizes[form.values_name][0] if not isinstance(form, QuantizedFormat) else _model_dtype(folder, entry)
    return form, dtype


def _foreign_recipe(
    folder: FolderContents, form: ForeignFormat, name: str, parts: dict[str, str], layer: nn.Module | None
) -> FolderTensor:
    shape, transposed = tuple(folder.model.get_parameter(name).shape), layer is not None and is_conv1d(layer)
    lacking = sorted(stored for stored in parts.values() if not folder.weights.has(stored))
    if lacking:
        raise ExportError(f"{folder.path} lacks {lacking[0]}, which a weight in {form.method} has")
    return FolderTensor(parts, form, _model_dtype(folder, None), shape[::-1] if transposed else shape, transposed, {})


def _model_dtype(folder: FolderContents, entry: TensorEntry | None) -> torch.dtype:
    """The dtype of a weight that is stored as codes: the manifest's, or without one that of config.json."""
    if entry is not None:
        return DTYPE_OF_CODE[entry.dtype]
    named = getattr(torch, str(folder.config.get("dtype") or folder.config.get("torch_dtype")), None)
    return named if named in VALUE_DTYPES else torch.float32


def _planned(
    folder: FolderContents, name: str, recipe: FolderTensor, linear: dict[str, nn.Module], cast: torch.dtype | None
) -> PlannedTensor:
    origin, dtype = folder.entries[name].origin if name in folder.entries else "model", recipe.dtype
    if recipe.form is None:
        shape = folder.weights.size(recipe.parts[""])[1]
    else:
        matrix = recipe.matrix or (0, 0)
        shape = matrix[::-1] if recipe.transposed else matrix
    if cast is not None and dtype.is_floating_point:
        dtype = cast
    is_weight = name in linear and len(shape) == 2
    transposed = is_weight and is_conv1d(linear[name])
    return PlannedTensor(name, shape, dtype, origin, transposed=transposed, is_linear=is_weight)


def _as_packed(weight: Tensor, planned: PlannedTensor, encoding: Encoding) -> PlannedTensor:
    """``planned``, packed if its values, ``weight``, fit the format and it pays; it is on the grid of the values."""
    if planned.dtype not in VALUE_DTYPES:
        return planned
    bits, numel = row_bits(matrix_of(planned, weight).contiguous()), weight.numel()
    del weight
    counts = row_counts(bits)
    if int(counts.sum()) == numel:
        return planned
    candidate = planned.rounded(encoding.values)
    if not packed_format(encoding.packing, candidate.grid).accepts(bits, planned.matrix):
        return replace(planned, stays_dense=True)
    candidate = candidate.packed(encoding.packing, counts)
    return candidate if candidate.packing != DENSE else replace(planned, stays_dense=candidate.stays_dense)


def copy_beside(folder: Path, out: Path) -> None:
    """Copy the small files that go along with the weights: of the tokenizer, of generation."""
    for path in sorted(folder.iterdir()):
        is_ours = path.name in (CONFIG_FILE, MANIFEST_FILE) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not is_ours:
            shutil.copyfile(path, out / path.name)
