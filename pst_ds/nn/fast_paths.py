"""Switch off torch's fused encoder layer around pruned layers: it reads their weights instead of calling them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pst_ds.nn.linear import PSTLinear
from pst_ds.third_party import require

_OFF: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # fused for 1 and 2; the activation is another field
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused layer supports nested tensors
)
_BEFORE = "pst_fast_path"


def switch_off(model: nn.Module) -> None:
    """Make every nn.TransformerEncoder and its layers call the PST layers inside them, in evaluation too."""
    for module in model.modules():
        for kind, switch, off in _OFF:
            if isinstance(module, kind) and any(isinstance(inner, PSTLinear) for inner in module.modules()):
                setattr(module, _BEFORE, require(module, switch))
                setattr(module, switch, off)


def restore(model: nn.Module) -> None:
    """Undo :func:`switch_off`, once the model has no PST layers."""
    for module in model.modules():
        for kind, switch, _ in _OFF:
            if isinstance(module, kind) and _BEFORE in vars(module):
                setattr(module, switch, vars(module).pop(_BEFORE))
