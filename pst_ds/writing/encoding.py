"""The storage of an export's weights: packing of sparse layers, quantisation of linear layers and embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pst_ds.core.packings import DENSE, WHOLE_ROW
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import ExportError as ExportError
from pst_ds.storage_format import (
    COMPRESSED_VERSION,
    PLAIN_STEM,
    PLAIN_VERSION,
    QUANTIZED_VERSION,
    STORAGE_FORMATS,
    StorageFormat,
    folder_formats,
    storage_format,
)
from pst_ds.storage_format import QUANT_METHOD as QUANT_METHOD

_KEYS = (("values", "group"), ("embeddings", "embedding_group"))
"""Keys of the quantisation of linear layers and of embeddings: "int8" or "int4", and weights per scale or "row"."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The storage of all tensors of an export. Raises ExportError for an unsupported combination."""

    packing: str = DENSE
    """Name of the storage format; "dense" stores pruned weights as well."""
    values: Grid | None = None
    """Quantisation of linear layers inside the transformer blocks; None leaves them unchanged."""
    embeddings: Grid | None = None
    """Quantisation of embedding tables and of an untied output layer."""

    def __post_init__(self) -> None:
        known = STORAGE_FORMATS.names
        # ONNX has neither: its files are converted from those of another format
        if self.packing not in known or not (self.storage.has_manifest or self.storage.writes_one_file):
            raise ExportError(f"format must be one of {', '.join(folder_formats())}, got {self.packing!r}")
        if problem := self.storage.problem(self.values, self.embeddings):
            raise ExportError(problem)

    @property
    def storage(self) -> StorageFormat:
        """The format's class, which knows how tensors are stored."""
        return storage_format(self.packing)

    @property
    def is_quantized(self) -> bool:
        return self.values is not None or self.embeddings is not None

    @property
    def is_plain(self) -> bool:
        """True if the export is an ordinary model folder."""
        return self.storage.is_plain(is_quantized=self.is_quantized)

    @property
    def needs_pst_ds(self) -> bool:
        """True if loading the export needs ``import pst_ds.hf``."""
        return not self.is_plain and self.storage.loads_with_pst_ds

    @property
    def stem(self) -> str:
        """Stem of the weight files' names."""
        if self.is_plain:
            return PLAIN_STEM
        return self.storage.stem

    def weights_file(self, num_files: int) -> str:
        """Return the name of the only weight file, or of the index of several files."""
        name = f"{self.stem}.safetensors"
        if num_files > 1:
            return f"{name}.index.json"
        return name

    def __str__(self) -> str:
        described = [self.packing]
        if self.values:
            described.append(f"values in {self.values}")
        if self.embeddings:
            described.append(f"embeddings in {self.embeddings}")
        return "; ".join(described)

    def facts(self) -> dict[str, str | int]:
        """Return the quantisation as a manifest and a config.json have it; empty if nothing is quantised."""
        facts: dict[str, str | int] = {}
        for grid, (key, group_key) in zip((self.values, self.embeddings), _KEYS, strict=True):
            if grid is not None:
                facts |= {key: grid.values, group_key: grid.group or WHOLE_ROW}
        return facts

    @property
    def format_version(self) -> int:
        """Version in config.json, which older versions of pst-ds refuse if they cannot read the folder."""
        if self.is_quantized:
            return QUANTIZED_VERSION
        return PLAIN_VERSION

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
        return self.storage.config_entry(self, num_files, unquantised, compressed=compressed)


def encoding_of(packing: object, facts: Mapping[str, object]) -> Encoding:
    """Return the encoding for the format ``packing`` and the :meth:`Encoding.facts` in a manifest or config.json.

    Raises ValueError for unknown formats, values and groups.
    """
    grids: list[Grid | None] = []
    for key, group_key in _KEYS:
        values = facts.get(key)
        group = facts.get(group_key)
        # a default for a missing group could read the scales of another quantisation
        if (values is None) != (group is None):
            raise ValueError(f"{key} and {group_key} must be given together, got {values!r} and {group!r}")
        grid: Grid | None = None
        if values is not None:
            grid = grid_of(values, group)
        grids.append(grid)
    linear, embeddings = grids
    return Encoding(packing=str(packing), values=linear, embeddings=embeddings)


def encoding_of_config(settings: Mapping[str, object]) -> tuple[Encoding, str]:
    """Return the encoding and the weight file, or index of several, that our "quantization_config" names.

    Raises ExportError for folders that this version does not read, and for a file of another name or folder.
    """
    packing = settings.get("format")
    version = settings.get("format_version")
    index = settings.get("weights_file")
    unread = f"packed as {packing!r}, version {version!r}, which this version of pst-ds does not read"
    try:
        encoding = encoding_of(packing, settings)
    except ValueError as error:
        raise ExportError(f"{unread}: {error}") from None
    versions = [encoding.format_version]
    # a separate version, because readers before it take the bytes of a compressed bitmask for bits
    if encoding.storage.compresses_bitmask:
        versions.append(COMPRESSED_VERSION)
    if not encoding.needs_pst_ds or version not in versions:
        raise ExportError(f"{unread}. Use a newer pst-ds, or export the model again")
    # only these two names, so that a config cannot point to a file outside its folder
    if str(index) not in (encoding.weights_file(1), encoding.weights_file(2)):
        raise ExportError(
            f"weights_file = {str(index)[:80]!r} is not a weight file of a folder packed as {packing}. Export again"
        )
    return encoding, str(index)
