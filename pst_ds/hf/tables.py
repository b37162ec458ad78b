"""Quantised embedding tables of a folder: dense in a loaded model, or as stored for decoders and ONNX graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds.formats import QuantizedFormat
from pst_ds.hf.weight_files import (
    Groups,
    StoredTensor,
    form_of_group,
    loaded_dtype,
    named_groups,
    packed_groups,
    read_headers,
    reread_parts,
)
from pst_ds.storage_format import DENSE_FORMAT


class LoadingTable(nn.Module):
    """Placeholder for an embedding, or an output layer tied to one, while transformers loads the model.

    The loader fills ``codes``, ``scales`` and ``shape``, and ties ``weight``, which is on the meta device and not in
    the state dict; :func:`restore_tables` replaces it by the dense table.
    """

    codes: Tensor
    scales: Tensor
    shape: Tensor

    def __init__(self, replaced: nn.Module, shape: tuple[int, int], form: QuantizedFormat):
        super().__init__()
        self.replaced = [replaced]  # in a list, since nn.Module would register it as a submodule
        self.form = form
        self.table_shape = shape
        self.dtype = replaced.get_parameter("weight").dtype
        for name, (dtype, dims) in form.parts(shape, 0, self.dtype).items():
            self.register_buffer(name, torch.empty(dims, dtype=dtype, device="meta"))
        # An output layer may have a bias, which the loader fills as usual.
        for name, param in replaced.named_parameters(recurse=False):
            if name != "weight":
                self.register_parameter(name, param)
        self.weight = nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"), requires_grad=False)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # transformers would look for the weight in the files, and report it as missing.
        destination.pop(f"{prefix}weight", None)

    def dense(self, name: str, group: Mapping[str, StoredTensor]) -> nn.Parameter:
        """Check the parts, and return the table on the device of its codes. Raises FormatError."""
        self.dtype = loaded_dtype(self.scales, self.dtype)
        reread_parts(self, self.form, group)
        parts = {part: getattr(self, part) for part in self.form.part_names}
        self.form.check(name, parts, self.table_shape)
        return nn.Parameter(self.form.unpack(parts, self.dtype).to(self.codes.device))


def restore_tables(model: PreTrainedModel, groups: Groups) -> None:
    """Replace the placeholders by the original modules, with dense weights and the model's ties. Raises FormatError."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    # A list, because the loop replaces modules while it visits them.
    for name, table in list(model.named_modules()):
        if not isinstance(table, LoadingTable):
            continue
        weight = table.dense(name, groups[name])
        (module,) = table.replaced
        for other, param in table.named_parameters(recurse=False):
            if other != "weight":
                setattr(module, other, param)
        module.weight = weight
        model.set_submodule(name, module.train(table.training))
        # transformers has tied the placeholder's weight; the tied modules need the new one.
        for tied in _tied_to(f"{name}.weight", ties):
            owner, _, attribute = tied.rpartition(".")
            setattr(model.get_submodule(owner), attribute, weight)


def _tied_to(weight: str, ties: Mapping[str, str]) -> list[str]:
    """Return the parameters that are tied to ``weight``. ``ties``: the source of each tied parameter."""
    tied: list[str] = []
    for target, source in ties.items():
        if source == weight:
            tied.append(target)
        elif target == weight:
            tied.append(source)
    return tied


@dataclass(frozen=True, slots=True)
class StoredTable:
    """An embedding as a folder stores it."""

    codes: Tensor
    """(rows, width) int8, or (rows, ceil(width / 2)) uint8, two 4-bit values per byte."""
    scales: Tensor
    """(rows, groups) bf16."""
    bits: int
    group: int
    """Columns that share a scale; 0 for per-row scales."""


def stored_tables(folder: Path, model: nn.Module) -> dict[str, StoredTable]:
    """Return the quantised embeddings of ``folder``, by name in ``model``, which was loaded from it."""
    headers = read_headers(str(path) for path in folder.glob("*.safetensors"))
    modules = dict(model.named_modules())
    tables: dict[str, StoredTable] = {}
    for name, group in named_groups(model, packed_groups(headers, DENSE_FORMAT)).items():
        module = modules.get(name)
        # Linear layers of the dense format have codes too.
        if isinstance(module, nn.Embedding) and "codes" in group:
            form = form_of_group(name, DENSE_FORMAT, group, module.embedding_dim)
            assert isinstance(form, QuantizedFormat)
            tables[name] = StoredTable(
                codes=group["codes"].read(),
                scales=group["scales"].read(),
                bits=form.grid.bits,
                group=form.grid.group or 0,
            )
    return tables
