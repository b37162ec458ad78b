"""Trace a micro-batch's activations, gathers and operators on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pst_ds.core.coded_weight import CodedWeight
from pst_ds.core.experts.routing import Routing
from pst_ds.core.head_loss import ChunkSizes, Teacher, chunk_sizes, head_loss
from pst_ds.errors import first_line
from pst_ds.nn.experts import PSTExpertStack, of_routing, registered
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.language_head import LanguageHead, UnknownHeadError, language_head
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.tables.coded import CodedEmbedding, CodedTable, coded_tables
from pst_ds.parallel.backward_pass import in_backward_pass
from pst_ds.planning.operators import operator_traffic


class UntraceableError(RuntimeError):
    """The model's forward pass depends on values, not only on shapes."""


@dataclass(slots=True)
class Trace:
    """Bytes that a micro-batch takes on a rank, and the gathers it makes."""

    activations: int = 0
    gathered: int = 0
    """Bytes of the parameters that ZeRO-3 fetches for the modules' turns if it keeps none between them."""
    gathers: int = 0
    """Collectives that bring them: one a module and dtype."""
    moved: int = 0
    """Bytes that operators outside the pruned layers read and write, those of products apart."""
    launches: int = 0
    """Operators outside the pruned layers."""


def trace_micro_batch(
    model: nn.Module,
    *,
    batch: int,
    sequence: int,
    checkpointing: bool,
    persistence_threshold: int = 0,
    distilled: bool = False,
    device: str = "cpu",
) -> Trace:
    """:func:`activation_bytes`, the gathers of all parameters larger than ``persistence_threshold``, and operators."""
    trace = Trace()

    def start(root: nn.Module, args: Any) -> None:  # late, for checkpointing hooks the embedding to need a gradient
        for module in root.modules():
            _count_gathers(module, trace, persistence_threshold)

    model.register_forward_pre_hook(start)
    seen = _run(model, batch=batch, sequence=sequence, checkpointing=checkpointing, distilled=distilled, device=device)
    trace.activations, trace.moved, trace.launches = seen.peak, seen.moved, seen.launches
    return trace


def _count_gathers(module: nn.Module, trace: Trace, threshold: int) -> None:
    """Count a fetch for every forward turn that ends, and one for its backward turn. A recomputed forward turn has its
    backward counted already, and that of a pruned layer leaves what is frozen for it. The turn that recomputing stops
    in, since nothing behind it is needed, does not end: DeepSpeed, too, finds the parameters of that module there."""
    params = [p for p in module.parameters(recurse=False) if p.numel() > threshold]
    not_left = [p for p in params if p.requires_grad or not isinstance(module, PSTLayer)]
    if not params:
        return

    def count(module: nn.Module, args: Any, output: Any) -> None:
        recomputes = in_backward_pass()
        has_backward = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(output))
        turns, fetched = (1, not_left) if recomputes else (1 + has_backward, params)
        trace.gathered += turns * sum(p.numel() * p.element_size() for p in fetched)
        trace.gathers += turns * len({p.dtype for p in fetched})

    module.register_forward_hook(count)


def activation_bytes(
    model: nn.Module,
    *,
    batch: int,
    sequence: int,
    checkpointing: bool,
    distilled: bool = False,
    device: str = "cpu",
) -> int:
    """Return the peak of all tensors alive at once in a training micro-batch, parameters and their like not counted.

    ``model`` is on the meta device and is used up: its parameters become tensors without values on a pretended CPU,
    so that attention takes the kernel it takes there. Saved tensors, temporaries, logits and loss are all counted, as
    autograd frees them; the loss of a language model whose head is known is made in the chunks of ``device``, with
    ``distilled`` from a teacher's hidden states too. Raises UntraceableError for a model that cannot run so.
    """
    return _run(
        model, batch=batch, sequence=sequence, checkpointing=checkpointing, distilled=distilled, device=device
    ).peak


def _run(
    model: nn.Module, *, batch: int, sequence: int, checkpointing: bool, distilled: bool, device: str
) -> _Operators:
    from torch._subclasses.fake_tensor import FakeTensorMode

    head = _head_of(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
    _pretend_on_cpu(model, mode)
    seen = _Operators(model)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    with mode, layers_save_their_input(model):
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        labels = torch.zeros(batch, dtype=torch.long) if is_classifier else ids
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            with seen:
                if head is not None:
                    _loss_in_chunks(model, head, inputs, chunk_sizes(device), distilled, seen).backward()
                else:
                    model(**inputs, labels=labels).loss.backward()
        except Exception as error:
            raise UntraceableError(f"{type(model).__name__}: {first_line(error)}") from error
    if distilled and head is None and not is_classifier:  # the teacher's logits, next to the model's own
        config: Any = model.config
        seen.peak += batch * sequence * config.vocab_size * next(model.parameters()).element_size()
    return seen


def _head_of(model: nn.Module) -> LanguageHead | None:
    try:
        return language_head(model)
    except UnknownHeadError:
        return None


def _loss_in_chunks(
    model: nn.Module,
    head: LanguageHead,
    inputs: dict[str, Tensor],
    sizes: ChunkSizes,
    distilled: bool,
    seen: _Operators,
) -> Tensor:
    """Return the loss as :class:`pst_ds.train.objective.Objective` makes it, of tokens that all predict one.

    Chunks are alike: one and two of them are run, and ``seen`` is told of the operators of all others.
    """
    targets = inputs["input_ids"].flatten()
    width, rows = head.module.in_features, sizes.rows(head.module.out_features)
    taught = torch.empty(len(targets), width, dtype=head.readout.weight.dtype) if distilled else None

    def read(hidden: Tensor) -> Tensor:
        teacher = None if taught is None else Teacher(taught, head.readout, 0.5)

        def loss_of(tokens: int) -> Tensor:
            places = torch.arange(tokens)
            return head_loss(hidden.flatten(0, 1), head.readout, targets[:tokens], places, teacher=teacher, sizes=sizes)

        more = len(targets) / rows - 2
        if more <= 0:
            return loss_of(len(targets))
        start = seen.counts
        loss_of(rows)
        one = seen.counts
        loss = loss_of(2 * rows)
        for name, before, between, after in zip(seen.COUNTS, start, one, seen.counts, strict=True):
            of_two, of_one = after - between, between - before
            setattr(seen, name, before + of_two + round(more * (of_two - of_one)))
        return loss

    with head.reading(read) as losses:
        model(**inputs)
    return losses[0]


def _pretend_on_cpu(model: nn.Module, mode: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    def pretend(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                new = nn.Parameter(pretend(param), requires_grad=param.requires_grad)
                # gradients have a share of their own in the plan
                if param.requires_grad:
                    new.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
                made[id(param)] = new
            module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = pretend(buffer)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, pretend(value))


@contextmanager
def layers_save_their_input(model: nn.Module) -> Iterator[None]:
    """Let PST layers keep their input alone; their temporaries of the weight's size are counted elsewhere."""
    layers = pst_layers(model).values()
    tables = coded_tables(model).values()
    for table in tables:
        if isinstance(table, CodedEmbedding):
            table.forward = partial(_looked_up, table)  # type: ignore[method-assign]
        else:
            table.table = partial(_unread, table)  # type: ignore[method-assign]
    for layer in layers:
        anchor = next((param for _, param in layer.factor_parameters()), next(layer.parameters()))
        of_kind = _products_of_experts if isinstance(layer, PSTExpertStack) else _product
        layer.forward = partial(of_kind, anchor, layer.layout.expert.out_features, layer.inputs is not None)
    try:
        with registered(_evenly_routed):
            yield
    finally:
        for layer in layers:
            del layer.forward
        for table in tables:
            del vars(table)["forward" if isinstance(table, CodedEmbedding) else "table"]


def _evenly_routed(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute an experts module as if each of its experts got as many tokens: which do is not known from shapes."""
    return of_routing(experts, hidden, weights, Routing.even(index, weights, experts.num_experts))  # type: ignore[arg-type]


def _looked_up(table: CodedEmbedding, ids: Tensor) -> Tensor:
    return torch.empty(*ids.shape, table.embedding_dim, dtype=table.dtype)


def _unread(table: CodedTable) -> CodedWeight:
    return _Unread(table.layout, table.codes.detach(), table.scales.detach(), table.dtype)


class _Unread(CodedWeight):
    """A table whose codes have no values; its weights are tensors without values too."""

    def dense(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def _product(anchor: Tensor, out_features: int, rounded: bool, input: Tensor) -> Tensor:
    return _Product.apply(input, anchor, out_features, rounded)


def _products_of_experts(
    anchor: Tensor, out_features: int, rounded: bool, x: Tensor, routing: Routing, by_token: bool
) -> Tensor:
    return _ProductsOfExperts.apply(x, anchor, out_features, routing, by_token)  # rounds one expert's inputs at a time


class _Product(torch.autograd.Function):
    """``rounded``: x is rounded in both passes, into a tensor that each lets go of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, out_features: int, rounded: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rounded = rounded
        multiplied = torch.empty_like(x) if rounded else x
        return multiplied.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        multiplied = torch.empty_like(x) if ctx.rounded else x
        return torch.empty_like(multiplied), None, None, None


class _ProductsOfExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, out_features: int, routing: Routing, by_token: bool) -> Tensor:
        ctx.routing, ctx.by_token = routing, by_token
        ctx.save_for_backward(x)
        return x.new_empty(len(routing.order), out_features)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_y.new_empty(len(grad_y), ctx.saved_tensors[0].shape[1])
        return ctx.routing.summed(grad_x) if ctx.by_token else grad_x, None, None, None, None


class _Operators(TorchDispatchMode):
    """What operators ask for: bytes of the storages that they made and that are still alive, and their traffic."""

    COUNTS = ("launches", "moved")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = self.moved = self.launches = 0
        self._sizes: dict[int, int] = {}
        self._known = {id(t.untyped_storage()): t for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        launches, moved = operator_traffic(func, args, kwargs or {}, out)
        self.launches += launches
        self.moved += moved
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    @property
    def counts(self) -> tuple[int, ...]:
        """:data:`COUNTS` as they are now."""
        return tuple(getattr(self, name) for name in self.COUNTS)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
