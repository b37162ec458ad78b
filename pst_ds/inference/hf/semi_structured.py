"""2:4 weights for NVIDIA's sparse tensor cores, after a look at every group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from pst_ds.errors import InputError
from pst_ds.inference.runtime import SparseLinear
from pst_ds.nn.model_structure import is_conv1d, is_linear, linear_shape

DTYPES = (torch.bfloat16, torch.float16)
MIN_COMPUTE_CAPABILITY = (8, 0)


class SemiStructuredError(InputError):
    """A layer that cannot become semi-structured; the message names it."""


def to_semi_structured(model: nn.Module, modules: Iterable[str] | None = None) -> list[str]:
    """Give linear layers of a model on CUDA semi-structured weights, in place.

    A layer qualifies with a bf16 or fp16 weight (O, I), on CUDA, of a shape that torch's kernels take, not tied, with
    at most two non-zeros in each group of four inputs. Conv1D and SparseLinear become nn.Linear. Such a model cannot be
    saved: keep the folder that it came from.

    Args:
        model: a plain model, or one with sparse layers.
        modules: full names of the layers; None takes every layer that qualifies.

    Returns:
        The names of the converted layers.

    Raises:
        SemiStructuredError: a named layer does not qualify, or none does; the model is unchanged.
    """
    candidates = _linear_layers(model)
    tied = _tied_weights(model)
    if modules is None:
        reasons = {name: _reason_against(module, tied) for name, module in candidates.items()}
        chosen = [name for name, reason in reasons.items() if reason is None]
        if not chosen:
            raise SemiStructuredError(_none_qualifies(reasons))
    else:
        chosen = list(dict.fromkeys(modules))
        for name in chosen:
            if name not in candidates:
                known = ", ".join(list(candidates)[:4]) or "none"
                raise SemiStructuredError(f"{name}: no linear layer of this model. Names seen: {known}")
            if reason := _reason_against(candidates[name], tied):
                raise SemiStructuredError(f"{name}: {reason}")
    for name in chosen:
        _convert(model, name, candidates[name])
    return chosen


def is_two_four(weight: Tensor) -> bool:
    """Return whether an (O, I) matrix has at most two non-zeros in every four consecutive inputs."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) or (is_linear(module) and type(module.weight.data) is Tensor)
    }


def _tied_weights(model: nn.Module) -> set[int]:
    """Identities of the parameters that two modules share, as an output layer and its embedding do."""
    users = Counter(id(param) for module in model.modules() for param in module.parameters(recurse=False))
    return {param for param, count in users.items() if count > 1}


def _reason_against(module: nn.Module, tied: set[int]) -> str | None:
    """Return why this layer cannot be converted, and the fix; None when it can be. The cheap questions come first."""
    values = next(module.parameters())
    if not isinstance(module, SparseLinear) and id(module.weight) in tied:
        return "its weight is tied to another layer, which would lose it. Leave it out."
    if values.dtype not in DTYPES:
        return f"its weight is {values.dtype}, and bf16 or fp16 is needed. Load the model with dtype=torch.bfloat16."
    weight_shape = linear_shape(module)
    rows, columns = _multiples(values.dtype)
    if weight_shape[0] % rows or weight_shape[1] % columns:
        needed = f"multiples of ({rows}, {columns}) are needed"
        return f"its shape (outputs, inputs) is {weight_shape}, and {needed}. Leave it out."
    if reason := _reason_against_device(values.device):
        return reason
    if not is_two_four(weight := _dense_weight(module)):
        row, group = _first_bad_group(weight)
        return (
            f"not 2:4: output {row} has more than two non-zeros in inputs {4 * group} to {4 * group + 3}. "
            "Train with mask_structure = '2:4', or leave it out."
        )
    return None


def _reason_against_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it is on {device}, and semi-structured weights need CUDA. Move the model: model.to('cuda')."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability}, and {MIN_COMPUTE_CAPABILITY} is needed. Keep it dense."
    return None


def _none_qualifies(reasons: dict[str, str | None]) -> str:
    if not reasons:
        return "to_semi_structured: the model has no linear layer"
    # a layer that fails late is nearer to what the user has to fix than one of an odd shape
    late = ((n, r) for n, r in reasons.items() if r and "Leave it out" not in r)
    name, reason = next(late, next(iter(reasons.items())))
    return f"to_semi_structured: none of {len(reasons)} linear layers qualifies; {name}: {reason}"


def _first_bad_group(weight: Tensor) -> tuple[int, int]:
    counts = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
    row, group = (counts > 2).nonzero()[0].tolist()
    return row, group


def _multiples(dtype: torch.dtype) -> tuple[int, int]:
    """(outputs, inputs) that torch's kernels of this build take multiples of."""
    kernels: Any = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    if SparseSemiStructuredTensor._FORCE_CUTLASS:
        kernels = torch.sparse.SparseSemiStructuredTensorCUTLASS
    limits = kernels._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return limits.sparse_min_rows, limits.sparse_min_cols


def _dense_weight(module: Any) -> Tensor:
    """(O, I), contiguous, where the layer is."""
    if isinstance(module, SparseLinear):
        return module.dense_weight().to(next(module.parameters()).device)
    weight: Tensor = module.weight.detach()
    return weight.t().contiguous() if is_conv1d(module) else weight.contiguous()


def _convert(model: nn.Module, name: str, module: Any) -> None:
    weight = nn.Parameter(to_sparse_semi_structured(_dense_weight(module)), requires_grad=False)
    if isinstance(module, nn.Linear):
        module.weight = weight
        return
    out_features, in_features = linear_shape(module)
    linear = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
    linear.weight = weight
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    linear.train(module.training)
    model.set_submodule(name, linear)
