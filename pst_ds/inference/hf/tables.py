"""Placeholders for quantised embedding tables while transformers loads a model; dense after they are checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds.formats import QuantizedFormat
from pst_ds.inference.hf.weight_files import (
    StoredTensor,
    loaded_dtype,
    reread_parts,
)


class LoadingTable(nn.Module):
    """Placeholder for an embedding, or an output layer that is tied to one, until its codes are read.

    transformers' loader fills ``codes``, ``scales`` and ``shape``, and ties ``weight``, which is on the meta device and
    in no state dict, to what the model ties the table to; :func:`end_tables` puts the table into all of these places.
    """

    codes: Tensor
    scales: Tensor
    shape: Tensor

    def __init__(self, replaced: nn.Module, shape: tuple[int, int], form: QuantizedFormat):
        super().__init__()
        self.replaced, self.form, self.table_shape = [replaced], form, shape  # a list hides it from nn.Module
        self.dtype = replaced.get_parameter("weight").dtype
        for name, (dtype, dims) in form.parts(shape, 0, self.dtype).items():
            self.register_buffer(name, torch.empty(dims, dtype=dtype, device="meta"))
        for name, param in replaced.named_parameters(recurse=False):
            if name != "weight":
                self.register_parameter(name, param)
        self.weight = nn.Parameter(torch.empty(shape, dtype=self.dtype, device="meta"), requires_grad=False)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)

    def dense(self, name: str, group: Mapping[str, StoredTensor]) -> nn.Parameter:
        """Check the parts, and return the table on the device of its codes. Raises FormatError."""
        self.dtype = loaded_dtype(self)
        reread_parts(self, self.form, group)
        parts = {part: getattr(self, part) for part in self.form.part_names}
        self.form.check(name, parts, self.table_shape)
        return nn.Parameter(self.form.unpack(parts, self.dtype).to(self.codes.device))


def loading_tables(model: nn.Module) -> dict[str, LoadingTable]:
    """Return the placeholders of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoadingTable)}


def end_tables(model: PreTrainedModel, groups: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Replace the placeholders by the original modules, with dense weights and the model's ties.

    Raises FormatError, naming the table, for invalid parts.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, table in loading_tables(model).items():
        weight = table.dense(name, groups[name])
        (module,) = table.replaced
        for other, param in table.named_parameters(recurse=False):
            if other != "weight":
                setattr(module, other, param)
        module.weight = weight
        module.train(table.training)
        model.set_submodule(name, module)
        for pair in ties.items():
            if f"{name}.weight" in pair:
                for tied in set(pair) - {f"{name}.weight"}:
                    owner, _, last = tied.rpartition(".")
                    setattr(model.get_submodule(owner), last, weight)
