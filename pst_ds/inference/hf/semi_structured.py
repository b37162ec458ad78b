"""2:4 weights for NVIDIA's sparse tensor cores (torch's semi-structured tensors)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from pst_ds.errors import InputError
from pst_ds.inference.runtime import SparseLinear
from pst_ds.nn.model_structure import is_conv1d, is_linear, linear_shape

DTYPES = (torch.bfloat16, torch.float16)
MIN_COMPUTE_CAPABILITY = (8, 0)


def to_semi_structured(model: nn.Module, modules: Iterable[str] | None = None) -> list[str]:
    """Give linear layers of a model on CUDA semi-structured weights, in place.

    A layer qualifies if its weight (O, I) is bf16 or fp16, on CUDA, not tied, of a shape that torch's kernels support,
    and has at most two kept weights in each group of four inputs. Conv1D and SparseLinear become nn.Linear. The model
    cannot be saved afterwards: keep its folder.

    ``modules``: full names of the layers; None converts every layer that qualifies. Returns the names of the converted
    layers. Raises InputError, changing nothing, if a named layer does not qualify, or none does.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) or (is_linear(module) and type(module.weight.data) is Tensor)
    }
    users = Counter(id(param) for module in model.modules() for param in module.parameters(recurse=False))
    chosen = list(candidates if modules is None else dict.fromkeys(modules))
    if unknown := [name for name in chosen if name not in candidates]:
        known = ", ".join(list(candidates)[:4]) or "none"
        raise InputError(f"{unknown[0]} is not a linear layer of this model. Its layers: {known}")
    reasons = {name: _reason_against(candidates[name], users) for name in chosen}
    refused = [(name, reason) for name, reason in reasons.items() if reason]
    if modules is None:
        chosen = [name for name, reason in reasons.items() if not reason]
        if not reasons:
            raise InputError("to_semi_structured: the model has no linear layer")
        if not chosen:
            # layers that only have an unsuitable shape say less than the others
            name, reason = next((pair for pair in refused if "Leave it out" not in pair[1]), refused[0])
            raise InputError(f"to_semi_structured: none of {len(reasons)} linear layers qualifies; {name}: {reason}")
    elif refused:
        raise InputError(": ".join(refused[0]))
    for name in chosen:
        _convert(model, name, candidates[name])
    return chosen


def is_two_four(weight: Tensor) -> bool:
    """Return whether an (O, I) matrix has at most two non-zero weights in every four consecutive inputs."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _reason_against(module: nn.Module, users: Counter[int]) -> str:
    """Return why a layer cannot be converted, and the fix; "" if it can. Cheap checks come first."""
    values = next(module.parameters())
    if not isinstance(module, SparseLinear) and users[id(module.weight)] > 1:
        return "its weight is tied to another layer, which would lose it. Leave it out."
    if values.dtype not in DTYPES:
        return f"its weight is {values.dtype}, and bf16 or fp16 is needed. Load the model with dtype=torch.bfloat16."
    kernels: type[SparseSemiStructuredTensor] = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    if SparseSemiStructuredTensor._FORCE_CUTLASS:
        kernels = torch.sparse.SparseSemiStructuredTensorCUTLASS
    limits, weight_shape = kernels._DTYPE_SHAPE_CONSTRAINTS[values.dtype], linear_shape(module)
    if weight_shape[0] % limits.sparse_min_rows or weight_shape[1] % limits.sparse_min_cols:
        needed = f"multiples of ({limits.sparse_min_rows}, {limits.sparse_min_cols}) are needed"
        return f"its shape (outputs, inputs) is {weight_shape}, and {needed}. Leave it out."
    if reason := _reason_against_device(values.device):
        return reason
    counts = (_dense_weight(module) != 0).unflatten(1, (-1, 4)).sum(-1)
    if (counts <= 2).all():
        return ""
    row, group = (counts > 2).nonzero()[0].tolist()
    found = f"output {row} has more than two weights in inputs {4 * group} to {4 * group + 3}"
    return f"not 2:4: {found}. Train with mask_structure = '2:4', or leave it out."


def _reason_against_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"it is on {device}, and semi-structured weights need CUDA. Move the model: model.to('cuda')."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability}, and {MIN_COMPUTE_CAPABILITY} is needed. Keep it dense."
    return ""


def _dense_weight(module: nn.Module) -> Tensor:
    """Return the weight (O, I), contiguous, on the layer's device."""
    if isinstance(module, SparseLinear):
        return module.dense_weight().to(next(module.parameters()).device)
    weight = module.get_parameter("weight").detach()
    return weight.t().contiguous() if is_conv1d(module) else weight.contiguous()


def _convert(model: nn.Module, name: str, module: nn.Module) -> None:
    weight = nn.Parameter(to_sparse_semi_structured(_dense_weight(module)), requires_grad=False)
    if isinstance(module, nn.Linear):
        module.weight = weight
        return
    out_features, in_features = linear_shape(module)
    linear = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
    linear.weight = weight
    if isinstance(module.bias, Tensor):
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    model.set_submodule(name, linear.train(module.training))
