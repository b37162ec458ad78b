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
_MOST_NAMES_SHOWN = 12
"""Names of layers in a message. Blocks of most models have fewer."""
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
        self.problem = problem
        self.names = tuple(dict.fromkeys(names))
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
        if self.group is None:
            return self.layout
        return self.layout.part(self.group.degree)

    @property
    def is_stack(self) -> bool:
        return self.parameter != "weight"

    @property
    def weight_name(self) -> str:
        """Name of the weight in the model's state dict."""
        if self.is_stack:
            return self.name
        return f"{self.name}.weight"


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
        self.model = model
        self.config = config
        self.saved = modules_to_save(model, config)
        self.places = places_by_module(model)
        self.takes_all = config.target_modules == ALL_LINEAR
        # Routers are omitted by "all-linear" only: a config that names one prunes it.
        self.routers: set[str] = set()
        if self.takes_all:
            self.routers = model_structure.router_names(model)
        self.refusals: list[CannotBePrunedError] = []

    def targets(self) -> list[Target]:
        targets: list[Target] = []
        for name, module in self.model.named_modules():
            with self.collected_refusals():
                targets += self.of_module(name, module)
        if self.takes_all:
            with self.collected_refusals():
                self.refuse_loose_matrices(targets)
        with self.collected_refusals():
            _refuse_fused_in_files(self.model, targets)
        # A model whose only matches were refused gets the refusals, not the message that nothing matched.
        self.raise_refusals()
        if not targets:
            raise InjectionError(_nothing_matched(self.model, self.config))
        _refuse_tied(self.model, targets)
        return targets

    @contextmanager
    def collected_refusals(self) -> Iterator[None]:
        """Keep what can only be excluded for :meth:`raise_refusals`, so that one message names all of it."""
        try:
            yield
        except CannotBePrunedError as refusal:
            self.refusals.append(refusal)

    def refused_names(self) -> list[str]:
        """Return the names that the refusals exclude, each once, in the order of the refusals."""
        names: list[str] = []
        for refusal in self.refusals:
            names += refusal.names
        return list(dict.fromkeys(names))

    def raise_refusals(self) -> None:
        """Raise the first refusal, with the names that all of them exclude."""
        if not self.refusals:
            return
        first = self.refusals[0]
        names = self.refused_names()
        more = [name for name in names if name not in first.names]
        if not more:
            raise first
        number = len(self.refusals) - 1
        reasons = "reason" if number == 1 else "reasons"
        # The last sentence of a problem introduces its own names, so another replaces it.
        problem = first.problem.rpartition(". ")[0]
        raise CannotBePrunedError(
            f"{problem}. {', '.join(more)} cannot be pruned either, for {number} other {reasons}. Leave all of these "
            "dense with",
            names,
        )

    def of_module(self, name: str, module: nn.Module) -> list[Target]:
        if _is_in(name, self.saved):
            return []
        # Before the exclusions: these may name one stack of the two.
        if model_structure.is_experts(module):
            return self.stacks(name, module)
        if not name or name in self.routers or is_inside(name, self.config.exclude_modules):
            return []
        if self.takes_all:
            is_wanted = is_linear(module) and model_structure.is_inside_block(name, self.model)
        else:
            is_wanted = name_matches(name, self.config.target_modules)
        if not is_wanted:
            return []
        return [self.linear(name, module)]

    def linear(self, name: str, module: Any) -> Target:
        if not is_linear(module):
            raise InjectionError(
                f"target_modules matches {name}, which is a {type(module).__name__} and not a linear layer. Name the "
                "linear layers inside it"
            )
        outputs, inputs = model_structure.linear_shape(module)
        # Fused projections are assumed to be square, so that their number follows from the shape: 3 for q, k and v.
        is_fused = name_matches(name, self.config.fused_modules) and outputs % inputs == 0
        num_matrices = 1
        if is_fused:
            num_matrices = outputs // inputs
        layout = WeightLayout(
            out_features=outputs, in_features=inputs, transposed=is_conv1d(module), num_matrices=num_matrices
        )
        places = self.places[module]
        shape = tuple(sharding.full_shape(module.weight))
        _refuse_quantised(f"{name}.weight", module.weight)
        if shape != layout.shape:
            raise InjectionError(
                f"{name}.weight has shape {shape}, not the {layout.shape} of its {type(module).__name__}. Exclude it "
                "with exclude_modules"
            )
        _require_replaceable(name=name, module=module, places=places, model=self.model)
        return Target(name=name, module=module, places=places, layout=layout, rule=self.config.rule_for(name))

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
        targets: list[Target] = []
        for stack in wanted:
            full_name = f"{name}.{stack}"
            _refuse_quantised(full_name, getattr(module, stack))
            target = Target(
                name=full_name,
                module=module,
                places=((module, stack),),
                layout=layouts[stack],
                rule=self.config.rule_for(full_name),
                parameter=stack,
            )
            targets.append(target)
        return targets

    def is_stack_wanted(self, name: str, stack: str) -> bool:
        if self.is_excluded(name, stack):
            return False
        if self.takes_all:
            return model_structure.is_inside_block(name, self.model)
        wanted = self.config.target_modules
        return name_matches(name, wanted) or name_matches(f"{name}.{stack}", wanted)

    def is_excluded(self, owner: str, attribute: str) -> bool:
        """Return whether ``exclude_modules`` names a Parameter that is a matrix, or its module."""
        # The setting may be one regular expression, so that it cannot be joined with the refused names.
        patterns = (self.config.exclude_modules, self.refused_names())
        return any(is_inside(owner, pattern) or is_inside(f"{owner}.{attribute}", pattern) for pattern in patterns)

    def refuse_loose_matrices(self, targets: list[Target]) -> None:
        """Raise InjectionError for a stack of matrices, or a matrix as large as a pruned one, that would stay dense."""
        loose = self.matrices_left_dense(targets)
        if not loose:
            return
        first = loose[0]
        description = "a stack of matrices" if first.is_stack else "a matrix or a state"
        num_dense = 0
        has_attention = False
        for matrix in loose:
            num_dense += matrix.numel
            has_attention = has_attention or isinstance(matrix.module, nn.MultiheadAttention)
        num_pruned = sum(target.layout.numel for target in targets)
        names = _names_to_exclude(loose, targets)
        if has_attention:
            # Attention reads the weight of its output layer without calling it, so that layer has to stay dense too.
            names += _attention_names(self.model)
        raise CannotBePrunedError(
            f"{first.owner} ({type(first.module).__name__}) has {first.attribute} of shape {first.shape}, "
            f"{description} outside any linear layer, which PST cannot prune. With all like it ({len(loose)} "
            f"Parameters) {num_dense:,} weights would stay dense, next to {num_pruned:,} that would be pruned. If that "
            "is intended, set",
            names,
        )

    def matrices_left_dense(self, targets: list[Target]) -> list[LooseMatrix]:
        """Return the matrices that :meth:`refuse_loose_matrices` refuses, in model order."""
        pruned: set[int] = set()
        sizes: list[int] = []
        for target in targets:
            pruned.add(id(target.weight))
            sizes.append(target.layout.expert.numel)
        least = min(sizes, default=0)
        dense: list[LooseMatrix] = []
        for matrix in model_structure.loose_matrices(self.model):
            # A matrix smaller than any pruned one, such as a table of relative positions, stays dense without a word.
            is_large = matrix.is_stack or 0 < least <= matrix.numel
            if not is_large or matrix.owner in self.routers or _is_in(matrix.owner, self.saved):
                continue
            if self.is_excluded(matrix.owner, matrix.attribute):
                continue
            # A pruned stack of experts is itself a Parameter outside any linear layer.
            if id(getattr(matrix.module, matrix.attribute)) not in pruned:
                dense.append(matrix)
        return dense


def modules_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Return the modules trained in full, by name. Raises InjectionError for a name that matches none."""
    saved = modules_named_to_save(model, config)
    _require_all_found(
        setting="modules_to_save",
        wanted=config.modules_to_save or (),
        matched=saved,
        usable=dict(model.named_modules()),
    )
    return saved


def modules_named_to_save(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Return the modules trained in full, by name; names that match none are skipped, as the model may have changed."""
    if config.modules_to_save is None:
        return _task_head(model)
    return _modules_named(model, config.modules_to_save)


def _modules_named(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that a setting names, by name, in model order; never ``model`` itself, whose name is ""."""
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and name_matches(name, wanted):
            named[name] = module
    return named


def _task_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules between the last block of a transformers model and its output; none for a language model.

    They are the modules on top of its base model, and the pooler inside BERT, ALBERT and others. A model with output
    embeddings is a language model.
    """
    prefix = getattr(model, "base_model_prefix", "") or ""
    base = getattr(model, prefix, None)
    if not isinstance(base, nn.Module):
        # another library's model, in which only these names tell a head
        return {name: child for name, child in model.named_children() if name in HEAD_NAMES}
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        return {}
    candidates: dict[str, nn.Module] = {}
    for name, child in base.named_children():
        if name == "pooler":
            candidates[f"{prefix}.{name}"] = child
    for name, child in model.named_children():
        if child is not base:
            candidates[name] = child
    head: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        # Dropout and activations between them have nothing to train.
        if next(module.parameters(), None) is not None:
            head[name] = module
    return head


def _require_all_found(setting: str, wanted: tuple[str, ...], matched: Iterable[str], usable: Iterable[str]) -> None:
    """Raise InjectionError unless each of the ``wanted`` names matches one of ``matched``; ``usable``: known names."""
    for name in wanted:
        if not any(name_matches(known, (name,)) for known in matched):
            endings = {known.rpartition(".")[2] for known in usable}
            raise InjectionError(
                f"{setting} names {name!r}, which the model does not have.{suggestion((name,), endings)}"
            )


def find_embeddings(model: nn.Module, config: PSTConfig) -> dict[str, nn.Embedding]:
    """Return the embeddings that ``config.update_embeddings`` names, by name, in model order.

    Raises InjectionError for a name that matches none, and for a module that is tied, trained in full or not a plain
    ``nn.Embedding``.
    """
    wanted = config.update_embeddings
    saved = modules_to_save(model, config)
    matches = _modules_named(model, wanted)
    _require_all_found(
        setting="update_embeddings",
        wanted=wanted,
        matched=matches,
        usable=[name for name, module in model.named_modules() if isinstance(module, nn.Embedding)],
    )
    embeddings: dict[str, nn.Embedding] = {}
    for name, module in matches.items():
        _refuse_hooks(name, module)
        if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
            raise InjectionError(
                f"update_embeddings matches {name}, a {type(module).__name__}; only a plain nn.Embedding (no max_norm, "
                "no scale_grad_by_freq) takes a low-rank update"
            )
        if _is_in(name, saved):
            raise InjectionError(f"{name} is in update_embeddings and in modules_to_save; name it in one of them")
        _refuse_tied_embedding(name, module, model)
        embeddings[name] = module
    return embeddings


def _refuse_tied_embedding(name: str, embedding: nn.Embedding, model: nn.Module) -> None:
    for other, holder in model.named_modules():
        if holder is embedding:
            continue
        if any(param is embedding.weight for param in holder.parameters(recurse=False)):
            raise InjectionError(
                f"{name}.weight is tied to {other}.weight: an update of one would be missing in the other. Take "
                f"{name} out of update_embeddings"
            )


def _names_to_exclude(loose: list[LooseMatrix], targets: list[Target]) -> list[str]:
    """Return names for ``exclude_modules`` that leave ``loose`` dense, and as few as possible of ``targets``."""
    holders: set[str] = set()
    for target in targets:
        holders.update(accumulate(target.name.split("."), "{}.{}".format))  # "layers", "layers.0", "layers.0.mlp", ...
    names: list[str] = []
    for matrix in loose:
        # Excluding a module that holds targets would leave these dense too.
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
    return {module: tuple(holders) for module, holders in places.items()}


def put(module: nn.Module | nn.Parameter, places: Places) -> None:
    """Set the attribute of each (parent, attribute) in ``places`` to ``module``."""
    for parent, attribute in places:
        setattr(parent, attribute, module)


def _refuse_quantised(name: str, weight: nn.Parameter) -> None:
    if not weight.dtype.is_floating_point or weight.element_size() < 2:  # less than 2 bytes: fp8
        raise InjectionError(
            f"{name} is {weight.dtype}: quantised base weights cannot be pruned. Load the model in bfloat16 or float32"
        )


def _refuse_tied(model: nn.Module, targets: list[Target]) -> None:
    by_weight = {id(target.weight): target for target in targets}
    for name, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            target = by_weight.get(id(param))
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
    # All linear layers, since targets may be fused in files with layers that are not pruned.
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module._parameters.get("weight") is not None:
            # Only names and shapes matter, and the values may be partitioned.
            tensors[f"{name}.weight"] = torch.empty(sharding.full_shape(module.weight), device="meta")
    written = set(names_in_files(model, tensors).values())
    fused: list[Target] = []
    others: list[str] = []
    for target in layers:
        if target.weight_name in written:
            others.append(target.name)
        else:
            fused.append(target)
    if not fused:
        return
    weight_names: list[str] = []
    endings: list[str] = []
    for target in fused:
        weight_names.append(target.weight_name)
        endings.append(_ending_for(target.name, others))
    raise CannotBePrunedError(
        f"{shortened(weight_names)}: transformers saves each fused with others, in parts or transposed, and exports "
        "cannot do this with pruned weights. Leave all of these dense with",
        endings,
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
        of_same_kind: list[str] = []
        for other, layer in model.named_modules():
            if type(layer) is kind:
                of_same_kind.append(_short_name(other))
        raise CannotBePrunedError(
            f"{name} is a {kind.__name__} with an overridden forward, and a pruned layer would compute what nn.Linear "
            "does. Leave it dense with",
            of_same_kind,
        )
    # Masks and tiles address weights by their flat positions.
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
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        attention = _short_name(name)
        if attention:  # "" if the model is itself an attention
            names.append(attention)
        for child, layer in module.named_children():
            if is_linear(layer):
                names.append(f"{attention}.{child}".lstrip("."))
    return list(dict.fromkeys(names))


def _short_name(name: str) -> str:
    """Return the dotted ending of ``name`` from its last part that is not a number."""
    parts = name.split(".")
    first = len(parts) - 1
    # A number, which names an item of a list, would match the items of other lists too.
    while first > 0 and parts[first].isdigit():
        first -= 1
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
    quoted = [f'"{name}"' for name in names]
    return f"[{', '.join(quoted)}]"


def _nothing_matched(model: nn.Module, config: PSTConfig) -> str:
    endings: dict[str, None] = {}  # in model order
    for name, module in model.named_modules():
        if is_linear(module) or model_structure.is_experts(module):
            endings[name.rpartition(".")[2]] = None
    seen = list(endings)
    names = ", ".join(seen[:_MOST_NAMES_SHOWN])
    if len(seen) > _MOST_NAMES_SHOWN:
        names += ", …"
    patterns = config.target_modules
    shown = patterns if isinstance(patterns, str) else list(patterns)
    return f"target_modules {shown!r} matched no linear layer.{suggestion(patterns, set(seen))} Names seen: {names}"


def suggestion(wanted: str | Sequence[str], known: set[str]) -> str:
    """Return a sentence, after a space, with the name that was probably meant by a string or the first of a list.

    ``known``: last parts of names. Empty if none of them is similar.
    """
    if isinstance(wanted, str) and wanted in known:
        return f' A string is a regular expression for whole names; for the layers of that name write ["{wanted}"].'
    first = wanted if isinstance(wanted, str) else "".join(wanted[:1])
    near = difflib.get_close_matches(first, sorted(known), n=1)
    if not near:
        return ""
    return f" Did you mean {near[0]!r}?"
