"""Find the parts of a model's blocks: linear layers, experts, other matrices, and routers.

Everything is found by shape and position, never by name, so that new model families work unchanged.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pst_ds.core.layout import WeightLayout
from pst_ds.parallel import sharding

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ExpertsModule: TypeAlias = Any
"""A module of transformers for which :func:`is_experts` is true."""
_EXPERT_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
"""Attributes of experts modules that use transformers' ``use_experts_implementation``."""


def modules_of(model: nn.Module, kind: type[ModuleT]) -> dict[str, ModuleT]:
    """Return the modules of class ``kind`` in ``model`` by name, in model order; a shared module once."""
    modules: dict[str, ModuleT] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            modules[name] = module
    return modules


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether ``model`` is a model of transformers, not one that wraps such a model."""
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is an nn.Linear, or the Conv1D of transformers' GPT-2."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear layer."""
    if is_conv1d(module):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def model_width(model: nn.Module) -> int:
    """Return the hidden size of a model: the number of inputs that most of the linear layers in its blocks have."""
    counts: Counter[int] = Counter()
    for name, module in model.named_modules():
        if is_inside_block(name, model):
            inputs = getattr(module, "in_features", getattr(module, "nx", 0))  # nx: Conv1D's
            if inputs:
                counts[int(inputs)] += 1
    if not counts:
        return 1
    ((width, _),) = counts.most_common(1)
    return width


def untied_linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the nn.Linear and Conv1D layers by name, except those with a shared weight."""
    users = Counter[int]()
    for module in model.modules():
        users.update(map(id, module.parameters(recurse=False)))
    untied: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_linear(module) and users[id(module.weight)] == 1:
            untied[name] = module
    return untied


def is_inside_block(name: str, model: nn.Module) -> bool:
    """Return whether a module is inside an item of a ModuleList, in which transformers stacks its blocks."""
    return bool(outermost_list(name, model))


def outermost_list(name: str, model: nn.Module) -> str:
    """Return the name of the outermost stack of blocks around a module; "" outside of any.

    A stack is a ModuleList, but not one of single layers next to one of blocks, such as Gemma-3n's altup_projections.
    """
    parts = name.split(".")
    for position in range(1, len(parts)):
        if not parts[position].isdigit():  # items of a ModuleList have numbers as names
            continue
        parent = ".".join(parts[:position])
        stack = model.get_submodule(parent)
        if isinstance(stack, nn.ModuleList):
            siblings = model.get_submodule(parent.rpartition(".")[0]).children()
            if _holds_blocks(stack) or not any(_holds_blocks(sibling) for sibling in siblings):
                return parent
    return ""


def _holds_blocks(module: nn.Module) -> bool:
    """Return whether ``module`` is a ModuleList with an item that has parts, and is not a single layer."""
    if not isinstance(module, nn.ModuleList):
        return False
    return any(next(item.children(), None) is not None for item in module)


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers lets other code compute this experts module (``ALL_EXPERTS_FUNCTIONS``)."""
    return all(flag in vars(module) for flag in _EXPERT_FLAGS)


def experts_modules(model: nn.Module) -> dict[str, ExpertsModule]:
    """Return the experts modules of ``model`` by name, in model order."""
    modules: dict[str, ExpertsModule] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            modules[name] = module
    return modules


def stack_names(experts: ExpertsModule) -> tuple[str, str]:
    """Return the attributes of an experts module that hold its stacks, in the order of multiplication."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return first, "down_proj"


def stack_layouts(experts: ExpertsModule) -> dict[str, WeightLayout]:
    """Return the layouts of the stacks of an experts module, by attribute. Raises ValueError for another form."""
    first, last = stack_names(experts)
    # Gate and up projection have half of the outputs each. Only if the halves are not interleaved can each be ranked
    # separately.
    fused = 2 if experts.has_gate and experts.is_concatenated else 1
    layouts = {}
    for attribute in (first, last):
        shape: tuple[int, ...] = ()
        param = experts._parameters.get(attribute)
        if param is not None:
            shape = tuple(sharding.full_shape(param))
        if len(shape) != 3 or shape[0] != experts.num_experts:
            raise ValueError(f"{attribute} is not a Parameter that stacks {experts.num_experts} matrices")
        num_experts, outputs, inputs = shape
        if experts.is_transposed:  # (experts, inputs, outputs)
            inputs, outputs = outputs, inputs
        matrices = num_experts
        if attribute == first:
            matrices *= fused
        layouts[attribute] = WeightLayout(
            out_features=num_experts * outputs,
            in_features=inputs,
            transposed=experts.is_transposed,
            num_matrices=matrices,
            num_experts=num_experts,
        )
    made = layouts[first].expert.out_features
    taken = layouts[last].in_features
    expected = taken
    if experts.has_gate:
        # A gated expert multiplies one half of the outputs with the other.
        expected = 2 * taken
    if made != expected:
        raise ValueError(f"{first} makes {made} outputs, and {last} takes {taken}")
    return layouts


def known_stacks(model: nn.Module) -> dict[str, WeightLayout]:
    """Return the layouts of the expert stacks of ``model``, by the names of their Parameters; omit other forms."""
    known: dict[str, WeightLayout] = {}
    for owner, module in experts_modules(model).items():
        with suppress(ValueError):  # another form
            for attribute, layout in stack_layouts(module).items():
                known[f"{owner}.{attribute}"] = layout
    return known


@dataclass(frozen=True, slots=True)
class LooseMatrix:
    """A Parameter inside the blocks that is a matrix, or a stack of matrices, outside any linear layer."""

    owner: str
    """Name of the module that holds it."""
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]

    @property
    def is_stack(self) -> bool:
        """True for three or more dimensions, such as (experts, out, in)."""
        return len(self.shape) >= 3

    @property
    def numel(self) -> int:
        return sharding.full_numel(getattr(self.module, self.attribute))


def loose_matrices(model: nn.Module) -> list[LooseMatrix]:
    """Return all such Parameters in model order, except embeddings, convolution kernels, and biases of experts.

    The last two dimensions must be larger than 1: (1, 1, width) is a vector that broadcasts, (channels, 1, width) a
    kernel.
    """
    matrices = []
    for owner, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding | _ConvNd) or not is_inside_block(owner, model):
            continue
        for attribute, param in module.named_parameters(recurse=False):
            shape = tuple(sharding.full_shape(param))
            is_bias = len(shape) == 2 and is_experts(module)  # (experts, out)
            if len(shape) >= 2 and min(shape[-2:]) > 1 and not is_bias:
                matrices.append(LooseMatrix(owner=owner, module=module, attribute=attribute, shape=shape))
    return matrices


def router_names(model: nn.Module) -> set[str]:
    """Return the names of the modules that choose among experts, or weight a shared one.

    A router is next to experts (a Parameter that stacks them, or a ModuleList of equal modules) and maps an expert's
    input to one number per expert, or to a single number: a linear layer, or another module with such a Parameter.
    """
    names = set()
    for container, num_experts, widths in _experts(model):
        parent = container.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_modules(prefix=parent):
            if name == container or name.startswith(container + "."):  # an expert, or a part of one
                continue
            shapes: list[tuple[int, ...]]
            if is_linear(module):
                shapes = [linear_shape(module)]  # of a Conv1D, the other way round than its weight
            else:
                shapes = [tuple(sharding.full_shape(param)) for param in module.parameters(recurse=False)]
            for shape in shapes:
                if len(shape) == 2 and shape[0] in (1, num_experts) and shape[1] in widths:
                    names.add(name)
    return names


def _experts(model: nn.Module) -> Iterator[tuple[str, int, set[int]]]:
    """Yield (name, number of experts, input widths of an expert) for every container of experts inside a block."""
    for matrix in loose_matrices(model):
        if matrix.is_stack:
            parent = matrix.owner.rpartition(".")[0]
            container = matrix.owner
            if is_experts(model.get_submodule(parent)):  # the owner is a PST layer, which holds one stack
                container = parent
            # Which of the other dimensions are the inputs depends on the family.
            yield container, matrix.shape[0], set(matrix.shape[1:])
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not is_inside_block(name, model):
            continue
        if len(module) > 1 and len({type(item) for item in module}) == 1:
            widths: set[int] = set()
            for layer in module[0].modules():
                if is_linear(layer):
                    _, inputs = linear_shape(layer)
                    widths.add(inputs)
            yield name, len(module), widths


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model in ``model``, or its only config; None without one."""
    config: object = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config


_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Names in the configs of transformers."""


def experts_per_token(config: object) -> int:
    """Return how many experts process a token according to a model's ``config``; 1 if it does not tell."""
    for key in _EXPERTS_PER_TOKEN:
        if number := getattr(config, key, None):
            return number
    return 1
