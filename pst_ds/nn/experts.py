"""PSTExpertStack: a stack of experts that learns which weights to keep, inside transformers' experts modules.

An experts module holds two stacks, such as ``gate_up_proj`` and ``down_proj``, and calls a function from a registry to
compute them (``ALL_EXPERTS_FUNCTIONS``). A module replaces the Parameter of each pruned stack, so that ZeRO-3 gathers
one stack at a time; the rest of the experts module, biases included, is unchanged.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pst_ds.core.bits import unpack_range
from pst_ds.core.experts import products
from pst_ds.core.experts.routing import Routing
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import ExpertsModule, modules_of, stack_names
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import group_sum
from pst_ds.parallel.sharding import in_backward_pass

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMPLEMENTATION = "pst"
"""Name under which :func:`experts_forward` is registered with transformers."""
_CONFIG_BEFORE = "pst_config_before"
"""Attribute in which an experts module keeps its config until :func:`switch_off`."""
_MOST_TERMS = 64
"""Routings whose ends a stack keeps before it adds them up."""
Hear = Callable[[str, Tensor, Routing, bool], None]
"""Called with the name of a stack, its inputs, their routing, and whether they are (N, I), not sorted (N*k, I)."""


class PSTExpertStack(PSTLayer):
    """Replacement of a stack of experts, (E, O, I) or (E, I, O): y = x (M . W)' with the expert of each token.

    Masks, checkpoints and exports treat the stack as the matrix that it forms in memory, see
    :class:`pst_ds.core.layout.WeightLayout`. Its config is ``PSTConfig.of_experts``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ends_seen = [torch.zeros(self.layout.num_experts, dtype=torch.int64, device="cpu")]
        """Terms of the sum of :attr:`Routing.ends`. Adding each at once would be a launch."""

    @property
    def tokens_seen(self) -> Tensor:
        """Tokens that trained each expert of this rank in this process; recomputed forward passes do not count."""
        ends = self._sum_ends()
        return ends.diff(prepend=ends.new_zeros(1))

    def _sum_ends(self) -> Tensor:
        device = self._ends_seen[-1].device  # the first term is made on the CPU
        ends = torch.stack([ends.to(device) for ends in self._ends_seen]).sum(0)  # (E,)
        self._ends_seen = [ends]
        return ends

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter ``weight`` when it is gathered."""
        return self.layout.num_experts, *self.layout.expert.shape

    def forward(self, x: Tensor, routing: Routing, by_token: bool) -> Tensor:
        """Return the product of each (token, expert) pair: (N*k, O), sorted by expert.

        ``x``: (N, I) ``by_token``, or (N*k, I) sorted by expert. In the weight's dtype, also under autocast.
        """
        if self.bypassed:
            dense = _DenseStack(self, lambda: self.dense_weight().view(self.weight_shape), self.layout.transposed)
            return _product(x, dense, routing, by_token)
        self.was_called = True
        if self.training and not in_backward_pass():
            self._ends_seen.append(routing.ends)
            if len(self._ends_seen) > _MOST_TERMS:
                self._sum_ends()
        self.keep_if_recomputed()
        weight, factors = self.trained()
        return _product(x, self, routing, by_token, weight, *factors)

    def tokens_of_experts(self) -> Tensor:
        """Return :attr:`tokens_seen` of all E experts, (E,): 0 for experts on other ranks."""
        counts = self.tokens_seen.new_zeros(self.whole_layout.num_experts)
        own = counts
        if self.group is not None:
            own = self.group.own_part(counts)  # a view
        own.copy_(self.tokens_seen)
        return counts

    def pruned_of_experts(self) -> Tensor:
        """Return the pruned weights of each expert of all ranks, (E,) int64. Collective."""
        bits = self.own_bits()
        start, stop = self.own_range()
        counts = torch.zeros(self.whole_layout.num_experts, dtype=torch.int64, device=bits.device)
        for expert in range(len(counts)):
            # The part of the expert on this rank; empty, with equal ends, if another rank has it.
            first, last = (min(max(at, start), stop) - start for at in self.whole_layout.expert_range(expert))
            kept = unpack_range(bits, stop - start, 1, first, last).sum()
            counts[expert] = last - first - kept
        return group_sum(counts, self.pst_mask)

    def product(self, x: Tensor, routing: Routing, by_token: bool) -> Tensor:
        """Return the products of :meth:`forward`, without gradient. The parameters must be gathered."""
        return products.forward(x.detach(), self.state(), routing, by_token=by_token)

    def gradients(
        self, x: Tensor, grad_y: Tensor, routing: Routing, by_token: bool, *, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters in :meth:`trained`, for ``grad_y`` (N*k, O).

        Gathers released parameters. Gradients of experts without tokens are 0.
        """
        backward = partial(
            products.backward, routing=routing, by_token=by_token, need_x=need_x, need_weight=need_weight
        )
        grads = self.gathered_gradients(partial(backward, x, grad_y))
        grad_weight = grads.weight
        if grad_weight is not None:
            grad_weight = grad_weight.view(self.weight_shape)  # from the matrix (E O, I) to a stack
        return grads.x, grad_weight, *self.of_trained(grads)

    def extra_repr(self) -> str:
        one = self.layout.expert
        return f"experts={self.layout.num_experts}, in_features={one.in_features}, out_features={one.out_features}"


def expert_stacks(model: nn.Module) -> dict[str, PSTExpertStack]:
    """Return the PST stacks of ``model`` by name, in model order."""
    return modules_of(model, PSTExpertStack)


class _DenseStack:
    """A frozen dense stack: the sibling of a pruned stack, or a bypassed PST stack."""

    def __init__(self, holder: nn.Module, weight: Callable[[], Tensor], transposed: bool):
        """``holder``: the module with the parameters that ``weight`` reads. ZeRO-3 may gather them again later, into
        other memory, which is why ``weight`` is a function."""
        self._holder = holder
        self._weight = weight
        self._transposed = transposed

    @property
    def dtype(self) -> torch.dtype:
        return self._weight().dtype

    def product(self, x: Tensor, routing: Routing, by_token: bool) -> Tensor:
        weight = self._weight()
        return products.dense_forward(x.detach(), weight, routing, by_token=by_token, transposed=self._transposed)

    def gradients(
        self, x: Tensor, grad_y: Tensor, routing: Routing, by_token: bool, *, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, ...]:
        if not need_x:
            return (None,)
        released = [param for param in self._holder.parameters(recurse=False) if sharding.is_released(param)]
        with sharding.gathered(released):
            stack = self._weight()
            grad_x = products.dense_backward(grad_y, stack, routing, by_token=by_token, transposed=self._transposed)
        return (grad_x,)


def _product(
    x: Tensor, stack: PSTExpertStack | _DenseStack, routing: Routing, by_token: bool, *trained: Tensor | None
) -> Tensor:
    """Multiply with a stack, in its dtype also under autocast. ``trained``: its parameters that may need gradients."""
    if not torch.is_autocast_enabled(x.device.type):
        return _ExpertProducts.apply(x, stack, routing, by_token, *trained)
    with torch.autocast(x.device.type, enabled=False):
        return _ExpertProducts.apply(x.to(stack.dtype), stack, routing, by_token, *trained)


class _ExpertProducts(torch.autograd.Function):
    """Save only x, not repeated for the k experts of a token; see :class:`pst_ds.nn.linear._MaskedLinear`."""

    @staticmethod
    def forward(ctx, x, stack, routing, by_token, *trained):
        ctx.stack = stack
        ctx.routing = routing
        ctx.by_token = by_token
        ctx.save_for_backward(x)
        return stack.product(x, routing, by_token)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        need_x, _, _, _, *need_trained = ctx.needs_input_grad
        need_weight = bool(need_trained and need_trained[0])  # a dense stack passes no parameters
        of_x, *others = ctx.stack.gradients(
            x, grad_y, ctx.routing, ctx.by_token, need_x=need_x, need_weight=need_weight
        )
        return of_x, None, None, None, *others


@torch.compiler.disable  # which experts have tokens depends on values
def experts_forward(experts: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute an experts module of transformers: the sum over k of weight * down(gate(up(hidden))), (N, H).

    ``hidden``: (N, H). ``index`` and ``weights``: (N, k), the experts of each token and their gates.
    """
    return of_routing(experts, hidden, weights, Routing.of(index, weights, experts.num_experts))


def of_routing(
    experts: ExpertsModule,
    hidden: Tensor,
    weights: Tensor,
    routing: Routing,
    before: Callable[[str, Tensor, bool], None] | None = None,
    after: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Compute :func:`experts_forward` for a ``routing``.

    ``before`` is called ahead of each product with the attribute of its stack, x, and ``by_token``; ``after`` with the
    experts' outputs, (N*k, H) sorted by expert.
    """
    first, last = stack_names(experts)
    group = getattr(getattr(experts, first), "group", None)

    def product(x: Tensor, attribute: str, routing: Routing, *, by_token: bool) -> Tensor:
        if before is not None:
            before(attribute, x, by_token)
        stack = getattr(experts, attribute)
        if isinstance(stack, nn.Module):  # a PST stack or a packed one
            y = stack(x, routing, by_token)
        else:
            dense = _DenseStack(experts, lambda: getattr(experts, attribute).detach(), experts.is_transposed)
            y = _product(x, dense, routing, by_token)
        if not experts.has_bias:
            return y
        biases = getattr(experts, f"{attribute}_bias")  # (E, O), whole on every rank
        if group is not None:
            biases = group.own_part(biases)
        return y + biases[routing.experts]

    def outputs(hidden: Tensor, routing: Routing) -> Tensor:
        inner = product(hidden, first, routing, by_token=True)
        activate = experts._apply_gate if experts.has_gate else experts.act_fn
        inner = activate(inner)
        outer = product(inner, last, routing, by_token=False)
        if experts.has_post_expert_norm:
            outer = experts.post_expert_norm(outer)
        return outer

    # With a group, tokens travel to the ranks of their experts, and the outputs back.
    outer = outputs(hidden, routing) if group is None else group.at_experts(hidden, routing, outputs)
    if after is not None:
        after(outer)
    return routing.combined(outer, weights).to(hidden.dtype)


def switch_on(modules: Iterable[ExpertsModule]) -> None:
    """Make these experts modules, but no others, compute with their PST stacks.

    Every experts module reads the name of its function from its config; these get a copy that names ours.
    """
    _register(experts_forward)
    # Modules that shared a config share its copy.
    copies: dict[int, PreTrainedConfig] = {}
    for module in modules:
        before = module.config
        if id(before) not in copies:
            copies[id(before)] = copy.deepcopy(before)
            copies[id(before)]._experts_implementation = IMPLEMENTATION
        setattr(module, _CONFIG_BEFORE, before)
        module.config = copies[id(before)]


def _register(function: Callable[..., Tensor]) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, function)


@contextmanager
def registered(function: Callable[..., Tensor]) -> Iterator[None]:
    """Replace :func:`experts_forward` by ``function`` in the context."""
    _register(function)  # for all models of this process with PST stacks: the registry is global
    try:
        yield
    finally:
        _register(experts_forward)


def switch_off(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`switch_on` for the experts modules among ``modules``."""
    for module in modules:
        if _CONFIG_BEFORE in vars(module):
            module.config = vars(module).pop(_CONFIG_BEFORE)


@contextmanager
def listening(stacks: Mapping[tuple[nn.Module, str], str], heard: Hear) -> Iterator[None]:
    """Call ``heard`` with the inputs of each of ``stacks`` ahead of its product, in the context.

    ``stacks``: names of dense stacks by experts module and attribute.
    """

    @torch.compiler.disable
    def forward(experts: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        routing = Routing.of(index, weights, experts.num_experts)

        def before(attribute: str, x: Tensor, by_token: bool) -> None:
            if name := stacks.get((experts, attribute)):
                heard(name, x, routing, by_token)

        return of_routing(experts, hidden, weights, routing, before)

    modules = list(dict.fromkeys(module for module, _ in stacks))  # each once, in order
    switch_on(modules)
    try:
        with registered(forward):
            yield
    finally:
        switch_off(modules)


def leaf_class(model: nn.Module) -> str:
    """Return the class to name as ZeRO-3's leaf module, so that one stack is gathered at a time; "" without stacks.

    A stack is a leaf anyway. But without the name of a class in the model DeepSpeed treats whole blocks of some
    families as leaves, or warns.
    """
    return f"{PSTExpertStack.__module__}.{PSTExpertStack.__name__}" if expert_stacks(model) else ""
