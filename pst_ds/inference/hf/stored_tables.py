"""Embedding tables that a folder holds quantised, read for decoders and graphs that keep them so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pst_ds.formats import QuantizedFormat
from pst_ds.inference.hf.layers import named_groups
from pst_ds.inference.hf.weight_files import form_of_group, packed_groups, read_headers


@dataclass(frozen=True, slots=True)
class StoredTable:
    """An embedding as a folder holds it."""

    codes: Tensor
    """(rows, width) int8, or (rows, ceil(width / 2)) uint8 with two codes of 4 bits in a byte."""
    scales: Tensor
    """(rows, groups) bf16."""
    bits: int
    group: int
    """Columns that share a scale; 0: all of a row."""


def stored_tables(folder: Path, model: nn.Module) -> dict[str, StoredTable]:
    """Return the embeddings that ``folder`` holds as codes, by name in ``model``, which was loaded from it."""
    headers = read_headers(str(path) for path in folder.glob("*.safetensors"))
    groups = named_groups(model, packed_groups(headers, "bitmask"))
    found = {}
    for name, module in model.named_modules():
        group = groups.get(name, {})
        if isinstance(module, nn.Embedding) and "codes" in group:
            form = form_of_group(name, "bitmask", group, module.embedding_dim)
            assert isinstance(form, QuantizedFormat)
            grid = form.grid
            found[name] = StoredTable(group["codes"].read(), group["scales"].read(), grid.bits, grid.group or 0)
    return found
