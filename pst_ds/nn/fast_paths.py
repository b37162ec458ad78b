"""torch's fused encoder layer, off where layers are pruned: without gradients it reads weights, and calls no layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from pst_ds.nn.linear import PSTLinear

_OFF: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # it asks for 1 or 2; the activation is another field
    (nn.TransformerEncoder, "use_nested_tensor", False),  # which the fused layer alone takes
)
_BEFORE = "pst_fast_path"


def switch_off(model: nn.Module) -> None:
    """Let every nn.TransformerEncoder and its layers with PST layers inside call these, in evaluation too."""
    for module in model.modules():
        for kind, switch, off in _OFF:
            if isinstance(module, kind) and any(isinstance(inner, PSTLinear) for inner in module.modules()):
                setattr(module, _BEFORE, getattr(module, switch, off))
                setattr(module, switch, off)


def restore(model: nn.Module) -> None:
    """Undo :func:`switch_off`, for a model without PST layers."""
    for module in model.modules():
        for kind, switch, _ in _OFF:
            if isinstance(module, kind) and _BEFORE in vars(module):
                setattr(module, switch, vars(module).pop(_BEFORE))
