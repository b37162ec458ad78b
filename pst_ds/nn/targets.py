"""Find the modules to prune and the modules to train in full; names match as in PEFT."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from pst_ds.config.pst import MaskRule, PSTConfig, is_inside, name_matches
from pst_ds.core.layout import WeightLayout
from pst_ds.errors import InputError, shortened
from pst_ds.formats.base_weights import names_in_files
from pst_ds.nn import model_structure
from pst_ds.nn.model_structure import LooseMatrix, is_conv1d, is_linear
from pst_ds.parallel import sharding
from pst_ds.parallel.expert_parallel import ExpertGroup

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head", "qa_outputs")
"""Names of task heads, for models that do not name their base model."""
SAME_AS_LINEAR = ("FalconLinear",)
"""Classes with another forward than nn.Linear that computes the same."""
_HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward pre-",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward pre-",
}
Places = tuple[tuple[nn.Module, str], ...]
"""Every (parent, attribute) that holds a module."""


class InjectionError(InputError):
    """A model, or the modules named for it, cannot be injected; the message names the module and the fix."""


class CannotBePrunedError(InjectionError):
    """Layers or matrices that can only stay dense; the message ends with the ``exclude_modules`` that leave them."""

    def __init__(self, problem: str, names: Iterable[str]):
        """``problem``: what is wrong, and the start of a sentence that ends with the names to exclude."""
        self.problem, self.names = problem, tuple(dict.fromkeys(names))
        super().__init__(f"{problem} exclude_modules = {listed(self.names)}")


@dataclass(frozen=True, slots=True)
class Target:
    """A layer to prune. A stack of experts is a Parameter of ``module``, which holds it in one place."""

    name: str
    module: Any
    places: Places
    layout: WeightLayout
    rule: MaskRule
    parameter: str = "weight"
    """Name of the weight in ``module``."""
    group: ExpertGroup | None = None
    """The ranks that own parts of a stack, of which ``weight`` is this rank's; ``layout`` is that of the stack."""

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)

    @property
    def own_layout(self) -> WeightLayout:
        """Layout of ``weight``."""
        return self.layout if self.group is None else self.layout.part(self.group.degree)

    @property
    def is_stack(self) -> bool:
        return self.parameter != "weight"

    @property
    def weight_name(self) -> str:
        """Name of the weight in the model's state dict."""
        return self.name if self.is_stack else f"{self.name}.weight"


def resolve_targets(model: nn.Module, config: PSTConfig) -> list[Target]:
    """Return the layers that ``config`` prunes, in model order, each with its layout and mask rule.

    "all-linear" selects every linear layer inside the blocks, and the stacks of experts that transformers lets other
    code compute. It omits the routers of experts: they are tiny, and choose which experts run. To prune them, name them
    in ``target_modules``. Modules that ``exclude_modules`` names stay dense and frozen.

    Raises InjectionError if nothing matches; if a match is tied, quantised, not linear, or cannot be replaced; and if
    "all-linear" would leave matrices inside the blocks dense because no linear layer holds them, such as experts in a
    3-D Parameter of another form.
    """
    return _Resolver(model, config).targets()


class _Resolver:
    """One pass over the modules of a model."""

    def __init__(self, model: nn.Module, config: PSTConfig):
        self.model, self.config = model, config
        self.saved, self.places = modules_to_save(model, config), places_by_module(model)
        self.takes_all = config.target_modules == ALL_LINEAR
        self.routers = model_structure.router_names(model) if self.takes_all else set()
        self.refusals: list[CannotBePrunedError] = []

    def targets(self) -> list[Target]:
        found: list[Target] = []
        for name, module in self.model.named_modules():
            with self.collected_refusals():
                found += self.of_module(name, module)
        if self.takes_all:
            with self.collected_refusals():
                self.refuse_loose_matrices(found)
        with self.collected_refusals():
            _refuse_fused_in_files(self.model, found)
        self.raise_refusals()
        if not found:
            raise InjectionError(_nothing_matched(self.model, self.config))
        _refuse_tied(self.model, found)
        return found

    @contextmanager
    def collected_refusals(self) -> Iterator[None]:
        """Keep what can only be excluded for :meth:`raise_refusals`, so that one message names all of it."""
        try:
            yield
        except CannotBePrunedError as refusal:
            self.refusals.append(refusal)

    def raise_refusals(self) -> None:
        """Raise the first refusal, with the names that all of them exclude."""
        if not self.refusals:
            return
        first = self.refusals[0]
        names = list(dict.fromkeys(name for refusal in self.refusals for name in refusal.names))
        more = [name for name in names if name not in first.names]
        if not more:
            raise first
        kinds = len(self.refusals) - 1
        raise CannotBePrunedError(
            f"{first.problem.rpartition('. ')[0]}. {', '.join(more)} cannot be pruned either, for "
            f"{kinds} other {'reason' if kinds == 1 else 'reasons'}. Leave all of these dense with",
            names,
        )

    def of_module(self, name: str, module: nn.Module) -> list[Target]:
        if _is_in(name, self.saved):
            return []
        if model_structure.is_experts(module):
            return self.stacks(name, module)
        if not name or name in self.routers or is_inside(name, self.config.exclude_modules):
            return []
        if self.takes_all:
            is_wanted = is_linear(module) and model_structure.is_inside_block(name, self.model)
        else:
            is_wanted = name_matches(name, self.config.target_modules)
        return [self.linear(name, module)] if is_wanted else []

    def linear(self, name: str, module: Any) -> Target:
        if not is_linear(module):
            raise InjectionError(
                f"target_modules matches {name}, which is a {type(module).__name__} and not a linear layer. Name the "
                "linear layers inside it"
            )
        outputs, inputs = model_structure.linear_shape(module)
        is_fused = name_matches(name, self.config.fused_modules) and outputs % inputs == 0
        layout = WeightLayout(outputs, inputs, is_conv1d(module), outputs // inputs if is_fused else 1)
        places, shape = self.places[module], tuple(sharding.full_shape(module.weight))
        _refuse_quantised(f"{name}.weight", module.weight)
        if shape != layout.shape:
            raise InjectionError(
                f"{name}.weight has shape {shape}, not the {layout.shape} of its {type(module).__name__}. Exclude it "
                "with exclude_modules"
            )
        _require_replaceable(name, module, places, self.model)
        return Target(name, module, places, layout, self.config.rule_for(name))

    def stacks(self, name: str, module: nn.Module) -> list[Target]:
        """Return the stacks of an experts module that are pruned; the config may name the module, or a stack."""
        wanted = [stack for stack in model_structure.stack_names(module) if self.is_stack_wanted(name, stack)]
        if not wanted:
            return []
        try:
            layouts = model_structure.stack_layouts(module)
        except ValueError as error:
            raise CannotBePrunedError(
                f"{name} ({type(module).__name__}) has another form than the experts that PST can prune: {error}. "
                "Leave it dense with",
                [_short_name(name)],
            ) from None
        if module._is_expert_parallel:
            raise InjectionError(
                f"{name} has its experts on several ranks (expert parallelism), where no rank could rank a whole "
                "stack. Load the model without a distributed_config"
            )
        found = []
        for stack in wanted:
            full_name = f"{name}.{stack}"
            _refuse_quantised(full_name, getattr(module, stack))
            rule = self.config.rule_for(full_name)
            found.append(Target(full_name, module, ((module, stack),), layouts[stack], rule, stack))
        return found

    def is_stack_wanted(self, name: str, stack: str) -> bool:
        if self.is_excluded(name, stack):
            return False
        if self.takes_all:
            return model_structure.is_inside_block(name, self.model)
        return any(name_matches(known, self.config.target_modules) for known in (name, f"{name}.{stack}"))

    def is_excluded(self, owner: str, attribute: str) -> bool:
        """Return whether ``exclude_modules`` names a Parameter that is a matrix, or its module."""
        refused = [name for refusal in self.refusals for name in refusal.names]
        # The setting may be one regular expression, so that it cannot be joined with the refused names.
        patterns = (self.config.exclude_modules, refused)
        names = (owner, f"{owner}.{attribute}")
        return any(is_inside(name, pattern) for name in names for pattern in patterns)

    def refuse_loose_matrices(self, targets: list[Target]) -> None:
        """Raise InjectionError for a stack of matrices, or a matrix as large as a pruned one, that would stay dense."""
        least = min((t.layout.expert.numel for t in targets), default=0)
        pruned = {id(t.weight) for t in targets}
        loose = [
            matrix
            for matrix in model_structure.loose_matrices(self.model)
            if (matrix.is_stack or 0 < least <= matrix.numel)
            and matrix.owner not in self.routers
            and not _is_in(matrix.owner, self.saved)
            and not self.is_excluded(matrix.owner, matrix.attribute)
            and id(getattr(matrix.module, matrix.attribute)) not in pruned
        ]
        if not loose:
            return
        first, dense = loose[0], sum(matrix.numel for matrix in loose)
        owners = _names_to_exclude(loose, targets)
        if any(isinstance(matrix.module, nn.MultiheadAttention) for matrix in loose):
            owners += _attention_names(self.model)
        raise CannotBePrunedError(
            f"{first.owner} ({type(first.module).__name__}) has {first.attribute} of shape {first.shape}, "
            f"{'a stack of matrices' if first.is_stack else 'a matrix or a state'} outside any linear layer, which "
            f"PST cannot prune. With all like it ({len(loose)} Parameters) {dense:,} weights would stay dense, next to "
            f"{sum(t.layout.numel for t in targets):,} that would be pruned. If that is intended, set",
            owners,
        )


def modules_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Return the modules trained in full, by name. Raises InjectionError for a name that matches none."""
    found = modules_named_to_save(model, config)
    _require_all_found("modules_to_save", config.modules_to_save or (), found, [n for n, _ in model.named_modules()])
    return found


def modules_named_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Return the modules trained in full, by name; names that match none are skipped, as the model may have changed."""
    if config.modules_to_save is None:
        return _task_head(model)
    return {n: m for n, m in model.named_modules() if n and name_matches(n, config.modules_to_save)}


def _task_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules between the last block of a transformers model and its output; none for a language model.

    They are the modules on top of its base model, and the pooler inside BERT, ALBERT and others. A model with output
    embeddings is a language model.
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
    for name in wanted:
        if not any(name_matches(n, (name,)) for n in found):
            raise InjectionError(
                f"{setting} names {name!r}, which the model does not have."
                + suggestion((name,), {n.rpartition(".")[2] for n in usable})
            )


def find_embeddings(model: nn.Module, config: PSTConfig) -> dict[str, nn.Embedding]:
    """Return the embeddings that ``config.update_embeddings`` names, by name, in model order.

    Raises InjectionError for a name that matches none, and for a module that is tied, trained in full or not a plain
    ``nn.Embedding``.
    """
    wanted, saved = config.update_embeddings, modules_to_save(model, config)
    found = {n: m for n, m in model.named_modules() if n and name_matches(n, wanted)}
    embeddings = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    _require_all_found("update_embeddings", wanted, found, embeddings)
    for name, module in found.items():
        _refuse_hooks(name, module)
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
    return {name: module for name, module in found.items() if isinstance(module, nn.Embedding)}


def _names_to_exclude(loose: list[LooseMatrix], targets: list[Target]) -> list[str]:
    """Return names for ``exclude_modules`` that leave ``loose`` dense, and as few as possible of ``targets``."""
    holders = {part for target in targets for part in accumulate(target.name.split("."), "{}.{}".format)}
    names = []
    for matrix in loose:
        names.append(matrix.attribute if matrix.owner in holders else _short_name(matrix.owner))
        if matrix.attribute == "A_log" and hasattr(matrix.module, "dt_proj"):
            names.append("dt_proj")  # Mamba's mixers multiply with its weight without calling it: a mask has no effect
    return names


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def places_by_module(model: nn.Module) -> dict[nn.Module, Places]:
    """Return every (parent, attribute) that holds a module, by module."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():  # named_children() names a child held twice only once
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return {module: tuple(found) for module, found in places.items()}


def put(module: nn.Module | nn.Parameter, places: Places) -> None:
    """Set the attribute of each (parent, attribute) in ``places`` to ``module``."""
    for parent, attribute in places:
        setattr(parent, attribute, module)


def _refuse_quantised(name: str, weight: nn.Parameter) -> None:
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        raise InjectionError(
            f"{name} is {weight.dtype}: quantised base weights cannot be pruned. Load the model in bfloat16 or float32"
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


def _refuse_fused_in_files(model: nn.Module, targets: list[Target]) -> None:
    """Raise InjectionError, with all names, for layers that transformers saves as other tensors: fused with other
    layers, in several parts, or transposed.

    An export writes layer by layer, and could not write such tensors.
    """
    layers = [target for target in targets if not target.is_stack]
    if not layers or not model_structure.is_of_transformers(model):
        return
    # Only names and shapes matter, and the values may be partitioned.
    tensors = {
        f"{name}.weight": torch.empty(sharding.full_shape(module.weight), device="meta")
        for name, module in model.named_modules()
        if is_linear(module) and module._parameters.get("weight") is not None
    }
    written = set(names_in_files(model, tensors).values())
    fused = [target for target in layers if target.weight_name not in written]
    if fused:
        others = [target.name for target in layers if target not in fused]
        raise CannotBePrunedError(
            f"{shortened([target.weight_name for target in fused])}: transformers saves each fused with others, in "
            "parts or transposed, and exports cannot do this with pruned weights. Leave all of these dense with",
            list(dict.fromkeys(_ending_for(target.name, others) for target in fused)),
        )


def _require_replaceable(name: str, module: nn.Module, places: Places, model: nn.Module) -> None:
    """Raise InjectionError, with the fix, if the linear layer ``name`` of ``model`` computes or holds something else
    than an nn.Linear."""
    leave_dense = f'leave it dense with exclude_modules = ["{name}"]'
    if any(isinstance(holder, nn.MultiheadAttention) for holder, _ in places):
        raise CannotBePrunedError(
            f"{name} belongs to a MultiheadAttention, which reads the layer's weight and never calls it: a mask would "
            "prune nothing. Leave it dense with",
            _attention_names(model),
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise InjectionError(
            f"{name}.weight is not a Parameter but computed from others, as by weight_norm or parametrizations. Remove "
            f"them first (torch.nn.utils.parametrize.remove_parametrizations), or {leave_dense}"
        )
    kind = type(module)
    is_patched = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's only moves tensors
    is_plain = kind.forward is nn.Linear.forward or kind.__name__ in SAME_AS_LINEAR
    if not is_conv1d(module) and (is_patched or not is_plain):
        raise CannotBePrunedError(
            f"{name} is a {kind.__name__} with an overridden forward, and a pruned layer would compute what nn.Linear "
            "does. Leave it dense with",
            [_short_name(other) for other, m in model.named_modules() if type(m) is kind],
        )
    if not weight.is_contiguous():
        raise InjectionError(
            f"{name}.weight is not contiguous in memory; make it so (module.weight = "
            f"nn.Parameter(module.weight.contiguous())), or {leave_dense}"
        )
    _refuse_hooks(name, module)


def _refuse_hooks(name: str, module: nn.Module) -> None:
    for attribute, kind in _HOOKS.items():
        if getattr(module, attribute):
            raise InjectionError(
                f"{name} has a {kind} hook, which would be lost with the module that is replaced; register it after "
                f'inject_pst, on the new one, or leave it dense with exclude_modules = ["{name}"]'
            )


def _attention_names(model: nn.Module) -> list[str]:
    """Return the names of every nn.MultiheadAttention and its linear layers, for ``exclude_modules``."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            own = _short_name(name)
            children = [child for child, m in module.named_children() if is_linear(m)]
            found += [*([own] if own else []), *(f"{own}.{child}".lstrip(".") for child in children)]
    return list(dict.fromkeys(found))


def _short_name(name: str) -> str:
    """Return the dotted ending of ``name`` from its last part that is not a number."""
    parts = name.split(".")
    first = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[first:])


def _ending_for(name: str, others: Collection[str]) -> str:
    """Return the shortest dotted ending of ``name``, as of :func:`_short_name`, that matches none of ``others``."""
    ending = _short_name(name)
    while ending != name and any(is_inside(other, (ending,)) for other in others):
        before = name.removesuffix(f".{ending}")
        ending = f"{_short_name(before)}.{ending}"
    return ending


def listed(names: Iterable[str]) -> str:
    """Return names as a list in a run file: ["one", "other"]."""
    return f"[{', '.join(chr(34) + name + chr(34) for name in names)}]"


def _nothing_matched(model: nn.Module, config: PSTConfig) -> str:
    layers = [n for n, m in model.named_modules() if is_linear(m) or model_structure.is_experts(m)]
    seen = list(dict.fromkeys(n.rpartition(".")[2] for n in layers))
    patterns = config.target_modules
    shown = patterns if isinstance(patterns, str) else list(patterns)
    names = ", ".join(seen[:12]) + (", …" if len(seen) > 12 else "")
    return f"target_modules {shown!r} matched no linear layer.{suggestion(patterns, set(seen))} Names seen: {names}"


def suggestion(wanted: str | Sequence[str], known: set[str]) -> str:
    """Return a sentence, after a space, with the name that was probably meant by a string or the first of a list.

    ``known``: last parts of names. Empty if none of them is similar.
    """
    if isinstance(wanted, str) and wanted in known:
        return f' A string is a regular expression for whole names; for the layers of that name write ["{wanted}"].'
    first = wanted if isinstance(wanted, str) else "".join(wanted[:1])
    near = difflib.get_close_matches(first, sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
