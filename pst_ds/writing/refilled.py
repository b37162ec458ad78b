"""Sparsity of an export, and matrices of a pruned model that have lost their zeros, as after merging an adapter."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pst_ds.errors import shortened
from pst_ds.formats.base_weights import names_in_files
from pst_ds.nn.model_structure import is_inside_block, router_names, untied_linear_layers
from pst_ds.writing.detect_pattern import NO_PATTERN
from pst_ds.writing.manifest import ExportedTensor

LEAST_PRUNED_SHARE = 0.01
"""Lowest sparsity of a pruned matrix. Rounding to bf16 makes a few zeros in a matrix that was never pruned."""


def refilled_weights(
    model: nn.Module, tensors: Sequence[ExportedTensor], recorded_zeros: Mapping[str, int]
) -> list[str]:
    """Return the names of the tensors that have fewer zeros than pruning gave them.

    If the manifest of the source says which tensors were pruned, their SHA-256 was compared, and none is refilled.
    ``pst-ds prune`` records the zeros of each layer. Without a record, a linear layer inside the blocks is refilled if
    it is dense although others are pruned; it may also have been excluded from pruning.

    Args:
        model: the plain model, for the names of its linear layers.
        tensors: the export.
        recorded_zeros: zeros by layer, from the record of ``pst-ds prune``; empty without one.
    """
    if any(tensor.origin == "pruned" for tensor in tensors):
        return []
    if recorded_zeros:
        # more zeros than recorded are fine: a cast rounds small weights to zero
        fewer: list[str] = []
        for tensor in tensors:
            layer = tensor.name.removesuffix(".weight")
            if _zeros(tensor) < recorded_zeros.get(layer, 0):
                fewer.append(tensor.name)
        return fewer
    in_blocks = linear_weights_in_blocks(model)
    dense: list[str] = []
    num_pruned = 0
    for tensor in tensors:
        if tensor.name not in in_blocks:
            continue
        if is_pruned(_zeros(tensor), tensor.numel):
            num_pruned += 1
        else:
            dense.append(tensor.name)
    if not num_pruned:
        # an ordinary dense model, which has lost nothing
        return []
    return dense


def measured_sparsity(tensors: Sequence[ExportedTensor], refilled: Sequence[str] = ()) -> float:
    """Return the sparsity of the pruned tensors, and of those that were ``refilled``.

    Without any pruned tensor it is that of the linear weights with zeros.
    """
    counted = [tensor for tensor in tensors if tensor.origin == "pruned"]
    if not counted:
        refilled_names = set(refilled)
        counted = [tensor for tensor in tensors if tensor.pattern != NO_PATTERN or tensor.name in refilled_names]
    weights = 0
    zeros = 0
    for tensor in counted:
        weights += tensor.numel
        zeros += _zeros(tensor)
    if not weights:
        return 0.0
    return zeros / weights


def is_pruned(zeros: int, weights: int) -> bool:
    """Return whether a matrix with so many ``zeros`` counts as pruned."""
    return zeros >= LEAST_PRUNED_SHARE * weights > 0


def linear_weights_in_blocks(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers inside the blocks, except routers, in the model and in files."""
    routers = router_names(model)
    weights: dict[str, Tensor] = {}
    for name, module in untied_linear_layers(model).items():
        # Routers stay dense when "all-linear" is pruned.
        if is_inside_block(name, model) and name not in routers:
            weights[f"{name}.weight"] = module.weight
    # Files may have other names, which transformers changes when it loads them.
    return {*weights, *names_in_files(model, weights)}


def refilled_text(names: Sequence[str]) -> str:
    """Return a line of text about refilled weights."""
    return (
        f"without pruned weights, although others are pruned: {len(names)} matrices, {shortened(names)}. They were "
        "excluded from pruning, or filled again, as merging an adapter does"
    )


def _zeros(tensor: ExportedTensor) -> int:
    """Return the number of zeros in a tensor, quantised ones included."""
    return tensor.numel - tensor.nonzero
