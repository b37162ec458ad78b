"""The storage of an export's weights: packing of sparse layers, quantisation of linear layers and embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pst_ds.core.packings import (
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_W8A8,
    DENSE,
    FOR_COMPRESSED_TENSORS,
    GGUF,
    PACKINGS,
    QUANTIZED_PACKINGS,
    WHOLE_ROW,
)
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import InputError

QUANT_METHOD = "pst_ds"
PLAIN_VERSION, QUANTIZED_VERSION, COMPRESSED_VERSION = 1, 2, 3
"""``format_version`` of folders with values in the model's dtype, with quantised values, and with both if at least one
bitmask is compressed."""
PLAIN_STEM = "model"
"""Stem that plain transformers looks for; files that it cannot read never have it."""
_STEMS = {
    COMPRESSED_TENSORS: PLAIN_STEM,
    COMPRESSED_TENSORS_W8A8: PLAIN_STEM,
    DENSE: "pst_dense",
    "bitmask": "pst_bitmask",
    "2:4": "pst_2of4",
    "csr": "pst_csr",
}
STEMS = tuple(_STEMS.values())
"""Stems of the weight files of exports."""
_KEYS = ("values", "group"), ("embeddings", "embedding_group")
"""Keys of the quantisation of linear layers and of embeddings: "int8" or "int4", and weights per scale or "row"."""


class ExportError(InputError):
    """An export that cannot be made, or that does not match its manifest."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The storage of all tensors of an export. Raises ExportError for an unsupported combination."""

    packing: str = DENSE
    """Format of the linear layers' weights; "dense" stores pruned weights as well."""
    values: Grid | None = None
    """Quantisation of linear layers inside the transformer blocks; None leaves them unchanged."""
    embeddings: Grid | None = None
    """Quantisation of embedding tables and of an untied output layer."""

    def __post_init__(self) -> None:
        if self.packing in FOR_COMPRESSED_TENSORS:
            if self.values is None or self.embeddings is not None:
                raise ExportError(
                    f'format = "{COMPRESSED_TENSORS}" holds int8 or int4 linear layers only. Set values = "int8" or '
                    '"int4" only'
                )
            if self.packing == COMPRESSED_TENSORS_W8A8 and self.values != Grid(8):
                raise ExportError(
                    f"{COMPRESSED_TENSORS} with int8 activations needs int8 weights with per-row scales, got "
                    f'{self.values}. Set values = "int8" and group = "row"'
                )
        elif self.packing not in (DENSE, GGUF, *PACKINGS):
            raise ExportError(f"format must be one of {DENSE}, {', '.join(PACKINGS)}, got {self.packing!r}")
        elif self.is_quantized and self.packing not in (GGUF, *QUANTIZED_PACKINGS):
            raise ExportError(
                f"{self.packing} holds values of the model's dtype only. For int8 and int4 choose "
                f"{', '.join(QUANTIZED_PACKINGS)}"
            )

    @property
    def is_quantized(self) -> bool:
        return self.values is not None or self.embeddings is not None

    @property
    def is_plain(self) -> bool:
        """True if the export is an ordinary model folder."""
        return self.packing == DENSE and not self.is_quantized

    @property
    def needs_pst_ds(self) -> bool:
        """True if loading the export needs ``import pst_ds.hf``."""
        return not self.is_plain and self.packing not in FOR_COMPRESSED_TENSORS

    @property
    def stem(self) -> str:
        """Stem of the weight files' names."""
        return PLAIN_STEM if self.is_plain else _STEMS[self.packing]

    def weights_file(self, num_files: int) -> str:
        """Return the name of the only weight file, or of the index of several files."""
        return f"{self.stem}.safetensors" + (".index.json" if num_files > 1 else "")

    def __str__(self) -> str:
        grids = (("values", self.values), ("embeddings", self.embeddings))
        return "; ".join([self.packing, *(f"{what} in {grid}" for what, grid in grids if grid)])

    def facts(self) -> dict[str, str | int]:
        """Return the quantisation as a manifest and a config.json have it; empty if nothing is quantised."""
        facts: dict[str, str | int] = {}
        for grid, key, group_key in ((self.values, *_KEYS[0]), (self.embeddings, *_KEYS[1])):
            if grid is not None:
                facts |= {key: grid.values, group_key: grid.group or WHOLE_ROW}
        return facts

    @property
    def format_version(self) -> int:
        return QUANTIZED_VERSION if self.is_quantized else PLAIN_VERSION

    def quantization_config(
        self, num_files: int, unquantised: Sequence[str] = (), *, compressed: bool = False
    ) -> dict[str, object] | None:
        """Return the entry "quantization_config" of config.json, or None for an ordinary folder.

        Args:
            num_files: number of weight files.
            unquantised: names of linear layers that are not quantised, which compressed-tensors needs to know.
            compressed: whether a bitmask is compressed.
        """
        if self.is_plain:
            return None
        if self.packing in FOR_COMPRESSED_TENSORS:
            assert self.values is not None
            return _compressed_tensors_config(self.packing, self.values, unquantised)
        return {
            "quant_method": QUANT_METHOD,
            "format": self.packing,
            "format_version": COMPRESSED_VERSION if compressed else self.format_version,
            **self.facts(),
            "weights_file": self.weights_file(num_files),
        }


def _compressed_tensors_config(packing: str, grid: Grid, unquantised: Sequence[str]) -> dict[str, object]:
    """Describe quantised nn.Linear weights, and int8 activations, in the terms of compressed-tensors."""
    symmetric = {"type": "int", "symmetric": True}
    strategy = {"strategy": "channel" if grid.group is None else "group", "group_size": grid.group}
    inputs = {"num_bits": 8, **symmetric, "strategy": "token", "group_size": None, "dynamic": True}
    quantises_inputs = packing == COMPRESSED_TENSORS_W8A8
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": grid.bits, **symmetric, **strategy, "dynamic": False},
        "input_activations": inputs if quantises_inputs else None,
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized" if quantises_inputs else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(unquantised),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def encoding_of(packing: object, facts: Mapping[str, object]) -> Encoding:
    """Return the encoding for the format ``packing`` and the :meth:`Encoding.facts` in a manifest or config.json.

    Raises ValueError for unknown formats, values and groups.
    """
    grids = []
    for key, group_key in _KEYS:
        values, group = facts.get(key), facts.get(group_key)
        if (values is None) != (group is None):
            raise ValueError(f"{key} and {group_key} must be given together, got {values!r} and {group!r}")
        grids.append(None if values is None else grid_of(values, group))
    return Encoding(str(packing), *grids)


def encoding_of_config(settings: Mapping[str, object]) -> tuple[Encoding, str]:
    """Return the encoding and the weight file, or index of several, that our "quantization_config" names.

    Raises ExportError for folders that this version does not read, and for a file of another name or folder.
    """
    packing, version, index = (settings.get(key) for key in ("format", "format_version", "weights_file"))
    unread = f"packed as {packing!r}, version {version!r}, which this version of pst-ds does not read"
    try:
        encoding = encoding_of(packing, settings)
    except ValueError as error:
        raise ExportError(f"{unread}: {error}") from None
    versions = (encoding.format_version, *([COMPRESSED_VERSION] if packing == "bitmask" else []))
    if encoding.is_plain or encoding.packing in (GGUF, *FOR_COMPRESSED_TENSORS) or version not in versions:
        raise ExportError(f"{unread}. Use a newer pst-ds, or export the model again")
    if str(index) not in [encoding.weights_file(count) for count in (1, 2)]:
        raise ExportError(
            f"weights_file = {str(index)[:80]!r} is not a weight file of a folder packed as {packing}. Export again"
        )
    return encoding, str(index)
