"""Which modules are pruned and which are trained in full, with PEFT's meaning of the names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pst_ds.core.layout import WeightLayout
from pst_ds.errors import InputError
from pst_ds.nn.config import PSTConfig, name_matches
from pst_ds.parallel import zero3

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head", "qa_outputs")
"""Last part of the names that transformers gives to task heads."""


class InjectionError(InputError):
    """A model, or the modules named for it, cannot be injected; the message names the module and the way out."""


@dataclass(frozen=True, slots=True)
class Target:
    """One layer to prune: its module, every (parent, attribute) that holds it, and its layout."""

    name: str
    module: Any
    places: tuple[tuple[nn.Module, str], ...]
    layout: WeightLayout


@dataclass(frozen=True, slots=True)
class EmbeddingTarget:
    """One embedding to update, and every (parent, attribute) that holds it."""

    name: str
    module: nn.Embedding
    places: tuple[tuple[nn.Module, str], ...]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or the Conv1D of transformers' GPT-2."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def find_targets(model: nn.Module, config: PSTConfig) -> list[Target]:
    """The layers that ``config`` prunes, in model order.

    Raises InjectionError when nothing matches, or when a match is tied, quantised or not linear.
    """
    saved = modules_to_save(model, config)
    places = _places_by_module(model)
    targets = []
    for name, module in model.named_modules():
        if not _is_wanted(name, module, model, config, saved):
            continue
        if not is_linear(module):
            raise InjectionError(
                f"target_modules matches {name}, a {type(module).__name__}, which is no linear layer; name the linear "
                "layers inside it"
            )
        _refuse_unfit_weight(name, module)
        targets.append(Target(name, module, places[module], _layout(name, module, config)))
    if not targets:
        raise InjectionError(_nothing_matched(model, config))
    _refuse_tied(model, targets)
    return targets


def modules_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """The modules trained in full, by name; raises InjectionError for a name that matches none."""
    if config.modules_to_save is None:
        return {n: m for n, m in model.named_modules() if "." not in n and n in HEAD_NAMES}
    found = {n: m for n, m in model.named_modules() if n and name_matches(n, config.modules_to_save)}
    _require_all_found("modules_to_save", config.modules_to_save, found, model)
    return found


def _require_all_found(setting: str, wanted: tuple[str, ...], found: Iterable[str], model: nn.Module) -> None:
    for name in wanted:
        if not any(name_matches(n, (name,)) for n in found):
            raise InjectionError(
                f"{setting} names {name!r}, which the model does not have."
                + _suggestion(name, {n.rpartition(".")[2] for n, _ in model.named_modules()})
            )


def find_embeddings(model: nn.Module, config: PSTConfig) -> list[EmbeddingTarget]:
    """The embeddings that ``config.update_embeddings`` names, in model order.

    Raises InjectionError for a name that matches none, and for one that is tied, trained in full or no plain
    ``nn.Embedding``.
    """
    wanted, saved, places = config.update_embeddings, modules_to_save(model, config), _places_by_module(model)
    found = {n: m for n, m in model.named_modules() if n and name_matches(n, wanted)}
    _require_all_found("update_embeddings", wanted, found, model)
    for name, module in found.items():
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
            raise InjectionError(
                f"update_embeddings matches {name}, a {type(module).__name__}; only a plain nn.Embedding (no max_norm, "
                "no scale_grad_by_freq) takes a low-rank update"
            )
        if any(name == s or name.startswith(s + ".") for s in saved):
            raise InjectionError(f"{name} is in update_embeddings and in modules_to_save; name it in one of them")
        for other, holder in model.named_modules():
            if holder is not module and any(p is module.weight for p in holder.parameters(recurse=False)):
                raise InjectionError(
                    f"{name}.weight is tied to {other}.weight: an update of one would be missing in the other. Take "
                    f"{name} out of update_embeddings"
                )
    return [EmbeddingTarget(name, module, places[module]) for name, module in found.items()]


def _is_wanted(name: str, module: nn.Module, model: nn.Module, config: PSTConfig, saved: dict[str, nn.Module]) -> bool:
    if not name or any(name == s or name.startswith(s + ".") for s in saved):
        return False
    if config.exclude_modules and name_matches(name, config.exclude_modules):
        return False
    if config.target_modules == ALL_LINEAR:
        return is_linear(module) and _is_inside_block(name, model)
    return name_matches(name, config.target_modules)


def _is_inside_block(name: str, model: nn.Module) -> bool:
    """Whether the name passes through an item of a ModuleList: how transformers stacks its blocks."""
    parts = name.split(".")
    return any(
        parts[i].isdigit() and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList)
        for i in range(1, len(parts))
    )


def _places_by_module(model: nn.Module) -> dict[nn.Module, tuple[tuple[nn.Module, str], ...]]:
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():  # named_children() names a child held twice only once
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return {module: tuple(found) for module, found in places.items()}


def _layout(name: str, module: Any, config: PSTConfig) -> WeightLayout:
    if _is_conv1d(module):
        outputs, inputs, transposed = int(module.nf), int(module.nx), True
    else:
        outputs, inputs, transposed = int(module.out_features), int(module.in_features), False
    fused = name_matches(name, config.fused_modules) and outputs % inputs == 0
    return WeightLayout(outputs, inputs, transposed, outputs // inputs if fused else 1)


def _refuse_unfit_weight(name: str, module: Any) -> None:
    weight = module.weight
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise InjectionError(
            f"{name}.weight is {weight.dtype}: quantised base weights cannot be pruned. Load the model in bfloat16 or "
            "float32"
        )
    layout = _layout(name, module, PSTConfig())
    if tuple(zero3.full_shape(weight)) != layout.shape:
        raise InjectionError(
            f"{name}.weight has shape {tuple(zero3.full_shape(weight))}, not the {layout.shape} of its "
            f"{type(module).__name__}; exclude it with exclude_modules"
        )


def _refuse_tied(model: nn.Module, targets: list[Target]) -> None:
    wanted = {id(t.module.weight): t for t in targets}
    for name, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            target = wanted.get(id(param))
            if target is not None and module is not target.module:
                raise InjectionError(
                    f"{target.name}.weight is tied to {name}.{attribute}: pruning one would prune the other. Leave it "
                    f'out with exclude_modules = ["{target.name}"]'
                )


def _nothing_matched(model: nn.Module, config: PSTConfig) -> str:
    seen = list(dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)))
    patterns = config.target_modules
    shown = patterns if isinstance(patterns, str) else list(patterns)
    first = patterns if isinstance(patterns, str) else (patterns[0] if patterns else "")
    names = ", ".join(seen[:12]) + (", …" if len(seen) > 12 else "")
    return f"target_modules {shown!r} matched no linear layer.{_suggestion(first, set(seen))} Names seen: {names}"


def _suggestion(wanted: str, known: set[str]) -> str:
    near = difflib.get_close_matches(wanted, sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
