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
        stored = self.form.grid
        inputs = self.matrix[1]
        # a group of at least a whole row is the same quantisation as "row"
        return stored.bits == grid.bits and stored.num_groups(inputs) == grid.num_groups(inputs)


class FolderSource:
    """Values of a model folder: read, verified and unpacked."""

    def __init__(self, weights: BaseWeights, pruned_scales: PrunedScales | None = None):
        self._weights = weights
        self._pruned_scales = pruned_scales

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs. Raises ExportError and InputError."""
        recipe = job.recipe
        assert isinstance(recipe, FolderRecipe)
        output = job.outputs[0]
        stack = recipe.stack
        tensor = self.read(recipe, output.name, output.dtype)
        scales: Tensor | None = None
        rounding_error = 0.0
        if recipe.is_on(output.grid):
            # quantising the values again could give other scales
            scales = self._weights.read(recipe.parts["scales"])
            rounding_error = recipe.facts.rounding_error
        values = TensorValues(
            tensor=tensor,
            pruned_per_matrix=recipe.facts.pruned_per_matrix,
            scales=scales,
            rounding_error=rounding_error,
        )
        if stack is not None and output.name != stack.name:
            yield from _split_into_pieces(values, stack)
            return
        if stack is not None:
            tensor = tensor.view(stack.shape)
        if scales is None and recipe.pruned_layer and self._pruned_scales and output.grid:
            scales = self._pruned_scales.scales_of(recipe.pruned_layer, output.as_matrix(tensor), recipe.rows)
        yield replace(values, tensor=tensor, scales=scales)

    def read(self, recipe: FolderRecipe, name: str, dtype: torch.dtype, *, hashed: bool = True) -> Tensor:
        """Return a tensor in the model's shape, a stack of experts as the matrix that it is in memory.

        Quantised values are returned in ``dtype``. With ``hashed``, parts are compared with the SHA-256 in the
        manifest, if there is one. Raises ExportError, with the tensor's ``name``, for damaged parts.
        """
        sha256: dict[str, str] = {}
        if hashed:
            sha256 = recipe.facts.sha256
        form = recipe.form
        stack = recipe.stack
        if form is None and stack is not None:
            rows = [self._stored(stored, sha256).flatten(0, -2) for stored in stack.stored]
            if len(rows) == 1:
                return rows[0]  # torch.cat would copy it
            return torch.cat(rows)
        parts = {part: self._stored(stored, sha256) for part, stored in recipe.parts.items()}
        if form is None:
            return parts[""]
        shape = (recipe.matrix[0], recipe.matrix[1])
        unpacked_dtype: torch.dtype | None = None
        if isinstance(form, QuantizedFormat):
            unpacked_dtype = dtype
        try:
            parts = with_row_bits(name, parts, shape)
            form.check(name, parts, shape)
            dense = form.unpack(parts, unpacked_dtype)
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        del parts  # before the copies below, which would otherwise add to it in memory
        if stack is not None and stack.layout.transposed:
            by_expert = dense.view(stack.layout.num_experts, -1, dense.shape[1])  # (experts, outputs, inputs)
            return by_expert.transpose(1, 2).flatten(0, 1)  # (experts * inputs, outputs), as in memory
        if recipe.transposed:
            return dense.t().contiguous()
        return dense

    def _stored(self, name: str, sha256: dict[str, str]) -> Tensor:
        """Read a tensor of the files, and compare it with its SHA-256 if that is known."""
        tensor = self._weights.read(name)
        if name in sha256 and tensor_sha256(tensor) != sha256[name]:
            raise ExportError(
                f"{self._weights.folder}: {name} is not what was exported: its SHA-256 differs. If the weights were "
                f"changed on purpose, delete {MANIFEST_FILE}"
            )
        return tensor


def _split_into_pieces(values: TensorValues, stack: FolderStack) -> Iterator[TensorValues]:
    """Yield a stack of experts as the tensors that a dense folder has in its place. ``values``: of the whole stack."""
    pruned = values.pruned_per_matrix
    for piece in stack.pieces:
        rows = slice(*piece.run.rows)
        first, last = piece.run.share(len(pruned))
        scales: Tensor | None = None
        if values.scales is not None:
            scales = values.scales[rows]
        yield replace(
            values, tensor=values.tensor[rows].view(piece.shape), pruned_per_matrix=pruned[first:last], scales=scales
        )


def open_folder(path: Path) -> FolderContents:
    """Open a model folder. Raises InputError if it is not one, or damaged."""
    config = read_table(path / CONFIG_FILE, f"{path.absolute()} is not a model folder: {CONFIG_FILE} is missing")
    encoding, index = _encoding_of(path, config)
    model = model_of(path)
    tensors: list[ExportedTensor] = []
    facts: Facts = {}
    # exists(), so that a link or folder of this name is refused and not ignored
    if (path / MANIFEST_FILE).exists():
        tensors, facts = read_manifest(path)
    tensor_by_name = {tensor.name: tensor for tensor in tensors}
    return FolderContents(
        path=path,
        config=config,
        model=model,
        weights=BaseWeights(path, getattr(model, "base_model_prefix", ""), index),
        encoding=encoding,
        tensors=tensor_by_name,
        facts=facts,
        pruned_scales=read_pruned_scales(path),
    )


def _encoding_of(path: Path, config: dict[str, object]) -> tuple[Encoding, str]:
    """Return (storage of the weights, weight file or index) of a folder with this config. Raises ExportError."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Encoding(), ""
    method = quantization
    if isinstance(quantization, dict):
        method = quantization.get("quant_method")
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
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
        # transformers would replace linear layers by packed ones
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
    cast: torch.dtype | None = None
    if dtype is not None:
        cast = DTYPES[dtype]
    planner = _Planner(folder, encoding, cast)
    return planner.jobs(), planner.source


class _Planner:
    """Plans an export of a folder tensor by tensor: the parts of the files it is read from, and how it is stored."""

    def __init__(self, folder: FolderContents, encoding: Encoding, cast: torch.dtype | None):
        self._folder = folder
        self._encoding = encoding
        self._cast = cast
        self.source = FolderSource(folder.weights, folder.pruned_scales)
        layers: dict[str, nn.Module] = {}
        weights: dict[str, Tensor] = {}
        for name, module in untied_linear_layers(folder.model).items():
            layers[f"{name}.weight"] = module
            weights[f"{name}.weight"] = module.weight
        in_files = names_in_files(folder.model, weights)
        self._linear = layers | {saved: layers[name] for saved, name in in_files.items()}
        """Linear layers with untied weights, by the weights' names in the model and in the files."""
        self._stacks = folder_stacks(folder.model, folder.weights)
        self._grids = grids(folder.model, encoding.values, encoding.embeddings)
        self._pruned_layers: dict[str, str] = {}
        if folder.pruned_scales is not None:
            stacks = [stack.name for stack in self._stacks]
            self._pruned_layers = folder.pruned_scales.names(folder.model, self._linear, stacks, encoding.values)

    def jobs(self) -> list[TensorJob]:
        """Return the jobs: stacks that are made as a whole first, then all other tensors in the order of the files."""
        jobs: list[TensorJob] = []
        taken = set[str]()
        pieces: dict[str, tuple[str, tuple[int, int]]] = {}  # stack and rows of a tensor of the files
        for stack in self._stacks:
            recipe = self._stack_recipe(stack)
            outputs = self._stack_outputs(stack, recipe)
            if outputs:
                jobs.append(TensorJob(outputs, recipe))
                # the loop below must not plan these tensors of the files again
                taken |= {*recipe.parts.values(), *stack.stored}
            if self._encoding.storage.fills_stacks_by_expert:
                # a packed stack has no stored pieces
                for name, piece in zip(stack.stored, stack.pieces, strict=False):
                    pieces[name] = (stack.name, piece.run.rows)
        for name, parts in self._tensors(taken).items():
            layer = name
            rows: tuple[int, int] | None = None
            grid = self._grids.get(name)
            if name in pieces:
                layer, rows = pieces[name]
                grid = self._encoding.values
            recipe = self._recipe(name, parts)
            recipe = replace(recipe, pruned_layer=self._pruned_layers.get(layer, ""), rows=rows)
            jobs.append(TensorJob((self._output(name, recipe, grid),), recipe))
        return jobs

    def _output(self, name: str, recipe: FolderRecipe, grid: Grid | None) -> TensorSpec:
        """Return the tensor as the export stores it."""
        if recipe.form is None:
            _, shape = self._folder.weights.size(recipe.parts[""])
        elif recipe.transposed:
            shape = recipe.matrix[::-1]
        else:
            shape = recipe.matrix
        # a file may have a vector under the name of a weight, if another program wrote it
        is_linear = name in self._linear and len(shape) == 2
        transposed = is_linear and is_conv1d(self._linear[name])
        spec = TensorSpec(
            name=name,
            shape=shape,
            dtype=self._cast_dtype(recipe.dtype),
            origin=recipe.facts.origin,
            transposed=transposed,
            is_linear=is_linear,
        )
        if not is_linear:
            return spec.stored_as(self._encoding, grid)
        # reads the weight only if the format packs it
        return spec.stored_as(self._encoding, grid, partial(self._keep, recipe))

    def _keep(self, recipe: FolderRecipe, spec: TensorSpec) -> Tensor:
        """Read a weight, and return the row bits of its non-zeros."""
        # cast first, since a cast may round a small weight to zero; hashed when its values are written
        weight = self.source.read(recipe, spec.name, spec.dtype, hashed=False).to(spec.dtype)
        return row_bits(spec.as_matrix(weight.view(spec.shape)).contiguous())

    def _stack_recipe(self, stack: FolderStack) -> FolderRecipe:
        """Return the recipe for a whole stack; for one that the folder does not have, without parts."""
        folder = self._folder
        layout = stack.layout
        listed: list[ExportedTensor] = []
        for name in stack.stored or (stack.name,):
            if name in folder.tensors:
                listed.append(folder.tensors[name])
        facts = _facts_of(listed, layout.num_matrices)
        pruned_layer = ""
        if stack.name in self._pruned_layers:
            pruned_layer = stack.name
        part_of: dict[str, str] = {}
        if not folder.encoding.is_plain:
            part_of = _parts_of(stack.name, set(folder.weights.names), folder)
        if not part_of:
            # a stack of which the folder has nothing is not made, so that its dtype does not matter
            dtype = torch.float32
            if stack.stored:
                dtype, _ = folder.weights.size(stack.stored[0])
            return FolderRecipe(dtype, facts, {}, pruned_layer=pruned_layer, stack=stack)
        parts = {part: name for name, part in part_of.items()}
        form, dtype = _form_of_parts(folder, stack.name, parts, inputs=layout.in_features)
        return FolderRecipe(
            dtype=dtype,
            facts=facts,
            parts=parts,
            form=form,
            matrix=(layout.out_features, layout.in_features),
            pruned_layer=pruned_layer,
            stack=stack,
        )

    def _stack_outputs(self, stack: FolderStack, recipe: FolderRecipe) -> tuple[TensorSpec, ...]:
        """Return the outputs of a stack that is or will be packed; nothing if it stays separate dense tensors."""
        encoding = self._encoding
        storage = encoding.storage
        is_packed = recipe.form is not None
        if not is_packed and (not stack.stored or encoding.is_plain or storage.keeps_stacks_in_pieces):
            return ()
        spec = TensorSpec(
            name=stack.name,
            shape=stack.shape,
            dtype=self._cast_dtype(recipe.dtype),
            origin=recipe.facts.origin,
            transposed=stack.layout.transposed,
            is_linear=True,
        )
        if not storage.keeps_stacks_in_pieces:
            # a format that packs quantises the stack with it, and leaves one that it cannot pack unchanged
            grid: Grid | None = None
            if not storage.marks_tensors:
                grid = encoding.values
            as_one = spec.stored_as(encoding, grid, partial(self._keep, recipe))
            if as_one.form is not None:
                return (as_one,)
        if not is_packed:
            return ()
        # a packed stack becomes separate tensors again
        if storage.fills_stacks_by_expert:
            spec = spec.quantised(encoding.values)
        return tuple(replace(spec, name=piece.name, shape=piece.shape) for piece in stack.pieces)

    def _recipe(self, name: str, parts: dict[str, str]) -> FolderRecipe:
        """Return the recipe for a tensor, given the name in the files of each part. Raises ExportError."""
        folder = self._folder
        layer = self._linear.get(name)
        tensor = folder.tensors.get(name)
        if folder.tensors and tensor is None:
            raise ExportError(f"{folder.path} has {name}, which its {MANIFEST_FILE} does not list")
        facts = ManifestFacts()
        if tensor is not None:
            facts = _facts_of([tensor])
        if "" in parts:
            dtype, _ = folder.weights.size(parts[""])
            return FolderRecipe(dtype, facts, parts)
        # from the model, not from the parts: these are checked against it when they are read
        matrix: tuple[int, ...]
        transposed = False
        if layer is not None:
            matrix = linear_shape(layer)
            transposed = is_conv1d(layer)
        else:
            matrix = tuple(embedding_tables(folder.model)[name].shape)
        form, dtype = _form_of_parts(folder, name, parts, inputs=matrix[1])
        return FolderRecipe(dtype=dtype, facts=facts, parts=parts, form=form, matrix=matrix, transposed=transposed)

    def _tensors(self, taken: set[str]) -> dict[str, dict[str, str]]:
        """Return the name in the files of each part ("" if stored unchanged), by the model's name of each tensor.

        Omits tensors of the files that are ``taken`` already. Raises ExportError.
        """
        folder = self._folder
        known = set(folder.weights.names)
        model_names = (*dict(folder.model.named_parameters()), *dict(folder.model.named_buffers()))
        name_in_model: dict[str, str] = {}
        for name in model_names:
            stored = folder.weights.find(name)
            if stored is not None:
                name_in_model[stored] = name
        part_of: dict[str, tuple[str, str]] = {}
        if not folder.encoding.is_plain:
            for weight in {**self._linear, **embedding_tables(folder.model)}:
                for stored, part in _parts_of(weight, known, folder).items():
                    part_of[stored] = (weight, part)
        tensors: dict[str, dict[str, str]] = {}
        for stored in folder.weights.names:
            if stored in taken:
                continue
            # a tensor that the model does not have is copied under its name in the files
            name, part = part_of.get(stored, (name_in_model.get(stored, stored), ""))
            tensors.setdefault(name, {})[part] = stored
        for name, parts in tensors.items():
            if "" in parts and len(parts) > 1:
                raise ExportError(f"{folder.path} has {name} both dense and packed. Export the model again")
        return tensors

    def _cast_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a tensor of ``dtype`` has in the export."""
        if self._cast is not None and dtype.is_floating_point:
            return self._cast
        return dtype


def _facts_of(tensors: Sequence[ExportedTensor], num_matrices: int | None = None) -> ManifestFacts:
    """Return the facts of the tensors that a weight consists of.

    ``num_matrices``: of a stack of experts, which is "pruned" if all its pieces were.
    """
    pruned: list[int] = []
    sha256: dict[str, str] = {}
    for tensor in tensors:
        pruned += tensor.pruned_per_matrix
        sha256 |= {part.name: part.sha256 for part in tensor.parts}
    rounding_error = 0.0
    if len(tensors) == 1:  # relative errors of several tensors do not add up to one of the stack
        rounding_error = tensors[0].rounding_error
    origin: Origin
    if num_matrices is None:
        origin = tensors[0].origin
    elif len(pruned) == num_matrices:
        origin = "pruned"
    else:
        # numbers of only some matrices would be read as those of others
        origin = "model"
        pruned = []
    return ManifestFacts(origin=origin, sha256=sha256, pruned_per_matrix=tuple(pruned), rounding_error=rounding_error)


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
    except FormatError as error:
        raise ExportError(f"{folder.path}: {name}: {error}") from None
    if isinstance(form, QuantizedFormat):
        return form, _model_dtype(folder, name)
    dtype, _ = sizes[form.values_name]
    return form, dtype


def _model_dtype(folder: FolderContents, name: str) -> torch.dtype:
    """Return the dtype of a quantised weight, from the manifest or else from config.json."""
    if name in folder.tensors:
        return folder.tensors[name].spec.dtype
    # older versions of transformers wrote "torch_dtype"
    name_of_dtype = str(folder.config.get("dtype") or folder.config.get("torch_dtype"))
    dtype = getattr(torch, name_of_dtype, None)
    if dtype in VALUE_DTYPES:
        return dtype
    return torch.float32


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
