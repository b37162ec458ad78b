"""PSTRouter: a router of experts with a low-rank update, which chooses among the experts that are left."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.cut_config import NUM_EXPERTS, number_of_experts
from pst_ds.nn.expert_scores import ExpertScores
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.model_structure import (
    experts_modules,
    experts_per_token,
    modules_of,
    router_names,
    stack_names,
    text_config,
)
from pst_ds.nn.tables.embedding import UpdatedTable
from pst_ds.nn.targets import InjectionError, Target, modules_to_save, places_by_module, put
from pst_ds.parallel import sharding

_LEAD = 'method = "experts"'


class PSTRouter(UpdatedTable):
    """Replacement of a router that returns (logits, gates, experts) of each token, with its parameters and buffers.

    ``weight`` (E, H) has an update U V of rank at most E; the others stay frozen. The original module computes
    with the entries of the kept experts only, as in a smaller model without the others; the experts that it returns
    are numbered as in the whole model. A removed expert gets no token.
    """

    kept: Tensor
    """Numbers of the kept experts, ascending, int64."""

    def __init__(self, name: str, base: nn.Module, experts: str, config: PSTConfig):
        weight = base.get_parameter("weight")
        super().__init__(name, weight, config, min(config.update_rank, sharding.full_shape(weight)[0]))
        self.experts = experts
        """Name of the experts module."""
        self._base = (base,)  # a tuple hides it: its parameters are those of this module
        for attribute, param in base._parameters.items():
            self.register_parameter(attribute, param)
        for attribute, buffer in base._buffers.items():
            self.register_buffer(attribute, buffer, attribute not in base._non_persistent_buffers_set)
        self.register_buffer("kept", torch.arange(self.num_embeddings, device=weight.device), persistent=False)

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits of the kept experts, gates (N, k), experts (N, k)) for ``hidden`` (N, H)."""
        base = self._base[0]
        kept = self.kept
        num_experts = self.num_embeddings
        tensors = {name: getattr(self, name) for name in (*base._parameters, *base._buffers)}
        if self.bypassed:
            return _computed(base, tensors, num_experts, hidden)
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape[:1] == (num_experts,):  # an entry per expert, such as a bias
                tensors[name] = tensor[kept]
        tensors["weight"] = self.rows(kept)
        logits, gates, chosen = _computed(base, tensors, len(kept), hidden)
        return logits, gates, kept[chosen]  # numbered as in the whole model


def _computed(
    base: nn.Module, tensors: Mapping[str, Tensor | None], experts: int, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of a router with other ``tensors`` and another number of ``experts``."""
    router = copy.copy(base)  # shallow: the original module keeps its parameters and settings
    vars(router).update(_parameters=tensors, _buffers={})
    vars(router).update({key: experts for key in NUM_EXPERTS if key in vars(router)})
    logits, gates, chosen = router.forward(hidden)
    return logits, gates, chosen


def replace_routers(model: nn.Module, targets: Sequence[Target], config: PSTConfig) -> None:
    """Replace the router of each experts module by a PSTRouter. Collective under ZeRO-3.

    A router is found by its shape, next to the experts. Raises InjectionError unless both stacks of every experts
    module are ``targets``, and have one router that returns the experts of each token.
    """
    places = places_by_module(model)
    candidates = router_names(model)
    saved = modules_to_save(model, config)
    pruned = {target.name for target in targets}
    for name, module in experts_modules(model).items():
        parent = name.rpartition(".")[0]
        num_experts = int(module.num_experts)
        first, last = stack_names(module)
        if f"{name}.{first}" not in pruned or f"{name}.{last}" not in pruned:
            raise InjectionError(f"{_LEAD} removes experts of every block, and {name} stays dense. Include it")
        routers = []
        for candidate in candidates:
            if candidate.startswith(f"{parent}.") and _is_router(model, candidate, num_experts):
                routers.append(candidate)
        if len(routers) != 1 or routers[0] in saved:
            raise InjectionError(
                f"{_LEAD}: next to {name} there is no single router that returns the experts of each token, and "
                "is outside modules_to_save. Remove experts before training, with pst-ds prune --method reap"
            )
        base = model.get_submodule(routers[0])
        router = PSTRouter(routers[0], base, experts=name, config=config)
        sharding.split_as(router.get_parameter("weight"), router.parameters(recurse=False))
        put(router.train(base.training), places[base])


def require_removable(model: nn.Module) -> None:
    """Raise InputError unless the config of a plain ``model`` determines the number of its experts."""
    number_of_experts(model, _LEAD)


def _is_router(model: nn.Module, name: str, num_experts: int) -> bool:
    """Return whether a module computes gates and experts by its own weights, with one expert less than it has."""
    router = model.get_submodule(name)
    shapes: dict[str, tuple[int, ...]] = {}
    for key, param in router.named_parameters(recurse=False):
        shapes[key] = tuple(sharding.full_shape(param))
    if len(shapes.get("weight", ())) != 2 or shapes["weight"][0] != num_experts or any(router.children()):
        return False
    for key, buffer in router.named_buffers(recurse=False):
        shapes[key] = tuple(buffer.shape)
    # A router cannot choose more experts per token than there are.
    fewer = max(num_experts - 1, experts_per_token(text_config(model)))
    for key, shape in shapes.items():
        if shape[:1] == (num_experts,):
            shapes[key] = (fewer, *shape[1:])
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
        hidden = torch.empty(3, shapes["weight"][1])  # three tokens: (N, H)
        try:
            outputs = _computed(router, tensors, fewer, hidden)
        except (TypeError, ValueError, RuntimeError, IndexError):  # other arguments or outputs
            return False
    return not outputs[2].is_floating_point()  # numbers of experts


def pst_routers(model: nn.Module) -> dict[str, PSTRouter]:
    """Return the routers of ``model`` whose experts are removed, by name, in model order."""
    return modules_of(model, PSTRouter)


def scores_of_routers(model: nn.Module) -> ExpertScores | None:
    """Return the scores to measure of the experts of all PSTRouters; None for a model without any."""
    routers = pst_routers(model)
    if not routers:
        return None
    experts: dict[str, nn.Module] = {}
    for router in routers.values():
        experts[router.experts] = model.get_submodule(router.experts)
    return ExpertScores(experts)


def stacks_of(model: nn.Module, router: PSTRouter) -> list[PSTExpertStack]:
    """Return the stacks of a router's experts."""
    experts = model.get_submodule(router.experts)
    return [getattr(experts, name) for name in stack_names(experts)]


@torch.no_grad()
def follow_masks(model: nn.Module) -> None:
    """Make the routers of ``model`` choose among the experts that have weights left. Collective."""
    for router in pst_routers(model).values():
        stack = stacks_of(model, router)[0]  # the masks of both stacks remove the same experts
        left = stack.pruned_of_experts() < stack.whole_layout.expert.numel  # (E,)
        router.kept = left.nonzero().flatten().to(router.kept.device)
