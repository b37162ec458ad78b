"""The modules to prune and the modules to train in full, with PEFT's meaning of the names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from pst_ds.config.pst import PSTConfig, is_inside, name_matches
from pst_ds.core.layout import WeightLayout
from pst_ds.errors import InputError
from pst_ds.nn import model_structure
from pst_ds.nn.model_structure import LooseMatrix, is_conv1d, is_linear
from pst_ds.nn.replaceable import attention_names, hooks, listed, short_name, why_not_replaceable
from pst_ds.parallel import zero3

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head", "qa_outputs")
"""Names of task heads, for models that do not say which part of them is the base model."""


class InjectionError(InputError):
    """A model, or the modules named for it, cannot be injected; the message names the module and the way out."""


@dataclass(frozen=True, slots=True)
class Target:
    """One layer to prune: its module, every (parent, attribute) that holds it, and its layout.

    A stack of experts is a Parameter of ``module``, which holds it in one place.
    """

    name: str
    module: Any
    places: tuple[tuple[nn.Module, str], ...]
    layout: WeightLayout
    parameter: str = "weight"
    """Name of the weight in ``module``."""

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)

    @property
    def is_stack(self) -> bool:
        return self.parameter != "weight"

    @property
    def weight_name(self) -> str:
        """Name of the weight in the model's state dict."""
        return self.name if self.is_stack else f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class EmbeddingTarget:
    """One embedding to update, and every (parent, attribute) that holds it."""

    name: str
    module: nn.Embedding
    places: tuple[tuple[nn.Module, str], ...]


def find_targets(model: nn.Module, config: PSTConfig) -> list[Target]:
    """The layers that ``config`` prunes, in model order.

    "all-linear" is every linear layer inside the blocks, and the stacks of experts that transformers lets other
    code compute, but the routers of experts: they choose, hold next to nothing, and stay dense and frozen. Name them in
    ``target_modules`` to prune them.

    Raises InjectionError when nothing matches, when a match is tied, quantised or not linear, or cannot be replaced
    (:func:`pst_ds.nn.replaceable.why_not_replaceable`), and when "all-linear" would leave matrices inside the blocks
    dense because they are not linear layers, such as experts in a 3-D Parameter of another form. Those that
    ``exclude_modules`` names stay dense and frozen.
    """
    saved = modules_to_save(model, config)
    places = places_by_module(model)
    routers = model_structure.router_names(model) if config.target_modules == ALL_LINEAR else set()
    targets = []
    for name, module in model.named_modules():
        if model_structure.is_experts(module):
            targets += _stacks(name, module, model, config, saved)
            continue
        if name in routers or not _is_wanted(name, module, model, config, saved):
            continue
        if not is_linear(module):
            raise InjectionError(
                f"target_modules matches {name}, a {type(module).__name__}, which is no linear layer; name the linear "
                "layers inside it"
            )
        _refuse_unfit(name, module, places[module], model)
        targets.append(Target(name, module, places[module], _layout(name, module, config)))
    if config.target_modules == ALL_LINEAR:
        _refuse_loose_matrices(model, config, saved, targets, routers)
    if not targets:
        raise InjectionError(_nothing_matched(model, config))
    _refuse_tied(model, targets)
    return targets


def _stacks(
    name: str, module: nn.Module, model: nn.Module, config: PSTConfig, saved: dict[str, nn.Module]
) -> list[Target]:
    """The stacks of an experts module that ``config`` prunes; it may name the module, or a stack."""
    wanted = {
        attribute
        for attribute in model_structure.stack_names(module)
        if not _is_in(name, saved)
        and not _is_excluded(name, attribute, config)
        and (
            model_structure.is_inside_block(name, model)
            if config.target_modules == ALL_LINEAR
            else any(name_matches(known, config.target_modules) for known in (name, f"{name}.{attribute}"))
        )
    }
    if not wanted:
        return []
    try:
        layouts = model_structure.stack_layouts(module)
    except ValueError as error:
        raise InjectionError(
            f"{name} ({type(module).__name__}) has another form than the experts that PST can prune: {error}. Leave "
            f"it dense with exclude_modules = {listed([short_name(name)])}"
        ) from None
    if module._is_expert_parallel:
        raise InjectionError(
            f"{name} has its experts on several ranks (expert parallelism), where no rank could rank a whole stack; "
            "load the model without a distributed_config"
        )
    found = [
        Target(f"{name}.{attribute}", module, ((module, attribute),), layout, attribute)
        for attribute, layout in layouts.items()
        if attribute in wanted
    ]
    for target in found:
        _refuse_quantised(target)
    return found


def modules_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """The modules trained in full, by name; raises InjectionError for a name that matches none."""
    found = modules_named_to_save(model, config)
    _require_all_found("modules_to_save", config.modules_to_save or (), found, [n for n, _ in model.named_modules()])
    return found


def modules_named_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """The same for a model that may have changed since: a name that matches none is skipped."""
    if config.modules_to_save is None:
        return _task_head(model)
    return {n: m for n, m in model.named_modules() if n and name_matches(n, config.modules_to_save)}


def _task_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return what lies between the last block of a model of transformers and its output; nothing for a language model.

    That is what it has on top of its base model, and the pooler that BERT, ALBERT and others have inside it. A language
    model is known by its output embeddings.
    """
    base = getattr(model, prefix := getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(base, nn.Module):
        return {n: m for n, m in model.named_children() if n in HEAD_NAMES}
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        return {}
    poolers = {f"{prefix}.{n}": m for n, m in base.named_children() if n == "pooler"}
    on_top = {n: m for n, m in model.named_children() if m is not base}
    return {n: m for n, m in (poolers | on_top).items() if any(True for _ in m.parameters())}


def _require_all_found(setting: str, wanted: tuple[str, ...], found: Iterable[str], usable: Iterable[str]) -> None:
    """Refuse a name that matches none of the modules ``found``. ``usable``: names of those that it could have meant."""
    for name in wanted:
        if not any(name_matches(n, (name,)) for n in found):
            raise InjectionError(
                f"{setting} names {name!r}, which the model does not have."
                + suggestion((name,), {n.rpartition(".")[2] for n in usable})
            )


def find_embeddings(model: nn.Module, config: PSTConfig) -> list[EmbeddingTarget]:
    """The embeddings that ``config.update_embeddings`` names, in model order.

    Raises InjectionError for a name that matches none, and for one that is tied, trained in full or no plain
    ``nn.Embedding``.
    """
    wanted, saved, places = config.update_embeddings, modules_to_save(model, config), places_by_module(model)
    found = {n: m for n, m in model.named_modules() if n and name_matches(n, wanted)}
    embeddings = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    _require_all_found("update_embeddings", wanted, found, embeddings)
    for name, module in found.items():
        if hooks(name, module):
            raise InjectionError(hooks(name, module))
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
            raise InjectionError(
                f"update_embeddings matches {name}, a {type(module).__name__}; only a plain nn.Embedding (no max_norm, "
                "no scale_grad_by_freq) takes a low-rank update"
            )
        if _is_in(name, saved):
            raise InjectionError(f"{name} is in update_embeddings and in modules_to_save; name it in one of them")
        for other, holder in model.named_modules():
            if holder is not module and any(p is module.weight for p in holder.parameters(recurse=False)):
                raise InjectionError(
                    f"{name}.weight is tied to {other}.weight: an update of one would be missing in the other. Take "
                    f"{name} out of update_embeddings"
                )
    return [EmbeddingTarget(name, module, places[module]) for name, module in found.items()]


def _refuse_loose_matrices(
    model: nn.Module, config: PSTConfig, saved: dict[str, nn.Module], targets: list[Target], routers: set[str]
) -> None:
    """A stack of matrices, or a matrix as large as one that is pruned, must not stay dense unsaid."""
    least = min((t.layout.expert.numel for t in targets), default=0)
    pruned = {id(t.weight) for t in targets}
    loose: list[LooseMatrix] = []
    for matrix in model_structure.loose_matrices(model):
        owner = matrix.owner
        is_known = owner in routers or _is_in(owner, saved) or _is_excluded(owner, matrix.attribute, config)
        is_known = is_known or id(getattr(matrix.module, matrix.attribute)) in pruned
        if not is_known and (matrix.is_stack or 0 < least <= matrix.numel):
            loose.append(matrix)
    if not loose:
        return
    first, dense = loose[0], sum(matrix.numel for matrix in loose)
    owners = _names_to_exclude(loose, targets)
    if any(isinstance(matrix.module, nn.MultiheadAttention) for matrix in loose):
        owners += attention_names(model)
    raise InjectionError(
        f"{first.owner} ({type(first.module).__name__}) has {first.attribute} of shape {first.shape}, "
        f"{'a stack of matrices' if first.is_stack else 'a matrix or a state'} that belongs to no linear layer, which "
        f"PST cannot prune. With all like it ({len(loose)} Parameters) {dense:,} weights would stay dense, next to "
        f"{sum(t.layout.numel for t in targets):,} that would be pruned. If that is meant, say so with "
        f"exclude_modules = {listed(dict.fromkeys(owners))}"
    )


def _names_to_exclude(loose: list[LooseMatrix], targets: list[Target]) -> list[str]:
    """Return names for ``exclude_modules`` that leave ``loose`` dense, and as few as possible of ``targets``."""
    holders = {part for target in targets for part in accumulate(target.name.split("."), "{}.{}".format)}
    names = []
    for matrix in loose:
        names.append(matrix.attribute if matrix.owner in holders else short_name(matrix.owner))
        if matrix.attribute == "A_log" and hasattr(matrix.module, "dt_proj"):
            names.append("dt_proj")  # Mamba's mixers multiply with its weight without calling it: a mask has no effect
    return names


def _is_excluded(owner: str, attribute: str, config: PSTConfig) -> bool:
    """Return whether ``exclude_modules`` names a Parameter that is a matrix, or what holds it."""
    return any(is_inside(name, config.exclude_modules) for name in (owner, f"{owner}.{attribute}"))


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _is_wanted(name: str, module: nn.Module, model: nn.Module, config: PSTConfig, saved: dict[str, nn.Module]) -> bool:
    if not name or _is_in(name, saved) or is_inside(name, config.exclude_modules):
        return False
    if config.target_modules == ALL_LINEAR:
        return is_linear(module) and model_structure.is_inside_block(name, model)
    return name_matches(name, config.target_modules)


def places_by_module(model: nn.Module) -> dict[nn.Module, tuple[tuple[nn.Module, str], ...]]:
    """Every (parent, attribute) that holds a module, by module."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():  # named_children() names a child held twice only once
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return {module: tuple(found) for module, found in places.items()}


def put(module: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
    """Make ``module`` the attribute that each of ``places``, (parent, attribute), is."""
    for parent, attribute in places:
        setattr(parent, attribute, module)


def _layout(name: str, module: Any, config: PSTConfig) -> WeightLayout:
    outputs, inputs = model_structure.linear_shape(module)
    fused = name_matches(name, config.fused_modules) and outputs % inputs == 0
    return WeightLayout(outputs, inputs, is_conv1d(module), outputs // inputs if fused else 1)


def _refuse_unfit(name: str, module: Any, places: tuple[tuple[nn.Module, str], ...], model: nn.Module) -> None:
    layout = _layout(name, module, PSTConfig())
    weight = module.weight
    _refuse_quantised(Target(name, module, places, layout))
    if tuple(zero3.full_shape(weight)) != layout.shape:
        raise InjectionError(
            f"{name}.weight has shape {tuple(zero3.full_shape(weight))}, not the {layout.shape} of its "
            f"{type(module).__name__}; exclude it with exclude_modules"
        )
    if problem := why_not_replaceable(name, module, [holder for holder, _ in places], model):
        raise InjectionError(problem)


def _refuse_quantised(target: Target) -> None:
    weight = target.weight
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise InjectionError(
            f"{target.weight_name} is {weight.dtype}: quantised base weights cannot be pruned. Load the model in "
            "bfloat16 or float32"
        )


def _refuse_tied(model: nn.Module, targets: list[Target]) -> None:
    wanted = {id(t.weight): t for t in targets}
    for name, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            target = wanted.get(id(param))
            if target is not None and (module, attribute) != (target.module, target.parameter):
                raise InjectionError(
                    f"{target.weight_name} is tied to {name}.{attribute}: pruning one would prune the other. Leave it "
                    f'out with exclude_modules = ["{target.name}"]'
                )


def _nothing_matched(model: nn.Module, config: PSTConfig) -> str:
    layers = [n for n, m in model.named_modules() if is_linear(m) or model_structure.is_experts(m)]
    seen = list(dict.fromkeys(n.rpartition(".")[2] for n in layers))
    patterns = config.target_modules
    shown = patterns if isinstance(patterns, str) else list(patterns)
    names = ", ".join(seen[:12]) + (", …" if len(seen) > 12 else "")
    return f"target_modules {shown!r} matched no linear layer.{suggestion(patterns, set(seen))} Names seen: {names}"


def suggestion(wanted: str | tuple[str, ...], known: set[str]) -> str:
    """The sentence that says what may have been meant by a string, or a list's first; nothing where nothing is near.

    ``known``: last parts of names. The sentence comes after a space.
    """
    if isinstance(wanted, str) and wanted in known:
        return f' A string is a regular expression for whole names; for the layers of that name write ["{wanted}"].'
    first = wanted if isinstance(wanted, str) else "".join(wanted[:1])
    near = difflib.get_close_matches(first, sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
