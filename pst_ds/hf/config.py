"""The "quantization_config" of a packed folder, and how to load it."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, get_args

from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from pst_ds.hf.weight_files import PackedFolderError
from pst_ds.third_party import PatchHolder, patched
from pst_ds.writing.encoding import PLAIN_VERSION, QUANT_METHOD

LoadAs = Literal["auto", "dense", "sparse"]
_GRID_KEYS = ("values", "group", "embeddings", "embedding_group")
_FOLDER_KEYS = ("format", "format_version", *_GRID_KEYS, "weights_file")


class PackedWeightsConfig(QuantizationConfigMixin):
    """The format of packed weights, and how to load them.

    ``load_as`` is set by the user: ``from_pretrained(DIR, quantization_config=PackedWeightsConfig(load_as="dense"))``.

    * "dense": ordinary nn.Linear and Conv1D, equal to the dense export, for training, saving and other tools.
    * "sparse": weights stay packed in :class:`SparseLinear`, smaller in memory, for inference. Models that read a
      projection's ``weight`` in their forward pass, such as T5, unpack it each time; load them dense.
    * "auto": "sparse" for float values in bitmask on the CPU, where it is faster, else "dense".

    The other settings are read from config.json.
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
        self.load_as = load_as
        self.format = format
        self.format_version = format_version
        self.weights_file = weights_file
        self.values = values
        self.group = group
        self.embeddings = embeddings
        self.embedding_group = embedding_group
        # A user's config has no format. That of a loaded model is read from its folder, and needs no patch.
        self._holder: _KeepsLoadAs | None = None
        if format is None:
            self._holder = _KeepsLoadAs()
        if load_as not in get_args(LoadAs):
            raise PackedFolderError(f"load_as is 'auto', 'dense' or 'sparse', got {load_as!r}")
        # config.json may come from a newer version: ignoring what it adds could load other weights.
        if unknown:
            key = next(iter(unknown))
            known = ("load_as", *_FOLDER_KEYS)
            raise PackedFolderError(f"quantization_config of pst_ds: unknown key {key!r}. Known: {', '.join(known)}.")

    @property
    def dequantize(self) -> bool:
        """True if the loaded model is dense; transformers reads it."""
        return self.load_as == "dense"

    def to_dict(self) -> dict[str, object]:
        """Return the keys of config.json, which has no ``load_as``."""
        table: dict[str, object] = {}
        for key in ("quant_method", *_FOLDER_KEYS):
            value = getattr(self, key)
            # A folder of float weights has no keys about quantised values, not even with null.
            if value is not None or key not in _GRID_KEYS:
                table[key] = value
        return table


class _KeepsLoadAs(PatchHolder):
    """Makes ``from_pretrained`` keep ``load_as`` of a config that is passed to it, while the config exists.

    transformers keeps only the loading settings of its config classes, and discards the user's config otherwise.
    """

    @classmethod
    def change(cls) -> AbstractContextManager[object]:
        def keeping(merge: Callable[..., object]) -> Callable[..., object]:
            return staticmethod(_with_load_as(merge))

        return patched(auto.AutoHfQuantizer, "merge_quantization_configs", keeping)


def _with_load_as(merge: Callable[..., object]) -> Callable[..., object]:
    """Wrap ``merge_quantization_configs`` of transformers so that a PackedWeightsConfig keeps ``load_as``."""

    @functools.wraps(merge)
    def merged(quantization_config: object, quantization_config_from_args: object = None) -> object:
        if isinstance(quantization_config_from_args, PackedWeightsConfig):
            # With None, transformers does not warn that it ignores the argument.
            config = merge(quantization_config, None)
            if isinstance(config, PackedWeightsConfig):
                config.load_as = quantization_config_from_args.load_as
                return config
        return merge(quantization_config, quantization_config_from_args)

    return merged
