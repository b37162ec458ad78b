"""Replace linear layers and expert stacks of a transformers model by sparse ones, and make them dense again."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pst_ds.core.layout import WeightLayout
from pst_ds.formats import QuantizedFormat, with_row_bits
from pst_ds.hf.tables import LoadingTable
from pst_ds.hf.weight_files import (
    Groups,
    PackedFolderError,
    StoredTensor,
    form_of_group,
    kept_values,
    loaded_dtype,
    reread_parts,
)
from pst_ds.nn import experts as registered
from pst_ds.nn.model_structure import is_conv1d, known_stacks, linear_shape
from pst_ds.runtime import SparseLinear, sparse_layers
from pst_ds.runtime.experts import SparseExperts


class SparseProjection(SparseLinear):
    """A SparseLinear with a ``weight``, which T5 and others read in every forward pass; it is unpacked each time."""

    stores_transposed = False
    """True in place of a Conv1D, whose weight is (I, O)."""

    @property
    def weight(self) -> Tensor:
        """A copy of the dense layer's weight."""
        weight = self.dense_weight().to(getattr(self, self.format.values_name).device)
        if self.stores_transposed:
            return weight.t()
        return weight


class LoadingProjection(SparseProjection):
    """A SparseProjection while transformers loads the model.

    After loading, transformers initialises tensors that the files lack, and models such as GPT-2 initialise the
    ``weight`` of their projections. They find one that is marked as initialised, and skip it.
    """

    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]


def put_sparse_layers(model: nn.Module, groups: Groups, packing: str, tied: set[str]) -> dict[str, nn.Module]:
    """Replace the linear layers and expert stacks in ``groups`` by empty sparse layers, without reading weights.

    Embeddings, and output layers tied to one, are replaced by a LoadingTable. ``packing``: format of the folder.
    ``tied``: names of tied parameters. Returns the replaced linear layers by name, and the modules that hold stacks.
    Raises PackedFolderError for parts that do not fit the layer, and for a packed weight that the model ties.
    """
    replaced: dict[str, nn.Module] = {}
    for name, layout in known_stacks(model).items():
        if name in groups:
            replaced[name] = _put_experts(model, name, layout, groups[name], packing)
    stacks = set(replaced)
    # Each module once: one that holds several stacks computes all of them sparse.
    registered.switch_on(dict.fromkeys(replaced.values()))
    for name, group in groups.items():
        if name in stacks:
            continue
        module = model.get_submodule(name)
        is_tied = f"{name}.weight" in tied
        if isinstance(module, nn.Embedding) or is_tied:
            _put_table(model, name, group, packing)
        else:
            _put_projection(model, name, group, packing)
            replaced[name] = module
    return replaced


def _put_table(model: nn.Module, name: str, group: Mapping[str, StoredTensor], packing: str) -> None:
    """Replace the embedding ``name``, or an output layer tied to one, by an empty LoadingTable.

    Raises PackedFolderError for pruned weights: only tables with every value can be tied.
    """
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        rows, width = module.weight.shape
        shape = (rows, width)
    else:
        shape = linear_shape(module)
    form = form_of_group(name, packing, group, shape[1])
    # A Conv1D stores its weight transposed, so it cannot share one with an embedding.
    if not isinstance(form, QuantizedFormat) or not form.is_dense or is_conv1d(module):
        raise PackedFolderError(
            f"{name}: packed in the folder, but this model ties it to another weight. Set "
            "tie_word_embeddings to false in config.json if they differ, or export again."
        )
    kept_values(name, form, group, shape)
    model.set_submodule(name, LoadingTable(module, shape, form))


def _put_projection(model: nn.Module, name: str, group: Mapping[str, StoredTensor], packing: str) -> None:
    """Replace the linear layer ``name`` by an empty LoadingProjection. Raises PackedFolderError."""
    module = model.get_submodule(name)
    shape = linear_shape(module)
    out_features, in_features = shape
    form = form_of_group(name, packing, group, in_features)
    sparse = LoadingProjection(
        in_features,
        out_features,
        kept_values(name, form, group, shape),
        format=form,
        bias=module.bias is not None,
        dtype=module.get_parameter("weight").dtype,
        device="meta",
    )
    sparse.stores_transposed = is_conv1d(module)
    _await_bits(sparse, group)
    model.set_submodule(name, sparse)


def _put_experts(
    model: nn.Module, name: str, layout: WeightLayout, group: Mapping[str, StoredTensor], packing: str
) -> nn.Module:
    """Replace the stack ``name`` by an empty SparseExperts. Return the experts module that holds it."""
    owner, _, attribute = name.rpartition(".")
    experts = model.get_submodule(owner)
    expert_layout = layout.expert
    form = form_of_group(name, packing, group, layout.in_features)
    count = kept_values(name, form, group, (layout.out_features, layout.in_features))
    dtype = experts.get_parameter(attribute).dtype
    sparse = SparseExperts(
        layout.num_experts,
        expert_layout.in_features,
        expert_layout.out_features,
        count,
        format=form,
        dtype=dtype,
        device="meta",
    )
    _await_bits(sparse, group)
    sparse._is_hf_initialized = True  # type: ignore[assignment]  # transformers would initialise the stack
    # torch does not let a submodule take the name of a parameter.
    del experts._parameters[attribute]
    experts.add_module(attribute, sparse)
    return experts


def _await_bits(sparse: SparseLinear, group: Mapping[str, StoredTensor]) -> None:
    """Give an empty layer the bitmask of the file, which may be compressed."""
    if "bitmask" in sparse.format.part_names:
        sparse.bitmask = torch.empty(group["bitmask"].shape, dtype=torch.uint8, device="meta")


def finish_layer(name: str, layer: SparseLinear, group: Mapping[str, StoredTensor]) -> None:
    """Check a layer whose parts were loaded, and make it frozen. Raises FormatError, naming ``name``."""
    # The two classes differ in `weight` only, so the object can change its class instead of being replaced.
    if isinstance(layer, LoadingProjection):
        layer.__class__ = SparseProjection  # type: ignore[assignment]
    vars(layer).pop("_is_hf_initialized", None)
    layer.requires_grad_(False)  # transformers enables gradients of every float tensor
    if layer.is_quantized:
        layer.dtype = loaded_dtype(layer.scales, layer.dtype)
    reread_parts(layer, layer.format, group)
    # A bitmask may be compressed in the file; kernels need one bit per weight.
    if "bitmask" in layer.format.part_names:
        shape = (layer.out_features, layer.in_features)
        layer.bitmask = with_row_bits(name, {"bitmask": layer.bitmask}, shape)["bitmask"]
    values = getattr(layer, layer.format.values_name)
    if values.dtype != group[layer.format.values_name].dtype:
        with torch.no_grad():
            values.add_(0.0)  # a cast may underflow to -0.0, which packed weights must not have
    layer.check(name)


def make_dense(model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Restore the layers that :func:`put_sparse_layers` replaced, with unpacked weights, one after another."""
    # Only names are listed: a reference to each layer would keep all packed weights alive next to the dense ones.
    for name in list(sparse_layers(model)):
        sparse = model.get_submodule(name)
        assert isinstance(sparse, SparseLinear)
        if isinstance(sparse, SparseExperts):
            _make_stack_dense(model, name, sparse)
        else:
            _make_linear_dense(model, name, sparse, linear=replaced[name])
    registered.switch_off(model.modules())


def _make_stack_dense(model: nn.Module, name: str, sparse: SparseExperts) -> None:
    """Replace ``sparse`` by the Parameter ``name`` of its experts module."""
    owner, _, attribute = name.rpartition(".")
    experts = model.get_submodule(owner)
    device = getattr(sparse, sparse.format.values_name).device
    weight = sparse.dense_weight().view(sparse.num_experts, sparse.rows_of_expert, sparse.in_features)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)  # (experts, inputs, outputs)
    del experts._modules[attribute]
    experts.register_parameter(attribute, nn.Parameter(weight.contiguous().to(device)))


def _make_linear_dense(model: nn.Module, name: str, sparse: SparseLinear, linear: nn.Module) -> None:
    """Replace ``sparse`` by the original layer ``linear``, with the weight and bias that were loaded."""
    device = getattr(sparse, sparse.format.values_name).device
    weight = sparse.dense_weight()  # (O, I)
    if is_conv1d(linear):
        weight = weight.t()
    linear.weight = nn.Parameter(weight.contiguous().to(device))
    if sparse.bias is not None:
        linear.bias = nn.Parameter(sparse.bias.detach())
    model.set_submodule(name, linear.train(sparse.training))
