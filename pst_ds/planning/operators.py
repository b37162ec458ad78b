"""Launches and bytes of torch's operators, from the shapes of what they read and write."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
"""Operators whose time is that of their FLOPs; attention's fused ones, too, see :func:`operator_traffic`."""
_ATTENTION = "scaled_dot_product"
_NOTHING = frozenset(
    {
        "_local_scalar_dense",
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "set_",
    }
)


def operator_traffic(
    operator: OpOverload, args: object, kwargs: Mapping[str, object], result: object
) -> tuple[int, int]:
    """Return (launches, bytes read and written) of an ATen operator; 0 for views, 0 bytes for products.

    A result in one of the arguments (``out=``, or in place) is written; the argument is read unless it is ``out``.
    """
    space, _, name = operator._schema.name.partition("::")
    if space == "prim" or operator.is_view or name in _NOTHING:
        return 0, 0
    if name in PRODUCTS or _ATTENTION in name:
        return 1, 0
    written = _tensors(result)
    out = {id(tensor) for tensor in _tensors(kwargs.get("out"))}
    read = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in out]
    if name in ("copy_", "fill_", "zero_"):  # of which the first is written alone
        read = read[1:]
    return 1, sum(map(_nbytes, read)) + sum(map(_nbytes, written))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Bytes that are read for a tensor: what is expanded is read once."""
    once = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(once) * tensor.element_size()
