"""A model folder's tensors for an export: a dense folder with pruned weights from any source, or a packed one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.core.packings import DENSE, FOR_COMPRESSED_TENSORS, GGUF
from pst_ds.core.quantization import Grid
from pst_ds.export.encoding import QUANT_METHOD, Encoding, ExportError, encoding_of
from pst_ds.export.expert_stacks import FolderStack, ManifestFacts, facts_of, folder_stacks
from pst_ds.export.folder_source import FolderRecipe, FolderSource
from pst_ds.export.manifest import ExportedTensor, Facts, read_manifest, read_table
from pst_ds.export.plan import TensorJob
from pst_ds.export.pruned_scales import PrunedScales, read_pruned_scales
from pst_ds.export.quantization import embedding_tables, grids
from pst_ds.export.tensor_spec import TensorSpec
from pst_ds.file_names import MANIFEST_FILE
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
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture
from pst_ds.nn.model_structure import is_conv1d, linear_shape, untied_linear_layers

CONFIG_FILE = "config.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of small files that are copied along with the weights: tokenizer, vocabulary, generation settings."""


@dataclass(frozen=True, slots=True)
class FolderContents:
    """An opened model folder."""

    path: Path
    config: dict[str, object]
    """Content of config.json."""
    model: nn.Module
    """Plain model on the meta device."""
    weights: BaseWeights
    encoding: Encoding
    tensors: dict[str, ExportedTensor]
    """Tensors of the manifest, by name; empty without one."""
    facts: Facts
    """Facts of the manifest; empty without one."""
    pruned_scales: PrunedScales | None
    """Quantisation that ``pst-ds prune`` has applied."""
    foreign: ForeignFormat | None = None
    """Format of weights that another library has quantised."""


def open_folder(path: Path, *, dequantize: bool = False) -> FolderContents:
    """Open a model folder; ``dequantize``: one that another library has quantised.

    Raises InputError if it is not a model folder, or damaged.
    """
    config = read_table(path / CONFIG_FILE, f"{path.absolute()} is not a model folder: {CONFIG_FILE} is missing")
    foreign = foreign_format(path, config) if dequantize else None
    encoding, index = (Encoding(), "") if foreign else _encoding_of(path, config)
    model = model_of(path)
    tensors, facts = read_manifest(path) if (path / MANIFEST_FILE).exists() else ([], {})
    weights = BaseWeights(path, getattr(model, "base_model_prefix", ""), index)
    by_name = {tensor.name: tensor for tensor in tensors}
    return FolderContents(path, config, model, weights, encoding, by_name, facts, read_pruned_scales(path), foreign)


def _encoding_of(path: Path, config: dict[str, object]) -> tuple[Encoding, str]:
    """Return (storage of the weights, weight file or index) of a folder with this config. Raises ExportError."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Encoding(), ""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        fix = "Add --dequantize, or export" if method in FOREIGN_METHODS else "Export"
        raise ExportError(f"{path} is quantised ({str(method)[:40]}). {fix} the model before it was quantised")
    packing, version, index = (quantization.get(key) for key in ("format", "format_version", "weights_file"))
    unread = f"{path} is packed as {packing!r}, version {version!r}, which this version does not read"
    try:
        encoding = encoding_of(packing, quantization)
    except ValueError as error:
        raise ExportError(f"{unread}: {error}") from None
    if encoding.is_plain or encoding.packing in (GGUF, *FOR_COMPRESSED_TENSORS) or version != encoding.format_version:
        raise ExportError(unread)
    if str(index) not in [encoding.weights_file(count) for count in (1, 2)]:
        raise ExportError(
            f"{path / CONFIG_FILE}: weights_file = {str(index)[:80]!r} is not a weight file of a folder packed as "
            f"{packing}. Export the model again"
        )
    return encoding, str(index)


def foreign_format(path: Path, config: dict[str, object]) -> ForeignFormat:
    """Return the format of a folder that another library has quantised. Raises ExportError for any other folder."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") == QUANT_METHOD:
        raise ExportError(f"{path} is not quantised by another library. Remove --dequantize")
    try:
        return ForeignFormat(str(settings.get("quant_method"))[:40], settings)
    except FormatError as error:
        raise ExportError(f"{path / CONFIG_FILE}: {error}. Export the model before it was quantised") from None


def model_of(path: Path) -> nn.Module:
    """Return the plain model of a folder's config on the meta device. Raises InputError."""
    place = Pretrained(str(path))
    config = place.config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = architecture(config)
    if kind is None:
        raise ExportError(
            f"{path / CONFIG_FILE}: architectures = {(config.architectures or [])[:1]} is not in this version of "
            "transformers. Install a newer one"
        )
    return place.shapes(kind, config)


def linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers with untied weights, by the weights' names in the model and in the files."""
    layers = {f"{name}.weight": module for name, module in untied_linear_layers(model).items()}
    in_files = names_in_files(model, {name: module.weight for name, module in layers.items()})
    return layers | {saved: layers[name] for saved, name in in_files.items()}


def plan_folder(folder: FolderContents, encoding: Encoding, dtype: str | None) -> tuple[list[TensorJob], FolderSource]:
    """Return a job for every tensor of a model folder, under the model's name for it, and the source of values.

    Reads the weights of linear layers once, to see whether packing them saves space. Raises ExportError and InputError.
    """
    planner = _Planner(folder, encoding, None if dtype is None else DTYPES[dtype])
    return list(planner.jobs()), planner.source


class _Planner:
    def __init__(self, folder: FolderContents, encoding: Encoding, cast: torch.dtype | None):
        self._folder, self._encoding, self._cast = folder, encoding, cast
        self.source = FolderSource(folder.weights, folder.pruned_scales)
        self._linear = linear_weights(folder.model)
        self._stacks = [] if folder.foreign else folder_stacks(folder.model, folder.weights)
        self._grids = grids(folder.model, encoding.values, encoding.embeddings)
        names, scales = [stack.name for stack in self._stacks], folder.pruned_scales
        self._pruned_layers = (
            scales.names(folder.model, self._linear, names, encoding.values) if scales is not None else {}
        )

    def jobs(self) -> list[TensorJob]:
        jobs, taken = [], set[str]()
        for stack in self._stacks:
            recipe = self._stack_recipe(stack)
            outputs = self._stack_outputs(stack, recipe)
            if outputs:
                jobs.append(TensorJob(outputs, recipe))
                taken |= {*recipe.parts.values(), *stack.stored}
        pieces = _dense_pieces(self._stacks) if self._encoding.packing == GGUF else {}
        for name, parts in _tensors(self._folder, self._linear, taken).items():
            layer, rows, grid = name, None, self._grids.get(name)
            if name in pieces:  # GGUF files have stacks again, and are filled expert by expert
                (layer, rows), grid = pieces[name], self._encoding.values
            recipe = self._recipe(name, parts)
            recipe = replace(recipe, pruned_layer=self._pruned_layers.get(layer, ""), rows=rows)
            jobs.append(TensorJob((self._output(name, recipe, grid),), recipe))
        return jobs

    def _output(self, name: str, recipe: FolderRecipe, grid: Grid | None) -> TensorSpec:
        """Return the tensor as the export stores it."""
        encoding, spec = self._encoding, self._spec(name, recipe).quantised(grid)
        if encoding.packing in FOR_COMPRESSED_TENSORS:
            return spec.for_compressed_tensors(encoding.packing)
        if spec.is_linear and encoding.packing not in (DENSE, GGUF) and spec.grid in (None, encoding.values):
            weight = self.source.read(recipe, spec.name, spec.dtype, hashed=False)
            return _packed_if_smaller(weight.to(spec.dtype), spec, encoding)
        return spec

    def _stack_recipe(self, stack: FolderStack) -> FolderRecipe:
        folder, facts = self._folder, stack.facts(self._folder.tensors)
        pruned = stack.name if stack.name in self._pruned_layers else ""
        stored = {} if folder.encoding.is_plain else _parts_of(stack.name, set(folder.weights.names), folder)
        if not stored:
            dtype = folder.weights.size(stack.stored[0])[0] if stack.stored else torch.float32
            return FolderRecipe(dtype, facts, {}, pruned_layer=pruned, stack=stack)
        parts, layout = {part: name for name, part in stored.items()}, stack.layout
        tensor = folder.tensors.get(stack.name)
        form, dtype = _form_of_parts(folder, stack.name, parts, layout.in_features, tensor)
        matrix = layout.out_features, layout.in_features
        return FolderRecipe(dtype, facts, parts, form, matrix, pruned_layer=pruned, stack=stack)

    def _stack_outputs(self, stack: FolderStack, recipe: FolderRecipe) -> tuple[TensorSpec, ...]:
        """Return the outputs of a stack that is or will be packed; nothing if it stays separate dense tensors."""
        encoding, is_packed = self._encoding, recipe.form is not None
        if not is_packed and (
            not stack.stored or encoding.is_plain or encoding.packing in (GGUF, *FOR_COMPRESSED_TENSORS)
        ):
            return ()
        spec = stack.spec(self._cast_dtype(recipe.dtype), recipe.facts.origin)
        as_one = spec
        if encoding.packing == DENSE:
            as_one = spec.quantised(encoding.values)
        elif encoding.packing not in (GGUF, *FOR_COMPRESSED_TENSORS):
            rows = self.source.read(recipe, stack.name, spec.dtype, hashed=False).to(spec.dtype)
            as_one = _packed_if_smaller(rows.view(stack.shape), spec, encoding)
        if as_one.form is not None:
            return (as_one,)
        if not is_packed:
            return ()
        return stack.piece_specs(spec.quantised(encoding.values) if encoding.packing == GGUF else spec)

    def _recipe(self, name: str, parts: dict[str, str]) -> FolderRecipe:
        folder = self._folder
        tensor = folder.tensors.get(name)
        if folder.tensors and tensor is None:
            raise ExportError(f"{folder.path} has {name}, which its {MANIFEST_FILE} does not list")
        if "" in parts:
            return FolderRecipe(folder.weights.size(parts[""])[0], facts_of(tensor), parts)
        layer = self._linear.get(name)
        if folder.foreign:
            return _foreign_recipe(folder, folder.foreign, name, parts, layer)
        shape = linear_shape(layer) if layer is not None else embedding_tables(folder.model)[name].shape
        matrix = (shape[0], shape[1])
        form, dtype = _form_of_parts(folder, name, parts, matrix[1], tensor)
        return FolderRecipe(dtype, facts_of(tensor), parts, form, matrix, layer is not None and is_conv1d(layer))

    def _spec(self, name: str, recipe: FolderRecipe) -> TensorSpec:
        if recipe.form is None:
            shape = self._folder.weights.size(recipe.parts[""])[1]
        else:
            shape = recipe.matrix[::-1] if recipe.transposed else recipe.matrix
        is_weight = name in self._linear and len(shape) == 2
        transposed = is_weight and is_conv1d(self._linear[name])
        dtype = self._cast_dtype(recipe.dtype)
        return TensorSpec(name, shape, dtype, recipe.facts.origin, transposed=transposed, is_linear=is_weight)

    def _cast_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._cast if self._cast is not None and dtype.is_floating_point else dtype


def _dense_pieces(stacks: list[FolderStack]) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return (stack, its rows) of each dense tensor that is a piece of a stack, by its name in the files."""
    return {
        at: (stack.name, piece.rows) for stack in stacks for at, piece in zip(stack.stored, stack.pieces, strict=False)
    }


def _tensors(folder: FolderContents, linear: dict[str, nn.Module], taken: set[str]) -> dict[str, dict[str, str]]:
    """Return the name in the files of each part ("" if stored unchanged), by the model's name of each tensor.

    Tensors of the files that are ``taken`` already are left out. Raises ExportError.
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
        raise ExportError(f"{folder.path} has {mixed} both dense and packed. Export the model again")
    return tensors


def _foreign_parts(folder: FolderContents, form: ForeignFormat) -> dict[str, tuple[str, str]]:
    """Return (model's name, part) of the parts of another library's weights, by their names in the files.

    Raises ExportError.
    """
    prefix = f"{getattr(folder.model, 'base_model_prefix', '')}.".removeprefix(".")
    known = dict(folder.model.named_parameters())
    part_of: dict[str, tuple[str, str]] = {}
    for stored, parts in form.weights(set(folder.weights.names)).items():
        name = next((n for n in (stored, stored.removeprefix(prefix), prefix + stored) if n in known), None)
        if name is None:
            raise ExportError(f"{folder.path} has {stored} in {form.method}, and the model has no such weight")
        part_of |= {file: (name, part) for part, file in parts.items()}
    if not part_of:
        raise ExportError(f"{folder.path} has no weight in {form.method}, although its {CONFIG_FILE} says so")
    return part_of


def _parts_of(weight: str, known: set[str], folder: FolderContents) -> dict[str, str]:
    """Return the parts of the tensor ``weight``, by their names in the files; empty if it has no parts."""
    module, packing = weight.removesuffix(".weight"), folder.encoding.packing
    names = packed_format(packing).part_names if packing != DENSE else ()
    if f"{module}.codes" in known:
        names = packed_format(packing if f"{module}.bitmask" in known else DENSE, Grid(8)).part_names
    parts = {f"{module}.{part}": part for part in names}
    lacking = sorted(set(parts) - known) if known & set(parts) else []
    if lacking:
        raise ExportError(f"{folder.path} lacks {lacking[0]}, a part of a weight packed as {packing}")
    return parts if known & set(parts) else {}


def _form_of_parts(
    folder: FolderContents, name: str, parts: dict[str, str], inputs: int, tensor: ExportedTensor | None
) -> tuple[PackedFormat, torch.dtype]:
    """Return the format of a weight's parts, and the dtype of the weight. Raises ExportError."""
    sizes = {part: folder.weights.size(stored) for part, stored in parts.items()}
    try:
        form = form_of(folder.encoding.packing, sizes, inputs)
    except FormatError as broken:
        raise ExportError(f"{folder.path}: {name}: {broken}") from None
    dtype = sizes[form.values_name][0] if not isinstance(form, QuantizedFormat) else _model_dtype(folder, tensor)
    return form, dtype


def _foreign_recipe(
    folder: FolderContents, form: ForeignFormat, name: str, parts: dict[str, str], layer: nn.Module | None
) -> FolderRecipe:
    shape, transposed = tuple(folder.model.get_parameter(name).shape), layer is not None and is_conv1d(layer)
    lacking = sorted(stored for stored in parts.values() if not folder.weights.has(stored))
    if lacking:
        raise ExportError(f"{folder.path} lacks {lacking[0]}, a part of a weight in {form.method}")
    matrix = shape[::-1] if transposed else shape
    return FolderRecipe(_model_dtype(folder, None), ManifestFacts(), parts, form, matrix, transposed)


def _model_dtype(folder: FolderContents, tensor: ExportedTensor | None) -> torch.dtype:
    """Return the dtype of a quantised weight, from the manifest or else from config.json."""
    if tensor is not None:
        return tensor.spec.dtype
    named = getattr(torch, str(folder.config.get("dtype") or folder.config.get("torch_dtype")), None)
    return named if named in VALUE_DTYPES else torch.float32


def _packed_if_smaller(weight: Tensor, spec: TensorSpec, encoding: Encoding) -> TensorSpec:
    """Return ``spec`` packed and quantised if ``weight`` fits the format and becomes smaller, else dense."""
    if spec.dtype not in VALUE_DTYPES:
        return spec
    bits, numel = row_bits(spec.as_matrix(weight).contiguous()), weight.numel()
    del weight
    counts = row_counts(bits)
    if int(counts.sum()) == numel:
        return spec
    candidate = spec.quantised(encoding.values)
    if not packed_format(encoding.packing, candidate.grid).accepts(bits, spec.matrix):
        return replace(spec, stays_dense=True)
    candidate = candidate.packed(encoding.packing, counts)
    return candidate if candidate.packing != DENSE else replace(spec, stays_dense=candidate.stays_dense)


def copy_small_files(folder: Path, out: Path) -> None:
    """Copy the small files that go along with the weights: tokenizer, generation settings."""
    for path in sorted(folder.iterdir()):
        is_ours = path.name in (CONFIG_FILE, MANIFEST_FILE) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not is_ours:
            shutil.copyfile(path, out / path.name)
