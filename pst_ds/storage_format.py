"""Storage formats of exports: the interface, the registry, and look-ups of packed layouts by a format's name.

A format is one class, found by its name: those of pst-ds in :mod:`pst_ds.storage_formats`, those of other packages by
an entry point in the group ``pst_ds.storage_formats``. ``pst-ds export --format``, the writer, ``verify``, ``inspect``
and the loaders ask the class, and compare no names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.atomic_files import require_writable
from pst_ds.errors import ExportError, InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat, Part

QUANT_METHOD = "pst_ds"
PLAIN_VERSION = 1
"""``format_version`` of folders with values in the model's dtype."""
QUANTIZED_VERSION = 2
"""``format_version`` of folders with quantised values."""
COMPRESSED_VERSION = 3
"""``format_version`` of folders with either, if at least one bitmask is compressed."""
PLAIN_STEM = "model"
"""Stem that plain transformers looks for; files that it cannot read never have it."""
VALUES = "values"
"""Setting for the quantisation of linear layers."""
CODES = "codes"
"""Part with the quantised values of a weight, in the formats of pst-ds."""
EMBEDDINGS = "embeddings"
"""Setting for the quantisation of embeddings and the output layer."""


class StorageFormat:
    """How an export stores weights. One object without state serves all exports.

    The defaults are those of a folder of safetensors files that pst-ds writes and reads. ``encoding``, ``spec`` and
    ``settings`` are :class:`~pst_ds.writing.encoding.Encoding`, :class:`~pst_ds.writing.plan.TensorSpec` and
    :class:`~pst_ds.export.export_run.ExportSettings`, which are above this module.
    """

    name: str
    """Name in ``--format``, in manifests and in config.json."""
    purpose: str
    """One line for the help."""
    is_listed = True
    """False for a variant that another format chooses by its settings."""

    # What it can hold.
    quantises: tuple[str, ...] = ()
    """Settings, :data:`VALUES` and :data:`EMBEDDINGS`, that may be int8 or int4."""
    omits_pruned = False
    """True if pruned weights take no space, which needs a model with pruned weights."""
    most_kept = 1.0
    """Largest share of the weights of a layer that can be kept, where it omits pruned weights."""
    most_kept_text = ""
    """The same in words, for messages: "two of four weights"."""
    fix_for_most_kept = 'Choose format = "bitmask"'
    """Advice where a run keeps more."""
    default_group: int | None = None
    """Weights per scale if the setting ``group`` is unset; None for the default of the value type."""
    has_plain_variant = False
    """True if the setting ``plain`` applies."""
    has_weight_files = True
    """True if weights are distributed over files, whose size ``shard_bytes`` limits."""

    # How tensors are stored.
    marks_tensors = False
    """True if tensors in its layout have its name in the manifest; the others are marked "dense"."""
    compresses_bitmask = False
    """True if files have the part "bitmask" compressed."""
    keeps_stacks_in_pieces = False
    """True if a dense stack of experts stays in separate tensors."""
    fills_stacks_by_expert = False
    """True if a file has stacks of experts whole, but is filled expert by expert."""

    # How exports are loaded.
    has_manifest = True
    """True if an export is a folder with a manifest that names the format."""
    loads_with_pst_ds = True
    """True if ``pst_ds.hf`` loads its quantised or packed weights in transformers."""
    engine = ""
    """Name of another engine that alone computes with the weights, so that logits cannot be compared; "" for ours."""
    is_faster_packed_on_cpu = False
    """True if a CPU computes faster with packed floats than with the dense layer."""
    runtime = ""
    """Name of the engine that :meth:`model_of` computes with; "" if transformers loads an export."""
    why_no_generation = ""
    """Why a model that :meth:`opens` cannot generate text, for messages."""
    lists_unquantised = False
    """True if config.json names the linear layers that are not quantised."""

    @property
    def stem(self) -> str:
        """Stem of the weight files' names."""
        return f"pst_{self.name.replace(':', 'of')}"  # Windows does not allow a colon in "2:4"

    def problem(self, values: Grid | None, embeddings: Grid | None) -> str:
        """Return why the format cannot hold this quantisation; "" if it can."""
        requested = {VALUES: values, EMBEDDINGS: embeddings}
        if all(grid is None or setting in self.quantises for setting, grid in requested.items()):
            return ""
        return (
            f"{self.name} holds values of the model's dtype only. For int8 and int4 choose "
            f"{', '.join(_quantising_formats())}"
        )

    def is_plain(self, *, is_quantized: bool) -> bool:
        """Return whether an export is an ordinary model folder, which transformers loads without pst-ds."""
        return False

    def layout(self, grid: Grid | None) -> PackedFormat | None:
        """Return the layout of a tensor's parts, with values quantised to ``grid`` or in the model's dtype.

        None if such a tensor is stored unchanged. Raises ValueError for an unsupported quantisation.
        """
        return None

    def require_values_of_model(self, grid: Grid | None) -> None:
        """Raise ValueError for values quantised to ``grid``, naming the formats that hold them."""
        if grid is None:
            return
        # Packed ones first: who asked for a packed format rather wants another of them than the dense one.
        packed_first = sorted(_quantising_formats(), key=lambda name: not storage_format(name).omits_pruned)
        raise ValueError(f"quantised values are packed as {', '.join(packed_first)}, not as {self.name}")

    def all_part_names(self) -> set[str]:
        """Return the names that parts of weights can have in folders of this format, quantised or not."""
        from pst_ds.core.quantization import Grid
        from pst_ds.formats.quantized import QuantizedDense

        # the names of the parts are the same for every quantisation
        layouts = [self.layout(None), QuantizedDense(Grid(8))]
        if VALUES in self.quantises:
            layouts.append(self.layout(Grid(8)))
        return {name for layout in layouts if layout is not None for name in layout.part_names}

    def part_names_of(self, stored: Collection[str]) -> tuple[str, ...]:
        """Return the names of the parts of a weight in a folder of this format; empty if it is stored unchanged.

        Args:
            stored: names that could be parts: the last components of tensors named like the weight's module.
        """
        from pst_ds.core.quantization import Grid

        layout = self.layout(None)
        if CODES in stored:
            # The names of the parts are the same for every quantisation, so any will do.
            layout = self._quantised_layout(stored, Grid(8))
        if layout is None:
            return ()
        return layout.part_names

    def layout_of_parts(self, parts: Mapping[str, Part], columns: int) -> PackedFormat:
        """Return the layout of a weight with ``columns`` inputs, given the dtypes and shapes of its parts.

        Reads only what distinguishes layouts; :meth:`PackedFormat.check` validates the rest.

        Raises FormatError if the scales fit no quantisation, and ValueError if the format has no packed floats.
        """
        from pst_ds.formats.quantized import grid_of_parts

        if CODES not in parts:
            return packed_format(self.name)
        return self._quantised_layout(parts, grid_of_parts(parts, columns))

    def _quantised_layout(self, stored: Collection[str], grid: Grid) -> PackedFormat:
        """Return the layout of quantised values with the parts ``stored``.

        Every format stores quantised embeddings whole. So is a matrix that has no part of the format's own.
        """
        from pst_ds.formats.quantized import QuantizedDense

        whole = QuantizedDense(grid)
        if VALUES not in self.quantises:
            return whole
        packed = packed_format(self.name, grid)
        parts_of_packed_only = set(packed.part_names) - set(whole.part_names)
        # One of them is enough: a checker then names those that are missing.
        if parts_of_packed_only.isdisjoint(stored):
            return whole
        return packed

    def spec_of(self, spec: Any, encoding: Any, grid: Grid | None, keep: Callable[[Any], Tensor] | None) -> Any:
        """Return a tensor as an export stores it; see :meth:`pst_ds.writing.plan.TensorSpec.stored_as`."""
        return spec.quantised(grid)

    def config_entry(
        self, encoding: Any, num_files: int, unquantised: Sequence[str], *, compressed: bool
    ) -> dict[str, object]:
        """Return the entry "quantization_config" of config.json of a folder that is not plain.

        Args:
            encoding: storage of the export.
            num_files: number of weight files.
            unquantised: linear layers that are not quantised, if :attr:`lists_unquantised`.
            compressed: whether a bitmask is compressed.
        """
        version = encoding.format_version
        if compressed:  # releases that cannot decompress refuse the number
            version = COMPRESSED_VERSION
        return {
            "quant_method": QUANT_METHOD,
            "format": self.name,
            "format_version": version,
            **encoding.facts(),
            "weights_file": encoding.weights_file(num_files),
        }

    # What ``pst-ds export`` asks.

    def problems_of_settings(self, settings: Any) -> Iterator[str]:
        """Yield what is wrong with the settings of an export in this format, beyond :meth:`problem`."""
        if settings.activation_bits == 8 and not self.quantises_activations(settings):
            texts = [each.activations_text for each in storage_formats() if each.activations_text]
            yield f'activation_bits = 8 is for {", and for ".join(texts)}. Set values = "int8" or "int4"'

    activations_text = ""
    """When ``activation_bits = 8`` applies, for messages; "" if never."""

    def quantises_activations(self, settings: Any) -> bool:
        """Return whether ``activation_bits = 8`` applies to an export with ``settings``."""
        return False

    def needs_no_values(self, settings: Any) -> bool:
        """Return whether the run, not the settings, decides the quantisation, so that it is checked later."""
        return False

    def variant_for(self, activation_bits: int) -> str:
        """Return the name of the format that stores layers with activations of so many bits."""
        return self.name

    def made_from(self, *, plain: bool) -> str:
        """Return the format of the folder that an export is converted from; its own name if it is written at once."""
        return self.name

    def convert(self, folder: Path, out: Path, facts: Mapping[str, object], settings: Any) -> dict[str, object]:
        """Convert an export in the format :meth:`made_from`; return the facts of the report. Raises ExportError."""
        raise NotImplementedError(f"{self.name} is not converted from another format")

    def require_free(self, out: Path) -> None:
        """Raise ExportError unless ``out`` can be written: it is free, empty, or an older export."""
        is_free = not out.exists()
        if out.is_dir():
            # An older export is replaced as a whole; of any other folder, that would destroy a user's files.
            is_free = not any(out.iterdir()) or (out / MANIFEST_FILE).is_file()
        if not is_free:
            raise ExportError(f"out = {str(out.absolute())!r} exists and is not an export. Name another folder")
        require_writable(out, f"out = {str(out)!r}")

    def require_model(self, model: Any) -> None:
        """Raise InputError if the format cannot hold ``model``, which may be on the meta device.

        Also raises it if a package that the writer needs is not installed.
        """

    @property
    def holds_additions(self) -> bool:
        """True if what reads an export attaches its additions, such as a prompt."""
        return self.has_manifest and not self.engine

    def require_additions_fit(self, additions: Collection[str], source: Path) -> None:
        """Raise ExportError if ``source`` has ``additions``, and what reads this format would ignore them."""
        if additions and not self.holds_additions:
            holding = [each.name for each in listed_formats().values() if each.holds_additions]
            raise ExportError(
                f"{source} has additions ({', '.join(additions)}), which programs that read {self.name} would ignore. "
                f"Choose format = {' or '.join(map(repr, holding))}"
            )

    writes_one_file = False
    """True if :meth:`write_file` writes the export, not the writer of folders."""

    def write_file(
        self, jobs: Sequence[Any], source: Any, config: Any, tokenizer: Any, out: Path, encoding: Any
    ) -> dict[str, object]:
        """Write the tensors of ``jobs``, the config and the tokenizer to ``out``, atomically; return counts and sizes.

        Raises ExportError.
        """
        raise NotImplementedError(f"{self.name} is a folder")

    def export_lines(self, out: str, report: Mapping[str, Any], settings: Any) -> list[str] | None:
        """Describe the written export in lines of text; None for those of any folder."""
        return None

    # What loading and measuring an export ask.

    def opens(self, path: Path) -> bool:
        """Return whether ``path`` is a folder whose model :meth:`encoder` computes with, not transformers."""
        return False

    def encoder(self, path: Path, output: str, threads: int | None) -> Callable[[dict[str, Any]], Any]:
        """Return a function of a batch's arrays that returns the array ``output`` of the model in ``path``."""
        raise NotImplementedError(f"{self.name} is loaded by transformers")

    def model_of(self, path: Path) -> Callable[..., Any]:
        """Return an export as a model of torch tensors that computes in :attr:`runtime`. Raises InputError."""
        raise NotImplementedError(f"{self.name} is loaded by transformers")

    # What ``pst-ds verify`` asks.

    def recognises(self, path: Path) -> bool:
        """Return whether ``path`` is an export of this format that has its own :meth:`check`, by its file names."""
        return False

    def check(self, path: Path) -> dict[str, object]:
        """Check the content of an export that is recognised; return its facts. Raises InputError."""
        raise NotImplementedError(f"{self.name} is checked by its manifest")

    def comparison(self, path: Path, run: str) -> Callable[..., Any]:
        """Return the function that compares a recognised export with ``run``. Raises InputError if there is none."""
        raise NotImplementedError(f"{self.name} is compared like any folder")

    def verify_lines(self, export: str, file: Mapping[str, Any]) -> Iterator[str] | None:
        """Yield what :meth:`check` has shown, in lines of text; None for those of any folder."""
        return None

    def inspection_hint(self, path: Path) -> str:
        """Return how to look into a recognised export that ``pst-ds inspect`` cannot describe; "" if it can."""
        return ""


class PackedFolder(StorageFormat):
    """A folder whose sparse matrices are packed as parts, each a tensor of a safetensors file.

    A format has to define ``name``, ``purpose`` and :meth:`layout`.
    """

    omits_pruned = True
    marks_tensors = True

    def spec_of(self, spec: Any, encoding: Any, grid: Grid | None, keep: Callable[[Any], Tensor] | None) -> Any:
        """Return a sparse matrix of floats packed, if that makes it smaller; other tensors quantised to ``grid``."""
        whole = spec.quantised(grid)
        # An embedding may be quantised to another grid than the linear layers: it is stored whole.
        if keep is None or not whole.is_of_floats or whole.grid not in (None, encoding.values):
            return whole
        return whole.packed(self.name, encoding.values, keep(whole))


STORAGE_FORMATS: Registry[type[StorageFormat]] = Registry(
    "pst_ds.storage_formats",
    "storage format",
    {
        "dense": "pst_ds.storage_formats.dense:Dense",
        "bitmask": "pst_ds.storage_formats.bitmask:Bitmask",
        "2:4": "pst_ds.storage_formats.two_of_four:TwoOfFour",
        "csr": "pst_ds.storage_formats.csr:Csr",
        "compressed-tensors": "pst_ds.storage_formats.compressed_tensors:CompressedTensors",
        "compressed-tensors-w8a8": "pst_ds.storage_formats.compressed_tensors_w8a8:CompressedTensorsW8A8",
        "gguf": "pst_ds.storage_formats.gguf:Gguf",
        "onnx": "pst_ds.storage_formats.onnx:Onnx",
    },
)
"""Classes of storage formats by name. Their modules import torch and other heavy packages in methods only, so that
``--help`` stays quick."""


@cache
def _object_of(kind: type[StorageFormat]) -> StorageFormat:
    """Return the object of a class, the same at each call."""
    return kind()


def storage_format(name: str) -> StorageFormat:
    """Return the storage format called ``name``. Raises InputError if there is none."""
    return _object_of(STORAGE_FORMATS.get(name))  # type: ignore[arg-type]


def storage_formats() -> list[StorageFormat]:
    """Return all storage formats, those of other packages last.

    One that cannot be imported is omitted with a warning: it must not prevent work with the others.
    """
    formats: list[StorageFormat] = []
    for name in STORAGE_FORMATS.names:
        try:
            formats.append(storage_format(name))
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
    return formats


def listed_formats() -> dict[str, StorageFormat]:
    """Return the formats that a user may choose, by name."""
    return {each.name: each for each in storage_formats() if each.is_listed}


def _quantising_formats() -> list[str]:
    """Return the names of the formats with quantised values that ``pst_ds.hf`` loads, for messages."""
    return [each.name for each in storage_formats() if each.quantises and each.loads_with_pst_ds]


def folder_formats() -> list[str]:
    """Return the names of formats whose folders ``pst_ds.hf`` loads."""
    return [each.name for each in storage_formats() if each.loads_with_pst_ds]


def format_recognising(path: Path) -> StorageFormat | None:
    """Return the format with its own check that ``path`` is an export of; None for a folder with a manifest."""
    return next((each for each in storage_formats() if each.recognises(path)), None)


def format_opening(path: Path) -> StorageFormat | None:
    """Return the format that :meth:`~StorageFormat.opens` the model in ``path``; None if transformers loads it."""
    return next((each for each in storage_formats() if each.opens(path)), None)


def packed_format(packing: str, grid: Grid | None = None) -> PackedFormat:
    """Return the layout of a format with values quantised to ``grid``, or in the model's dtype.

    Raises ValueError for an unsupported combination: dense without quantisation, or csr with it.
    """
    layout = None
    if packing in STORAGE_FORMATS.names:
        layout = storage_format(packing).layout(grid)
    if layout is None:
        packed = [each.name for each in storage_formats() if each.omits_pruned and each.has_manifest]
        raise ValueError(f"packed formats are {', '.join(packed)}, not {packing}")
    return layout


def form_of(packing: str, parts: Mapping[str, Part], columns: int) -> PackedFormat:
    """Return the layout of a weight in a folder of format ``packing``; see :meth:`StorageFormat.layout_of_parts`.

    Raises FormatError if the scales fit no quantisation, and ValueError for an unknown ``packing``.
    """
    if packing not in STORAGE_FORMATS.names:
        return packed_format(packing)  # raises ValueError, with the known names
    return storage_format(packing).layout_of_parts(parts, columns)


DENSE_FORMAT = "dense"
"""Format of tensors that are stored whole: floats unchanged, quantised values with their scales."""
