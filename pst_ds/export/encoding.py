"""How an export stores its weights: the packing of zeros, and the grids that values and embeddings are rounded to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

QUANT_METHOD = "pst_ds"
PLAIN_VERSION, QUANTIZED_VERSION = 1, 2
"""Values of ``format_version``: of folders whose values have the model's dtype, and of those with codes and scales."""
PLAIN_STEM = "model"
"""What plain transformers looks for; weights that it cannot read are never called so."""
_STEMS = {
    COMPRESSED_TENSORS: PLAIN_STEM,
    COMPRESSED_TENSORS_W8A8: PLAIN_STEM,
    DENSE: "pst_dense",
    "bitmask": "pst_bitmask",
    "2:4": "pst_2of4",
    "csr": "pst_csr",
}
STEMS = tuple(_STEMS.values())
"""Beginnings of the names of an export's weight files."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How all tensors of an export are stored. Raises ValueError for what there is not."""

    packing: str = DENSE
    """What the zeros of linear layers become; "dense" stores them."""
    values: Grid | None = None
    """The grid of the weights of linear layers inside the blocks; None leaves them as they are."""
    embeddings: Grid | None = None
    """The grid of embedding tables, and of an output layer that is none of them."""

    def __post_init__(self) -> None:
        if self.packing in FOR_COMPRESSED_TENSORS:
            if self.values is None or self.embeddings is not None:
                raise ValueError(f"{COMPRESSED_TENSORS} holds linear layers of int8 or int4 values, and no embeddings")
            if self.packing == COMPRESSED_TENSORS_W8A8 and self.values != Grid(8):
                raise ValueError(
                    f"{COMPRESSED_TENSORS} with inputs of 8 bits has int8 values with a scale a row, not {self.values}"
                )
            return
        if self.packing == GGUF:
            return
        if self.packing not in (DENSE, *PACKINGS):
            raise ValueError(f"format is one of {DENSE}, {', '.join(PACKINGS)}, got {self.packing!r}")
        if self.is_quantized and self.packing not in QUANTIZED_PACKINGS:
            raise ValueError(
                f"{self.packing} holds values of the model's dtype only; int8 and int4 are for "
                f"{', '.join(QUANTIZED_PACKINGS)}"
            )

    @property
    def is_quantized(self) -> bool:
        return self.values is not None or self.embeddings is not None

    @property
    def is_plain(self) -> bool:
        """Whether the export is an ordinary model folder, which needs no pst_ds.hf."""
        return self.packing == DENSE and not self.is_quantized

    @property
    def is_ours(self) -> bool:
        """Whether loading the export takes pst_ds.hf."""
        return not self.is_plain and self.packing not in FOR_COMPRESSED_TENSORS

    @property
    def stem(self) -> str:
        """Beginning of the names of the weight files."""
        return PLAIN_STEM if self.is_plain else _STEMS[self.packing]

    def weights_file(self, num_files: int) -> str:
        """Name of the one weight file, or of the index of several."""
        return f"{self.stem}.safetensors" + (".index.json" if num_files > 1 else "")

    def __str__(self) -> str:
        grids = (("values", self.values), ("embeddings", self.embeddings))
        return "; ".join([self.packing, *(f"{what} in {grid}" for what, grid in grids if grid)])

    def facts(self) -> dict[str, Any]:
        """Return what a manifest and a config say of the grids; nothing without any."""
        facts: dict[str, Any] = {}
        if self.values is not None:
            facts |= {"values": self.values.values, "group": self.values.group or WHOLE_ROW}
        if self.embeddings is not None:
            facts |= {"embeddings": self.embeddings.values, "embedding_group": self.embeddings.group or WHOLE_ROW}
        return facts

    def quantization_config(self, num_files: int, left_alone: Sequence[str] = ()) -> dict[str, Any] | None:
        """Return the entry of config.json by which transformers finds the weights; None where it needs none.

        ``left_alone``: names of the linear layers that are not rounded, which compressed-tensors is to be told.
        """
        if self.is_plain:
            return None
        if self.packing in FOR_COMPRESSED_TENSORS:
            assert self.values is not None
            return _compressed_tensors_config(self.packing, self.values, left_alone)
        version = QUANTIZED_VERSION if self.is_quantized else PLAIN_VERSION
        name = self.weights_file(num_files)
        table = {"quant_method": QUANT_METHOD, "format": self.packing, "format_version": version}
        return table | self.facts() | {"weights_file": name}


def _compressed_tensors_config(packing: str, grid: Grid, left_alone: Sequence[str]) -> dict[str, Any]:
    """The library's own description of rounded weights, nn.Linear by nn.Linear, and of inputs where they are."""
    of_codes = {"type": "int", "symmetric": True}
    strategy = {"strategy": "channel" if grid.group is None else "group", "group_size": grid.group}
    weights = {"num_bits": grid.bits, **of_codes, **strategy, "dynamic": False}
    inputs = {"num_bits": 8, **of_codes, "strategy": "token", "group_size": None, "dynamic": True}
    rounds_inputs = packing == COMPRESSED_TENSORS_W8A8
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if rounds_inputs else None,
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized" if rounds_inputs else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(left_alone),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def encoding_of(packing: object, facts: Mapping[str, Any]) -> Encoding:
    """Return the encoding that a manifest or config says; ``facts`` has the keys of :meth:`Encoding.facts`, or not.

    Raises ValueError for unknown packings, values and groups.
    """
    grids = []
    for values, group in (("values", "group"), ("embeddings", "embedding_group")):
        said = facts.get(values), facts.get(group)
        if (said[0] is None) != (said[1] is None):
            raise ValueError(f"{values} and {group} go together, got {said[0]!r} and {said[1]!r}")
        grids.append(None if said[0] is None else grid_of(said[0], said[1]))
    return Encoding(str(packing), *grids)
