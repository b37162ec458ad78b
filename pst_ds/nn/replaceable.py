"""Check whether a linear layer can be replaced, and format module names for messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pst_ds.nn.model_structure import is_conv1d, is_linear

SAME_AS_LINEAR = ("FalconLinear",)
"""Classes whose own forward computes the same as that of nn.Linear."""
_HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward pre-",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward pre-",
}


def why_not_replaceable(name: str, module: nn.Module, holders: Sequence[nn.Module], model: nn.Module) -> str:
    """Return why the linear layer ``name`` of ``model`` cannot be replaced, and what to do; "" if it can be.

    ``holders`` are the modules that hold it.
    """
    for holder in holders:
        if isinstance(holder, nn.MultiheadAttention):
            return (
                f"{name} belongs to a {type(holder).__name__}, which reads the layer's weight and never calls it: a "
                f"mask would prune nothing. Leave it dense with exclude_modules = {listed(attention_names(model))}"
            )
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            f"{name}.weight is no Parameter but computed from others, as weight_norm and parametrizations do; remove "
            f"that first (torch.nn.utils.parametrize.remove_parametrizations), or {_leave_out(name)}"
        )
    if not is_conv1d(module) and not _computes_as_linear(module):
        kind = type(module)
        alike = dict.fromkeys(short_name(other) for other, m in model.named_modules() if type(m) is kind)
        return (
            f"{name} is a {kind.__name__} with a forward of its own, and a pruned layer would compute what nn.Linear "
            f"does. Leave it dense with exclude_modules = {listed(alike)}"
        )
    if not weight.is_contiguous():
        return (
            f"{name}.weight is not contiguous in memory; make it so (module.weight = "
            f"nn.Parameter(module.weight.contiguous())), or {_leave_out(name)}"
        )
    return hooks(name, module)


def hooks(name: str, module: nn.Module) -> str:
    """Return a sentence that names the hooks of a module to be replaced; "" if it has none."""
    for attribute, kind in _HOOKS.items():
        if getattr(module, attribute):
            return (
                f"{name} has a {kind} hook, which would be lost with the module that is replaced; register it after "
                f"inject_pst, on the new one, or {_leave_out(name)}"
            )
    return ""


def attention_names(model: nn.Module) -> list[str]:
    """Return the names of every nn.MultiheadAttention and its linear layers, for ``exclude_modules``."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            own = short_name(name)
            children = [child for child, m in module.named_children() if is_linear(m)]
            found += [*([own] if own else []), *(f"{own}.{child}".lstrip(".") for child in children)]
    return list(dict.fromkeys(found))


def short_name(name: str) -> str:
    """Return the dotted ending of ``name`` from its last part that is not a number."""
    parts = name.split(".")
    first = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])


def listed(names: Iterable[str]) -> str:
    """Return names as a list in a run file: ["one", "other"]."""
    return f"[{', '.join(chr(34) + name + chr(34) for name in names)}]"


def _computes_as_linear(module: nn.Module) -> bool:
    """Return whether ``module`` computes like nn.Linear; accelerate's hooks only move its forward between devices."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__name__ in SAME_AS_LINEAR


def _leave_out(name: str) -> str:
    return f'leave it dense with exclude_modules = ["{name}"]'
