"""Stacks of experts of a transformers model become sparse ones, and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pst_ds.core.layout import WeightLayout
from pst_ds.inference.hf.weight_files import StoredTensor, form_of_group, kept_values
from pst_ds.inference.runtime.experts import SparseExperts
from pst_ds.nn import experts as registered
from pst_ds.nn.model_structure import is_experts, stack_layouts


def expert_stacks(model: nn.Module) -> dict[str, WeightLayout]:
    """Layouts of the stacks of experts of ``model`` that other code may compute, by the names of their Parameters."""
    found: dict[str, WeightLayout] = {}
    for owner, module in model.named_modules():
        if is_experts(module):
            try:
                layouts = stack_layouts(module)
            except ValueError:  # of a form of its own: loaded as it is
                continue
            found |= {f"{owner}.{attribute}": layout for attribute, layout in layouts.items()}
    return found


def put_sparse_experts(
    model: nn.Module, name: str, layout: WeightLayout, group: Mapping[str, StoredTensor], packing: str
) -> nn.Module:
    """Put an empty SparseExperts in the place of the stack ``name``; return the experts module that holds it.

    ``group``: headers of the parts. Raises PackedFolderError for parts that do not fit the stack.
    """
    owner, _, attribute = name.rpartition(".")
    experts: Any = model.get_submodule(owner)
    form = form_of_group(name, packing, group, layout.in_features)
    count = kept_values(name, form, group, (layout.out_features, layout.in_features))
    one = layout.expert
    sparse = SparseExperts(
        layout.num_experts, one.in_features, one.out_features, count,
        format=form, dtype=getattr(experts, attribute).dtype, device="meta",
    )  # fmt: skip
    # transformers initialises what was not in the files, and reaches for the stacks there
    sparse._is_hf_initialized = True  # type: ignore[assignment]
    del experts._parameters[attribute]
    experts.add_module(attribute, sparse)
    return experts


def compute_sparse(holders: list[nn.Module]) -> None:
    """Let experts modules, some or all of whose stacks are sparse, compute with these."""
    registered.switch_on(dict.fromkeys(holders))


def make_experts_dense(model: nn.Module, name: str, sparse: SparseExperts) -> None:
    """Put a Parameter with the unpacked weights in the place of ``sparse``."""
    owner, _, attribute = name.rpartition(".")
    experts: Any = model.get_submodule(owner)
    device = getattr(sparse, sparse.format.values_name).device
    weight = stack_of(sparse, is_transposed=experts.is_transposed).contiguous().to(device)
    del experts._modules[attribute]
    experts.register_parameter(attribute, nn.Parameter(weight))
    if not any(isinstance(module, SparseExperts) for module in model.modules()):
        registered.restore(model)


def stack_of(sparse: SparseExperts, *, is_transposed: bool) -> Tensor:
    """The dense stack as its model has it: (E, O, I), or (E, I, O) if it is transposed."""
    stack = sparse.dense_weight().view(sparse.num_experts, sparse.rows_of_expert, sparse.in_features)
    return stack.transpose(1, 2) if is_transposed else stack
