"""A model folder's tensors for an export: dense with zeros in them, from anywhere, or one of our packed folders."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.core.formats import FORMATS, FormatError, row_bits
from pst_ds.export import manifest
from pst_ds.export.base_weights import BaseWeights, names_in_files
from pst_ds.export.manifest import DENSE, MANIFEST_FILE, About, ExportError, JsonTable, TensorEntry, read_table
from pst_ds.export.plan import PlannedTensor, TensorJob, TensorValues
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture
from pst_ds.nn.model_structure import is_conv1d, linear_shape, untied_linear_layers

CONFIG_FILE = "config.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the small files that go along with the weights: tokenizer, vocabulary, settings of generation."""


@dataclass(frozen=True, slots=True)
class FolderTensor:
    parts: dict[str, str]
    """Name in the files of each part; of a dense tensor its own under ""."""
    packing: str
    matrix: tuple[int, int] | None
    """(O, I) of a packed tensor."""
    transposed: bool
    sha256: dict[str, str]
    """By the manifest, of each tensor in the files; empty without a manifest."""
    pruned_per_matrix: tuple[int, ...] = ()


class FolderSource:
    """Values of a model folder."""

    def __init__(self, weights: BaseWeights):
        self._weights = weights

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """The values of the job's one output. Raises ExportError and InputError."""
        recipe: FolderTensor = job.recipe
        yield TensorValues(self.read(recipe, job.outputs[0].name), None, recipe.pruned_per_matrix)

    def read(self, recipe: FolderTensor, name: str, *, hashed: bool = True) -> Tensor:
        """A tensor in the model's shape. Raises ExportError for parts that no packed tensor has.

        ``hashed``: hold it against the SHA-256 of the manifest, if there is one.
        """
        parts = {part: self._weights.read(stored) for part, stored in recipe.parts.items()}
        for part, tensor in parts.items():
            stored = recipe.parts[part]
            if hashed and stored in recipe.sha256 and manifest.tensor_sha256(tensor) != recipe.sha256[stored]:
                raise ExportError(
                    f"{self._weights.folder}: {stored} is not what was exported: its SHA-256 differs. If the weights "
                    f"were changed on purpose, delete {MANIFEST_FILE}"
                )
        if recipe.packing == DENSE:
            return parts[""]
        form = FORMATS[recipe.packing]
        try:
            form.check(name, parts, recipe.matrix)
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        dense = form.unpack(parts)
        del parts
        return dense.t().contiguous() if recipe.transposed else dense


@dataclass(frozen=True, slots=True)
class FolderContents:
    """A model folder, opened: its config, the model's names and shapes, and its tensors."""

    path: Path
    config: JsonTable
    """config.json."""
    model: nn.Module
    """On the meta device."""
    weights: BaseWeights
    packing: str
    entries: dict[str, TensorEntry]
    """The manifest's, by name; empty without one."""
    about: About


def open_folder(path: Path) -> FolderContents:
    """Open a model folder. Raises InputError for what is not one, and for damaged files."""
    config = read_table(path / CONFIG_FILE, f"{path.absolute()} is not a model folder: {CONFIG_FILE} is missing")
    packing, index = _packing_of(path, config)
    model = model_of(path)
    entries, about = manifest.read_manifest(path) if (path / MANIFEST_FILE).exists() else ([], {})
    weights = BaseWeights(path, getattr(model, "base_model_prefix", ""), index)
    return FolderContents(path, config, model, weights, packing, {entry.name: entry for entry in entries}, about)


def _packing_of(path: Path, config: JsonTable) -> tuple[str, str]:
    """(format, weight file or index) by the config of a folder."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return DENSE, ""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != manifest.QUANT_METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ExportError(f"{path} is quantised ({str(method)[:40]}); export the model before it was quantised")
    packing, version, index = (quantization.get(key) for key in ("format", "format_version", "weights_file"))
    if packing not in FORMATS or version != manifest.FORMAT_VERSION:
        raise ExportError(f"{path} is packed as {packing!r}, version {version!r}, which this version does not read")
    if str(index) not in [manifest.weights_file_of(str(packing), count) for count in (1, 2)]:
        raise ExportError(f"{path / CONFIG_FILE} names the weights {str(index)[:80]!r}, which {packing} never has")
    return str(packing), str(index)


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


def plan_folder(folder: FolderContents, packing: str, dtype: str | None) -> tuple[list[TensorJob], FolderSource]:
    """Every tensor of a model folder, under the model's name for it. Reads the weights of linear layers once.

    Raises ExportError and InputError.
    """
    source, linear = FolderSource(folder.weights), linear_weights(folder.model)
    cast = None if dtype is None else DTYPES[dtype]
    jobs = []
    for name, parts in _tensors(folder, linear).items():
        recipe = _recipe(folder, name, parts, linear)
        planned = _planned(folder, name, recipe, linear, cast)
        if planned.is_linear and packing != DENSE:
            planned = _as_packed(source, recipe, planned, packing)
        jobs.append(TensorJob((planned,), recipe))
    return jobs, source


def _tensors(folder: FolderContents, linear: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    """By the model's name of each tensor: the files' name of each part ("" for a dense tensor)."""
    by_model = {}
    for name in (*dict(folder.model.named_parameters()), *dict(folder.model.named_buffers())):
        found = folder.weights.find(name)
        if found is not None:
            by_model[found] = name
    part_of: dict[str, tuple[str, str]] = {}
    if folder.packing != DENSE:
        known = set(folder.weights.names)
        for weight in linear:
            named = {f"{weight.removesuffix('.weight')}.{part}": part for part in FORMATS[folder.packing].part_names}
            if known & set(named):
                part_of |= {stored: (weight, part) for stored, part in named.items()}
        lacking = sorted(set(part_of) - known)
        if lacking:
            raise ExportError(f"{folder.path} lacks {lacking[0]}, which a weight packed as {folder.packing} has")
    tensors: dict[str, dict[str, str]] = {}
    for stored in folder.weights.names:
        name, part = part_of.get(stored, (by_model.get(stored, stored), ""))
        tensors.setdefault(name, {})[part] = stored
    mixed = next((name for name, parts in tensors.items() if "" in parts and len(parts) > 1), None)
    if mixed:
        raise ExportError(f"{folder.path} has {mixed} both dense and packed")
    return tensors


def _recipe(folder: FolderContents, name: str, parts: dict[str, str], linear: dict[str, nn.Module]) -> FolderTensor:
    entry = folder.entries.get(name)
    if folder.entries and entry is None:
        raise ExportError(f"{folder.path} has {name}, which its {MANIFEST_FILE} does not know")
    sums = {part.name: part.sha256 for part in entry.parts} if entry else {}
    pruned = tuple(entry.pruned_per_matrix) if entry else ()
    if "" in parts:
        return FolderTensor(parts, DENSE, None, False, sums, pruned)
    return FolderTensor(parts, folder.packing, linear_shape(linear[name]), is_conv1d(linear[name]), sums, pruned)


def _planned(
    folder: FolderContents, name: str, recipe: FolderTensor, linear: dict[str, nn.Module], cast: torch.dtype | None
) -> PlannedTensor:
    origin = folder.entries[name].origin if name in folder.entries else "model"
    if recipe.packing == DENSE:
        dtype, shape = folder.weights.size(recipe.parts[""])
    else:
        dtype = folder.weights.size(recipe.parts[FORMATS[recipe.packing].values_name])[0]
        outputs, inputs = recipe.matrix or (0, 0)
        shape = (inputs, outputs) if recipe.transposed else (outputs, inputs)
    if cast is not None and dtype.is_floating_point:
        dtype = cast
    is_weight = name in linear and len(shape) == 2
    transposed = is_weight and is_conv1d(linear[name])
    return PlannedTensor(name, shape, dtype, origin, transposed=transposed, is_linear=is_weight)


def _as_packed(source: FolderSource, recipe: FolderTensor, planned: PlannedTensor, packing: str) -> PlannedTensor:
    """``planned``, packed if its values fit the format and it pays."""
    weight = source.read(recipe, planned.name, hashed=False).to(planned.dtype)
    nonzero = int(torch.count_nonzero(weight))
    if packing == "2:4":
        matrix = weight.t().contiguous() if planned.transposed else weight
        if not FORMATS[packing].accepts(row_bits(matrix), planned.matrix):
            return planned if nonzero == math.prod(planned.shape) else replace(planned, stays_dense=True)
    return planned.packed(packing, nonzero)


def copy_beside(folder: Path, out: Path) -> None:
    """Copy the small files that go along with the weights: of the tokenizer, of generation."""
    for path in sorted(folder.iterdir()):
        is_ours = path.name in (CONFIG_FILE, MANIFEST_FILE) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _COPIED and not is_ours:
            shutil.copyfile(path, out / path.name)
