"""A model folder's tensors for an export: a dense folder with pruned weights from any source, or a packed one."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import Grid
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats import VALUE_DTYPES, FormatError, PackedFormat, QuantizedFormat, row_bits, with_row_bits
from pst_ds.formats.base_weights import BaseWeights, names_in_files
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture
from pst_ds.nn.model_structure import is_conv1d, linear_shape, untied_linear_layers
from pst_ds.nn.tables.rounded import embedding_tables
from pst_ds.storage_format import form_of
from pst_ds.writing.encoding import QUANT_METHOD, Encoding, ExportError, encoding_of_config
from pst_ds.writing.expert_stacks import FolderStack, folder_stacks
from pst_ds.writing.manifest import ExportedTensor, Facts, read_manifest, read_table, tensor_sha256
from pst_ds.writing.plan import Origin, TensorJob, TensorSpec, TensorValues
from pst_ds.writing.pruned_scales import PrunedScales, read_pruned_scales
from pst_ds.writing.quantization import grids

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


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """Facts in a manifest about the tensors that a weight consists of; the defaults without a manifest."""

    origin: Origin = "model"
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each tensor, by its name in the files."""
    pruned_per_matrix: tuple[int, ...] = ()
    rounding_error: float = 0.0


@dataclass(frozen=True, slots=True)
class FolderRecipe:
    """Recipe for one tensor of a folder, or for a whole stack of experts."""

    dtype: torch.dtype
    """Dtype in the model."""
    facts: ManifestFacts
    parts: dict[str, str]
    """Name in the files of each part; "" is the part of a tensor that is stored unchanged. Empty for a dense stack."""
    form: PackedFormat | None = None
    """Format of the parts; None if values are stored unchanged."""
    matrix: tuple[int, ...] = ()
    """(O, I) of a packed tensor, (E*O, I) of a stack."""
    transposed: bool = False
    pruned_layer: str = ""
    """Layer of this weight, if ``pst-ds prune`` has quantised it."""
    rows: tuple[int, int] | None = None
    """Range of rows, if this is a piece of a stack of experts."""
    stack: FolderStack | None = None

    def is_on(self, grid: Grid | None) -> bool:
        """Return whether the values are quantised to ``grid`` already."""
        if grid is None or not self.matrix or not isinstance(self.form, QuantizedFormat):
            return False
        mine, inputs = self.form.grid, self.matrix[1]
        return mine.bits == grid.bits and mine.num_groups(inputs) == grid.num_groups(inputs)


class FolderSource:
    """Values of a model folder: read, verified and unpacked."""

    def __init__(self, weights: BaseWeights, pruned_scales: PrunedScales | None = None):
        self._weights, self._pruned_scales = weights, pruned_scales

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs. Raises ExportError and InputError."""
        recipe, output = job.recipe, job.outputs[0]
        assert isinstance(recipe, FolderRecipe)
        tensor, facts, stack = self.read(recipe, output.name, output.dtype), recipe.facts, recipe.stack
        scales, error, pruned = None, 0.0, facts.pruned_per_matrix
        if recipe.is_on(output.grid):
            scales, error = self._weights.read(recipe.parts["scales"]), facts.rounding_error
        if stack is not None and output.name != stack.name:  # as the tensors of a dense folder
            for piece in stack.pieces:
                rows = slice(*piece.run.rows)
                own_scales, own_pruned = None if scales is None else scales[rows], slice(*piece.run.share(len(pruned)))
                yield TensorValues(tensor[rows].view(piece.shape), None, pruned[own_pruned], own_scales, error)
            return
        tensor = tensor if stack is None else tensor.view(stack.shape)
        if scales is None and recipe.pruned_layer and self._pruned_scales and output.grid:
            scales = self._pruned_scales.scales_of(recipe.pruned_layer, output.as_matrix(tensor), recipe.rows)
        yield TensorValues(tensor, None, pruned, scales, error)

    def read(self, recipe: FolderRecipe, name: str, dtype: torch.dtype, *, hashed: bool = True) -> Tensor:
        """Return a tensor in the model's shape, a stack of experts as the matrix that it is in memory.

        Quantised values are returned in ``dtype``. With ``hashed``, parts are compared with the SHA-256 in the
        manifest, if there is one. Raises ExportError, with the tensor's ``name``, for damaged parts.
        """
        sha256 = recipe.facts.sha256 if hashed else {}
        parts = {part: self._stored(stored, sha256) for part, stored in recipe.parts.items()}
        form, stack = recipe.form, recipe.stack
        if form is None and stack is not None:
            rows = [self._stored(stored, sha256).flatten(0, -2) for stored in stack.stored]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if form is None:
            return parts[""]
        try:
            parts = with_row_bits(name, parts, (recipe.matrix[0], recipe.matrix[1]))
            form.check(name, parts, (recipe.matrix[0], recipe.matrix[1]))
            dense = form.unpack(parts, dtype if isinstance(form, QuantizedFormat) else None)
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        del parts
        if stack is not None and stack.layout.transposed:
            return dense.view(stack.layout.num_experts, -1, dense.shape[1]).transpose(1, 2).flatten(0, 1)
        return dense.t().contiguous() if recipe.transposed else dense

    def _stored(self, name: str, sha256: dict[str, str]) -> Tensor:
        """Read a tensor of the files, and compare it with its SHA-256 if that is known."""
        tensor = self._weights.read(name)
        if name in sha256 and tensor_sha256(tensor) != sha256[name]:
            raise ExportError(
                f"{self._weights.folder}: {name} is not what was exported: its SHA-256 differs. If the weights were "
                f"changed on purpose, delete {MANIFEST_FILE}"
            )
        return tensor


def open_folder(path: Path) -> FolderContents:
    """Open a model folder. Raises InputError if it is not one, or damaged."""
    config = read_table(path / CONFIG_FILE, f"{path.absolute()} is not a model folder: {CONFIG_FILE} is missing")
    encoding, index = _encoding_of(path, config)
    model = model_of(path)
    tensors, facts = read_manifest(path) if (path / MANIFEST_FILE).exists() else ([], {})
    weights = BaseWeights(path, getattr(model, "base_model_prefix", ""), index)
    by_name = {tensor.name: tensor for tensor in tensors}
    return FolderContents(path, config, model, weights, encoding, by_name, facts, read_pruned_scales(path))


def _encoding_of(path: Path, config: dict[str, object]) -> tuple[Encoding, str]:
    """Return (storage of the weights, weight file or index) of a folder with this config. Raises ExportError."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Encoding(), ""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ExportError(f"{path} is quantised ({str(method)[:40]}). Export the model before it was quantised")
    try:
        return encoding_of_config(quantization)
    except ExportError as error:
        raise ExportError(f"{path / CONFIG_FILE}: {error}") from None


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


def plan_folder(folder: FolderContents, encoding: Encoding, dtype: str | None) -> tuple[list[TensorJob], FolderSource]:
    """Return a job for every tensor of a model folder, under the model's name for it, and the source of values.

    Reads the weights of linear layers once, to see whether packing them saves space. Raises ExportError and InputError.
    """
    planner = _Planner(folder, encoding, None if dtype is None else DTYPES[dtype])
    return planner.jobs(), planner.source


class _Planner:
    def __init__(self, folder: FolderContents, encoding: Encoding, cast: torch.dtype | None):
        self._folder, self._encoding, self._cast = folder, encoding, cast
        self.source = FolderSource(folder.weights, folder.pruned_scales)
        layers = {f"{name}.weight": module for name, module in untied_linear_layers(folder.model).items()}
        in_files = names_in_files(folder.model, {name: module.weight for name, module in layers.items()})
        self._linear = layers | {saved: layers[name] for saved, name in in_files.items()}
        """Linear layers with untied weights, by the weights' names in the model and in the files."""
        self._stacks = folder_stacks(folder.model, folder.weights)
        self._grids = grids(folder.model, encoding.values, encoding.embeddings)
        self._pruned_layers: dict[str, str] = {}
        if folder.pruned_scales is not None:
            stacks = [stack.name for stack in self._stacks]
            self._pruned_layers = folder.pruned_scales.names(folder.model, self._linear, stacks, encoding.values)

    def jobs(self) -> list[TensorJob]:
        jobs, taken = [], set[str]()
        pieces: dict[str, tuple[str, tuple[int, int]]] = {}
        for stack in self._stacks:
            recipe = self._stack_recipe(stack)
            outputs = self._stack_outputs(stack, recipe)
            if outputs:
                jobs.append(TensorJob(outputs, recipe))
                taken |= {*recipe.parts.values(), *stack.stored}
            if self._encoding.storage.fills_stacks_by_expert:
                stored = zip(stack.stored, stack.pieces, strict=False)
                pieces |= {name: (stack.name, piece.run.rows) for name, piece in stored}
        for name, parts in self._tensors(taken).items():
            layer, rows, grid = name, None, self._grids.get(name)
            if name in pieces:
                (layer, rows), grid = pieces[name], self._encoding.values
            recipe = self._recipe(name, parts)
            recipe = replace(recipe, pruned_layer=self._pruned_layers.get(layer, ""), rows=rows)
            jobs.append(TensorJob((self._output(name, recipe, grid),), recipe))
        return jobs

    def _output(self, name: str, recipe: FolderRecipe, grid: Grid | None) -> TensorSpec:
        """Return the tensor as the export stores it."""
        if recipe.form is None:
            shape = self._folder.weights.size(recipe.parts[""])[1]
        else:
            shape = recipe.matrix[::-1] if recipe.transposed else recipe.matrix
        is_linear = name in self._linear and len(shape) == 2
        transposed = is_linear and is_conv1d(self._linear[name])
        dtype, origin = self._cast_dtype(recipe.dtype), recipe.facts.origin
        spec = TensorSpec(name, shape, dtype, origin, transposed=transposed, is_linear=is_linear)
        return spec.stored_as(self._encoding, grid, partial(self._keep, recipe) if is_linear else None)

    def _keep(self, recipe: FolderRecipe, spec: TensorSpec) -> Tensor:
        """Read a weight, and return the row bits of its non-zeros."""
        weight = self.source.read(recipe, spec.name, spec.dtype, hashed=False).to(spec.dtype)
        return row_bits(spec.as_matrix(weight.view(spec.shape)).contiguous())

    def _stack_recipe(self, stack: FolderStack) -> FolderRecipe:
        folder, layout = self._folder, stack.layout
        found = [folder.tensors.get(name) for name in stack.stored or (stack.name,)]
        facts = _facts_of([tensor for tensor in found if tensor is not None], layout.num_matrices)
        pruned = stack.name if stack.name in self._pruned_layers else ""
        stored = {} if folder.encoding.is_plain else _parts_of(stack.name, set(folder.weights.names), folder)
        if not stored:
            dtype = folder.weights.size(stack.stored[0])[0] if stack.stored else torch.float32
            return FolderRecipe(dtype, facts, {}, pruned_layer=pruned, stack=stack)
        parts = {part: name for name, part in stored.items()}
        form, dtype = _form_of_parts(folder, stack.name, parts, layout.in_features)
        matrix = layout.out_features, layout.in_features
        return FolderRecipe(dtype, facts, parts, form, matrix, pruned_layer=pruned, stack=stack)

    def _stack_outputs(self, stack: FolderStack, recipe: FolderRecipe) -> tuple[TensorSpec, ...]:
        """Return the outputs of a stack that is or will be packed; nothing if it stays separate dense tensors."""
        encoding, is_packed = self._encoding, recipe.form is not None
        storage = encoding.storage
        if not is_packed and (not stack.stored or encoding.is_plain or storage.keeps_stacks_in_pieces):
            return ()
        dtype, transposed = self._cast_dtype(recipe.dtype), stack.layout.transposed
        spec = TensorSpec(stack.name, stack.shape, dtype, recipe.facts.origin, transposed=transposed, is_linear=True)
        if not storage.keeps_stacks_in_pieces:
            # a format that packs quantises the stack with it, and leaves one that it cannot pack unchanged
            grid = None if storage.marks_tensors else encoding.values
            as_one = spec.stored_as(encoding, grid, partial(self._keep, recipe))
            if as_one.form is not None:
                return (as_one,)
        if not is_packed:
            return ()
        piece_spec = spec.quantised(encoding.values) if storage.fills_stacks_by_expert else spec
        return tuple(replace(piece_spec, name=piece.name, shape=piece.shape) for piece in stack.pieces)

    def _recipe(self, name: str, parts: dict[str, str]) -> FolderRecipe:
        folder, layer = self._folder, self._linear.get(name)
        tensor, transposed = folder.tensors.get(name), layer is not None and is_conv1d(layer)
        if folder.tensors and tensor is None:
            raise ExportError(f"{folder.path} has {name}, which its {MANIFEST_FILE} does not list")
        facts = ManifestFacts() if tensor is None else _facts_of([tensor])
        if "" in parts:
            return FolderRecipe(folder.weights.size(parts[""])[0], facts, parts)
        matrix = linear_shape(layer) if layer is not None else tuple(embedding_tables(folder.model)[name].shape)
        form, dtype = _form_of_parts(folder, name, parts, matrix[1])
        return FolderRecipe(dtype, facts, parts, form, matrix, transposed)

    def _tensors(self, taken: set[str]) -> dict[str, dict[str, str]]:
        """Return the name in the files of each part ("" if stored unchanged), by the model's name of each tensor.

        Omits tensors of the files that are ``taken`` already. Raises ExportError.
        """
        folder, known = self._folder, self._folder.weights.names
        model_names = (*dict(folder.model.named_parameters()), *dict(folder.model.named_buffers()))
        by_model = {at: name for name in model_names if (at := folder.weights.find(name)) is not None}
        part_of: dict[str, tuple[str, str]] = {}
        if not folder.encoding.is_plain:
            for weight in {**self._linear, **embedding_tables(folder.model)}:
                parts = _parts_of(weight, set(known), folder)
                part_of |= {stored: (weight, part) for stored, part in parts.items()}
        tensors: dict[str, dict[str, str]] = {}
        for stored in (name for name in known if name not in taken):
            name, part = part_of.get(stored, (by_model.get(stored, stored), ""))
            tensors.setdefault(name, {})[part] = stored
        mixed = next((name for name, parts in tensors.items() if "" in parts and len(parts) > 1), None)
        if mixed:
            raise ExportError(f"{folder.path} has {mixed} both dense and packed. Export the model again")
        return tensors

    def _cast_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._cast if self._cast is not None and dtype.is_floating_point else dtype


def _facts_of(tensors: Sequence[ExportedTensor], num_matrices: int | None = None) -> ManifestFacts:
    """Return the facts of the tensors that a weight consists of.

    ``num_matrices``: of a stack of experts, which is "pruned" if all its pieces were.
    """
    pruned = tuple(count for tensor in tensors for count in tensor.pruned_per_matrix)
    sums = {part.name: part.sha256 for tensor in tensors for part in tensor.parts}
    error = tensors[0].rounding_error if len(tensors) == 1 else 0.0
    if num_matrices is None:
        return ManifestFacts(tensors[0].origin, sums, pruned, error)
    is_pruned = len(pruned) == num_matrices
    return ManifestFacts("pruned" if is_pruned else "model", sums, pruned if is_pruned else (), error)


def _parts_of(weight: str, known: set[str], folder: FolderContents) -> dict[str, str]:
    """Return the parts of the tensor ``weight``, by their names in the files; may be empty."""
    module = weight.removesuffix(".weight")
    packing = folder.encoding.packing
    storage = folder.encoding.storage
    stored = [part for part in storage.all_part_names() if f"{module}.{part}" in known]
    parts = {f"{module}.{part}": part for part in storage.part_names_of(stored)}
    if not known & set(parts):
        return {}
    if lacking := sorted(set(parts) - known):
        raise ExportError(f"{folder.path} lacks {lacking[0]}, a part of a weight packed as {packing}")
    return parts


def _form_of_parts(
    folder: FolderContents, name: str, parts: dict[str, str], inputs: int
) -> tuple[PackedFormat, torch.dtype]:
    """Return the format of a weight's parts, and the dtype of the weight. Raises ExportError."""
    sizes = {part: folder.weights.size(stored) for part, stored in parts.items()}
    try:
        form = form_of(folder.encoding.packing, sizes, inputs)
    except FormatError as broken:
        raise ExportError(f"{folder.path}: {name}: {broken}") from None
    is_quantised = isinstance(form, QuantizedFormat)
    return form, _model_dtype(folder, name) if is_quantised else sizes[form.values_name][0]


def _model_dtype(folder: FolderContents, name: str) -> torch.dtype:
    """Return the dtype of a quantised weight, from the manifest or else from config.json."""
    if name in folder.tensors:
        return folder.tensors[name].spec.dtype
    named = getattr(torch, str(folder.config.get("dtype") or folder.config.get("torch_dtype")), None)
    return named if named in VALUE_DTYPES else torch.float32


def copy_small_files(folder: Path, out: Path) -> None:
    """Copy the config, without its quantisation, and what else goes along with the weights, such as the tokenizer."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in sorted(folder.iterdir()):
        is_ours = path.name in (CONFIG_FILE, MANIFEST_FILE) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not is_ours:
            shutil.copyfile(path, out / path.name)
    for path in folder.glob("[0-9]_*/config.json"):  # modules of sentence-transformers, such as 1_Pooling
        (out / path.parent.name).mkdir()
        shutil.copyfile(path, out / path.parent.name / path.name)
