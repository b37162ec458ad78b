"""The "quantization_config" of a packed folder, and what a user may ask for when it is loaded."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from pst_ds.export.encoding import PLAIN_VERSION, QUANT_METHOD, QUANTIZED_VERSION, Encoding, encoding_of
from pst_ds.inference.hf.weight_files import PackedFolderError

LoadAs = Literal["auto", "dense", "sparse"]
_GRID_KEYS = ("values", "group", "embeddings", "embedding_group")
_FOLDER_KEYS = ("format", "format_version", *_GRID_KEYS, "weights_file")
# transformers 5.0 joins this name to the folder as it is, so nothing here may lead out of it
_WEIGHTS_FILE = re.compile(r"pst_[A-Za-z0-9_-]+\.safetensors(\.index\.json)?")


class PackedWeightsConfig(QuantizationConfigMixin):
    """The format of packed weights, and the way to load them.

    ``load_as`` is for the user: ``from_pretrained(DIR, quantization_config=PackedWeightsConfig(load_as="dense"))``.

    "dense"     ordinary nn.Linear and Conv1D, equal to the dense export: for training, saving and every other tool
    "sparse"    the weights stay packed in :class:`SparseLinear`: smaller in memory, for inference.
                A model that looks at a projection's weight in its forward pass, as T5 does, unpacks it each time:
                right but slow, so load such a model dense
    "auto"      "sparse" for bitmask on the CPU, where that is the faster one, else "dense"; so are codes of int8 and
                int4, which have no fast kernel yet

    The rest is read from config.json: ``format``, ``format_version``, ``weights_file``, and of what is on a grid
    ``values``, ``group``, ``embeddings``, ``embedding_group``.
    """

    def __init__(
        self,
        load_as: LoadAs = "auto",
        *,
        format: str | None = None,
        format_version: int = PLAIN_VERSION,
        weights_file: str | None = None,
        values: str | None = None,
        group: int | str | None = None,
        embeddings: str | None = None,
        embedding_group: int | str | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.load_as, self.format = load_as, format
        self.format_version, self.weights_file = format_version, weights_file
        self.values, self.group = values, group
        self.embeddings, self.embedding_group = embeddings, embedding_group
        if load_as not in get_args(LoadAs):
            raise PackedFolderError(f"load_as is 'auto', 'dense' or 'sparse', got {load_as!r}")
        if unknown:
            raise PackedFolderError(_unknown_keys(unknown))

    @property
    def dequantize(self) -> bool:
        """Asked by transformers: whether nothing of the packing is left in the loaded model."""
        return self.load_as == "dense"

    def encoding(self) -> Encoding:
        """Return how the folder's weights are stored. Raises PackedFolderError for what there is not."""
        try:
            encoding = encoding_of(self.format, {key: getattr(self, key) for key in _GRID_KEYS})
        except ValueError as error:
            raise PackedFolderError(f"config.json: quantization_config: {error}") from None
        if encoding.is_plain:
            raise PackedFolderError("config.json: quantization_config: a dense format needs values or embeddings")
        return encoding

    def check_folder(self) -> None:
        """Raise PackedFolderError unless these are the settings of a folder that this version reads."""
        if self.format_version not in (PLAIN_VERSION, QUANTIZED_VERSION):
            raise PackedFolderError(
                f"config.json: quantization_config.format_version is {self.format_version!r}, and this pst-ds reads "
                f"versions {PLAIN_VERSION} and {QUANTIZED_VERSION}. Load the folder with a newer pst-ds, or export it "
                "again."
            )
        if self.encoding().is_quantized != (self.format_version == QUANTIZED_VERSION):
            raise PackedFolderError(
                f"config.json: quantization_config.format_version {self.format_version} does not go with values "
                f"{self.values!r} and embeddings {self.embeddings!r}. Export the folder again."
            )
        if not isinstance(self.weights_file, str) or not _WEIGHTS_FILE.fullmatch(self.weights_file):
            raise PackedFolderError(
                "config.json: quantization_config.weights_file must be a name pst_*.safetensors or "
                f"pst_*.safetensors.index.json in the same folder, got {self.weights_file!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json; ``load_as`` is no property of a folder."""
        table = {key: getattr(self, key) for key in ("quant_method", *_FOLDER_KEYS)}
        return {key: value for key, value in table.items() if value is not None or key not in _GRID_KEYS}


def _unknown_keys(unknown: dict[str, object]) -> str:
    key = next(iter(unknown))
    known = ("load_as", *_FOLDER_KEYS)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    return f"quantization_config of pst_ds: unknown key {key!r}. {hint}"
