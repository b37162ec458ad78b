"""Replace linear layers and expert stacks of a transformers model by sparse ones, and make them dense again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.layout import WeightLayout
from pst_ds.core.packings import DENSE
from pst_ds.formats import QuantizedFormat
from pst_ds.formats.base_weights import names_in_files
from pst_ds.inference.hf.tables import LoadingTable
from pst_ds.inference.hf.weight_files import Groups, PackedFolderError, StoredTensor, form_of_group, kept_values
from pst_ds.inference.runtime import SparseLinear, sparse_layers
from pst_ds.inference.runtime.experts import SparseExperts
from pst_ds.nn import experts as registered
from pst_ds.nn.model_structure import is_conv1d, is_experts, is_linear, linear_shape, stack_layouts


class SparseProjection(SparseLinear):
    """A SparseLinear whose ``weight`` can be read, as T5 and others do between their products.

    Every reading unpacks the matrix: right wherever a model does it, and slow where it does so in each forward pass.
    """

    stores_transposed = False
    """True where it stands for a Conv1D, whose weight is (I, O)."""

    @property
    def weight(self) -> Tensor:
        """A copy of the dense layer's weight."""
        weight = self.dense_weight().to(getattr(self, self.format.values_name).device)
        return weight.t() if self.stores_transposed else weight


class LoadingProjection(SparseProjection):
    """A SparseProjection until its parts are read; :func:`end_loading` makes it an ordinary one.

    After loading, transformers initialises what was not in the files, and models such as GPT-2 reach into their
    projections' ``weight`` there. They find one that is marked as initialised, and leave it alone.
    """

    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]


def end_loading(layer: SparseLinear) -> None:
    """Make it a plain, frozen layer; transformers' loader enables gradients for every float tensor."""
    if isinstance(layer, LoadingProjection):
        layer.__class__ = SparseProjection  # type: ignore[assignment]
    vars(layer).pop("_is_hf_initialized", None)
    layer.requires_grad_(False)


def layer_names(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """What ``model`` has under each of ``names`` of a file: a linear layer, an embedding, a stack of experts; or None.

    A file of ``LlamaForCausalLM`` says "model.layers.0...", the base model itself "layers.0...": transformers puts the
    prefix on or takes it off, and so does this. Other models have names of their own in files.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".removeprefix(".")
    holders = ((n, m) for n, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding))
    stacks = expert_stacks(model)
    weights: dict[str, Tensor] = {f"{n}.weight": m.get_parameter("weight") for n, m in holders}
    renamed = names_in_files(model, weights)

    def found(name: str) -> str | None:
        for candidate in (name.removeprefix(prefix), name, prefix + name):
            if candidate in stacks:
                return candidate
            weight = f"{candidate}.weight"
            if weight in weights or weight in renamed:
                return (weight if weight in weights else renamed[weight]).removesuffix(".weight")
        return None

    return {name: found(name) for name in names}


def named_groups(model: nn.Module, groups: Groups) -> Groups:
    """``groups`` under the names of the model; without those that are no linear layer, embedding or stack of it.

    Raises PackedFolderError when two names of the file are one layer of the model.
    """
    named: dict[str, Mapping[str, StoredTensor]] = {}
    for name, found in layer_names(model, groups).items():
        if found in named:
            twice = "the folder has this layer twice, with and without its prefix. Export again."
            raise PackedFolderError(f"{name}: {twice}")
        if found is not None:
            named[found] = groups[name]
    return named


def put_sparse_layers(model: nn.Module, groups: Groups, packing: str, tied: set[str]) -> dict[str, nn.Module]:
    """Puts an empty SparseLinear in the place of every linear layer in ``groups``, and of every stack of experts;
    returns those it took out, by name, and the modules that hold the stacks.

    Embeddings, and output layers that are tied to one, are given a LoadingTable. ``groups``: headers of the parts, by
    name in the model. ``tied``: names of tied parameters. Nothing is read. Raises PackedFolderError for parts that do
    not fit the layer, and for a packed weight that the model ties.
    """
    taken, stacks = {}, {name: layout for name, layout in expert_stacks(model).items() if name in groups}
    for name, layout in stacks.items():
        taken[name] = put_sparse_experts(model, name, layout, groups[name], packing)
    compute_sparse(list(taken.values()))
    for name, group in groups.items():
        if name in stacks:
            continue
        module = model.get_submodule(name)
        form = form_of_group(name, packing, group, _matrix_shape(module)[1])
        is_table = isinstance(module, nn.Embedding) or f"{name}.weight" in tied
        if is_table and isinstance(form, QuantizedFormat) and form.packing == DENSE and not is_conv1d(module):
            kept_values(name, form, group, _matrix_shape(module))
            model.set_submodule(name, LoadingTable(module, _matrix_shape(module), form))
            continue
        if f"{name}.weight" in tied or isinstance(module, nn.Embedding):
            raise PackedFolderError(
                f"{name}: packed in the folder, but this model ties it to another weight. Set tie_word_embeddings to "
                "false in config.json if they differ, or export again."
            )
        shape, dtype = linear_shape(module), module.get_parameter("weight").dtype
        count, bias = kept_values(name, form, group, shape), module.bias is not None
        sparse = LoadingProjection(*shape[::-1], count, format=form, bias=bias, dtype=dtype, device="meta")
        sparse.stores_transposed = is_conv1d(module)
        model.set_submodule(name, sparse)
        taken[name] = module
    return taken


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (O, I) of a linear layer, or (rows, width) of an embedding."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def clear_cast_zeros(layer: SparseLinear) -> None:
    """Turn -0.0 into +0.0: casting may underflow to -0.0, which packed weights must not have."""
    with torch.no_grad():
        getattr(layer, layer.format.values_name).add_(0.0)


def make_dense(model: nn.Module, taken: Mapping[str, nn.Module]) -> None:
    """Puts the layers of :func:`put_sparse_layers` back, with the unpacked weights; one layer is held twice at a time.

    The sparse layers must have passed their check.
    """
    for name in list(sparse_layers(model)):
        sparse, linear = model.get_submodule(name), taken[name]
        if isinstance(sparse, SparseExperts):
            make_experts_dense(model, name, sparse)
            continue
        assert isinstance(sparse, SparseLinear)
        weight = sparse.dense_weight().t() if is_conv1d(linear) else sparse.dense_weight()
        linear.weight = nn.Parameter(weight.contiguous().to(getattr(sparse, sparse.format.values_name).device))
        if sparse.bias is not None:
            linear.bias = nn.Parameter(sparse.bias.detach())
        del weight  # a second copy, where it was transposed or moved
        linear.train(sparse.training)
        model.set_submodule(name, linear)


def expert_stacks(model: nn.Module) -> dict[str, WeightLayout]:
    """Return the layouts of the expert stacks of ``model`` that can become sparse, by the names of their Parameters."""
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
    """Let experts modules compute with their sparse stacks."""
    registered.switch_on(dict.fromkeys(holders))


def make_experts_dense(model: nn.Module, name: str, sparse: SparseExperts) -> None:
    """Replace ``sparse`` by a Parameter with the unpacked weights."""
    owner, _, attribute = name.rpartition(".")
    experts: Any = model.get_submodule(owner)
    device = getattr(sparse, sparse.format.values_name).device
    weight = stack_of(sparse, is_transposed=experts.is_transposed).contiguous().to(device)
    del experts._modules[attribute]
    experts.register_parameter(attribute, nn.Parameter(weight))
    if not any(isinstance(module, SparseExperts) for module in model.modules()):
        registered.restore(model)


def stack_of(sparse: SparseExperts, *, is_transposed: bool) -> Tensor:
    """Return the dense stack in the model's shape: (E, O, I), or (E, I, O) if it is transposed."""
    stack = sparse.dense_weight().view(sparse.num_experts, sparse.rows_of_expert, sparse.in_features)
    return stack.transpose(1, 2) if is_transposed else stack
