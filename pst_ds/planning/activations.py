"""Trace the activations, gathers and operators of a micro-batch on tensors without values."""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pst_ds.core.coded_weight import CodedWeight
from pst_ds.core.experts.routing import Routing
from pst_ds.core.head_loss import ChunkSizes, Teacher, chunk_sizes, head_loss
from pst_ds.errors import first_line
from pst_ds.nn.checkpointing import recompute_activations
from pst_ds.nn.experts import PSTExpertStack, of_routing, registered
from pst_ds.nn.flat_factors import input_embeddings, owners_of_factors
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.language_head import LanguageHead, UnknownHeadError, language_head
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.tables.coded import CodedEmbedding, coded_tables
from pst_ds.parallel.sharding import in_backward_pass
from pst_ds.third_party import Code, patched

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
"""Operators timed by their FLOPs, like the fused attention operators."""
_ATTENTION = "scaled_dot_product"
_FREE = ("_local_scalar_dense", "_unsafe_view", "set_", "empty", "new_empty")
"""Names, or their beginnings, of operators that neither launch a kernel nor move bytes."""


class UntraceableError(RuntimeError):
    """The model's forward pass depends on values, not only on shapes."""


@dataclass(slots=True)
class Trace:
    """Memory, gathers and operators of a micro-batch on one rank."""

    activations: int = 0
    """Peak bytes of all live tensors except parameters and buffers."""
    gathered: int = 0
    """Bytes of parameters that ZeRO-3 fetches for the modules' turns if it keeps none between them."""
    gathers: int = 0
    """Collectives of ``gathered``: one per module and dtype."""
    trained: int = 0
    """Trained parameters among ``gathered``."""
    in_stacks: int = 0
    """Pruned stacks of experts among ``gathered``."""
    trained_gathers: int = 0
    """Collectives of ``trained``, if frozen parameters are gathered by others."""
    moved: int = 0
    """Bytes that operators outside the pruned layers read and write, except products."""
    launches: int = 0
    """Operators outside the pruned layers."""
    fetches: int = 0
    """Turns of modules, forward and backward, before which ZeRO-3's hooks run."""
    releases: int = 0
    """Turns of modules after which ZeRO-3's hooks run."""
    parameter_turns: int = 0
    """Parameters of the modules in ``fetches``."""


def trace_micro_batch(
    model: nn.Module,
    *,
    batch: int,
    sequence: int,
    checkpointing: bool,
    recomputed_blocks: int | None = None,
    persistence_threshold: int = 0,
    distilled: bool = False,
    device: str = "cpu",
    flats: Sequence[int] = (),
) -> Trace:
    """Trace a forward and backward pass.

    Saved tensors, temporaries, logits and loss count as long as autograd keeps them.

    Args:
        model: an injected model on the meta device. It is used up: its parameters become tensors without values on an
            emulated CPU, so that attention uses the same kernel as there.
        batch: examples of the micro-batch.
        sequence: tokens per example.
        checkpointing: whether activations are checkpointed.
        recomputed_blocks: number of blocks that are then recomputed; None for all.
        persistence_threshold: elements up to which ZeRO-3 never gathers a parameter.
        distilled: whether the loss of a language model also needs a teacher's hidden states.
        device: "cpu" or "cuda", for the size of the chunks in which the loss of a known head is computed.
        flats: sizes of the flat parameters that will hold the factors, :func:`pst_ds.nn.flat_factors.flat_sizes`.

    Raises:
        UntraceableError: the model cannot run without values.
        InputError: the model has fewer than ``recomputed_blocks``.
    """
    trace = Trace()
    if flats:
        _add_flat_parameters(model, flats)

    def start(root: nn.Module, args: object) -> None:
        # only now, since checkpointing adds its hook to the embedding first
        factors: Set[nn.Parameter] = owners_of_factors(root).keys() if flats else set()
        for module in root.modules():
            params = [p for p in module.parameters(recurse=False) if p not in factors]
            _count_turns(module, len(params), trace)
            _count_gathers(module, [p for p in params if p.numel() > persistence_threshold], trace)

    model.register_forward_pre_hook(start)
    if checkpointing:
        recompute_activations(model, num_blocks=recomputed_blocks, preserve_rng_state=False)
    seen = _run(model, batch=batch, sequence=sequence, distilled=distilled, device=device)
    trace.activations = seen.peak
    trace.moved = seen.moved
    trace.launches = seen.launches
    return trace


def _add_flat_parameters(model: nn.Module, sizes: Sequence[int]) -> None:
    """Add a module like :class:`pst_ds.nn.flat_factors.FlatFactors` that follows the input embeddings of ``model``."""
    dtype = next(iter(owners_of_factors(model))).dtype
    flats = nn.Module()
    for number, size in enumerate(sizes):
        flats.register_parameter(str(number), nn.Parameter(torch.empty(size, dtype=dtype, device="meta")))
    # a module, so that its turns are counted like those of others
    flats.forward = lambda embedded: _PassOn.apply(embedded, *flats.parameters())
    model.add_module("flat_parameters", flats)
    for embedding in input_embeddings(model):
        embedding.register_forward_hook(lambda _embedding, _inputs, embedded: flats(embedded))


class _PassOn(torch.autograd.Function):
    """Pass on the inputs, and return gradients of the flat parameters."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, *flats: Tensor) -> Tensor:
        ctx.flats = flats
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.empty_like(flat) for flat in ctx.flats)


def _count_turns(module: nn.Module, num_params: int, trace: Trace) -> None:
    """Count the calls of ZeRO-3's hooks for ``module``, which holds ``num_params`` parameters directly.

    Every module has hooks, with or without parameters. DeepSpeed starts the backward turn when an output gets its
    gradient, and ends it when the positional inputs have theirs.
    """

    def fetch(_module: nn.Module, _args: object) -> None:
        trace.fetches += 1
        trace.parameter_turns += num_params

    def release(_module: nn.Module, args: object, output: object) -> None:
        trace.releases += 1
        if in_backward_pass():  # recomputed: the backward turn is that of the first forward turn
            return
        if any(tensor.requires_grad for tensor in _tensors(output)):
            trace.fetches += 1
            trace.parameter_turns += num_params
        if any(tensor.requires_grad for tensor in _tensors(args)):
            trace.releases += 1

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(release)


def _count_gathers(module: nn.Module, params: list[nn.Parameter], trace: Trace) -> None:
    """Count a gather of ``params`` per completed forward turn, and one for its backward turn.

    The backward turn of a recomputed forward turn is already counted, and a pruned layer keeps its frozen parameters
    gathered for it. Recomputation stops inside the turn of the last module it needs, which therefore does not complete;
    DeepSpeed still has the parameters of that module then.
    """
    if not params:
        return
    not_kept = params
    if isinstance(module, PSTLayer):
        not_kept = [p for p in params if p.requires_grad]

    def count(module: nn.Module, args: object, output: object) -> None:
        if in_backward_pass():  # recomputed, within its backward turn
            turns = 1
            fetched = not_kept
        else:
            turns = 1 + any(tensor.requires_grad for tensor in _tensors(output))
            fetched = params
        trained = [p for p in fetched if p.requires_grad]
        fetched_bytes = turns * _bytes_of(fetched)
        trace.gathered += fetched_bytes
        trace.gathers += turns * _num_dtypes(fetched)
        trace.trained += turns * _bytes_of(trained)
        trace.trained_gathers += turns * _num_dtypes(trained)
        if isinstance(module, PSTExpertStack):
            trace.in_stacks += fetched_bytes

    module.register_forward_hook(count)


def _bytes_of(params: list[nn.Parameter]) -> int:
    return sum(param.nbytes for param in params)


def _num_dtypes(params: list[nn.Parameter]) -> int:
    """Count the collectives that gather ``params``: one per dtype, since a collective has one."""
    return len({param.dtype for param in params})


def _run(model: nn.Module, *, batch: int, sequence: int, distilled: bool, device: str) -> "_Operators":
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        head = language_head(model)
    except UnknownHeadError:
        head = None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model.train()
    _pretend_on_cpu(model, mode)
    seen = _Operators(model)
    attention: AbstractContextManager[object] = nullcontext()
    if device != "cpu":
        attention = patched(torch.nn.functional, "scaled_dot_product_attention", _with_wide_values)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    with mode, layers_save_their_input(model):
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        labels = torch.zeros(batch, dtype=torch.long) if is_classifier else ids
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            with seen, attention:
                if head is not None:
                    loss = _loss_in_chunks(
                        model, head, inputs, sizes=chunk_sizes(device), distilled=distilled, seen=seen
                    )
                else:
                    loss = model(**inputs, labels=labels).loss
                loss.backward()
        except Exception as error:
            # models fail in many ways where they need a value, and the plan continues without a trace
            raise UntraceableError(f"{type(model).__name__}: {first_line(error)}") from error
    if distilled and head is None and not is_classifier:
        # the teacher's logits, next to the model's
        config: Any = model.config
        seen.peak += batch * sequence * config.vocab_size * next(model.parameters()).element_size()
    return seen


def _loss_in_chunks(
    model: nn.Module,
    head: LanguageHead,
    inputs: dict[str, Tensor],
    *,
    sizes: ChunkSizes,
    distilled: bool,
    seen: "_Operators",
) -> Tensor:
    """Return the loss of :class:`pst_ds.train.objective.Objective` when every token predicts the next one.

    All chunks are alike: one and two of them are run, and the operators of the others are added to ``seen``.
    """
    targets = inputs["input_ids"].flatten()
    width = head.module.in_features
    rows = sizes.rows(head.module.out_features)
    teacher = None
    if distilled:
        taught = torch.empty(len(targets), width, dtype=head.readout.weight.dtype)
        teacher = Teacher(taught, head.readout, 0.5)

    def read(hidden: Tensor) -> Tensor:
        def loss_of(tokens: int) -> Tensor:
            places = torch.arange(tokens)
            return head_loss(hidden.flatten(0, 1), head.readout, targets[:tokens], places, teacher=teacher, sizes=sizes)

        more_chunks = len(targets) / rows - 2
        if more_chunks <= 0:
            return loss_of(len(targets))

        def extrapolated(start: int, after_one: int, after_both: int) -> int:
            one_chunk = after_one - start
            two_chunks = after_both - after_one
            return start + two_chunks + round(more_chunks * (two_chunks - one_chunk))

        launches_at_start = seen.launches
        moved_at_start = seen.moved
        loss_of(rows)  # not kept: its gradients would count in the peak of the next call
        launches_after_one = seen.launches
        moved_after_one = seen.moved
        loss = loss_of(2 * rows)
        seen.launches = extrapolated(launches_at_start, launches_after_one, seen.launches)
        seen.moved = extrapolated(moved_at_start, moved_after_one, seen.moved)
        return loss

    with head.reading(read) as losses:
        model(**inputs)
    return losses[0]


def _pretend_on_cpu(model: nn.Module, mode: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    def pretend(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))

    made: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay one
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                new = nn.Parameter(pretend(param), requires_grad=param.requires_grad)
                if param.requires_grad:  # the plan counts gradients separately
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
    """Make PST layers save only their input; their temporaries of the weight's size are counted elsewhere."""
    layers = pst_layers(model).values()
    tables = coded_tables(model).values()
    for table in tables:
        if isinstance(table, CodedEmbedding):
            table.forward = partial(_embed, table)  # type: ignore[method-assign]
        else:
            parts = table.layout, table.codes.detach(), table.scales.detach(), table.dtype
            table.table = partial(_CodedWithoutValues, *parts)  # type: ignore[method-assign]
    for layer in layers:
        anchor = next((param for _, param in layer.factor_parameters()), next(layer.parameters()))
        layer.forward = partial(_Product.apply, anchor, layer.layout.expert.out_features)
    try:
        with registered(_evenly_routed):
            yield
    finally:
        for layer in layers:
            del layer.forward
        for table in tables:
            del vars(table)["forward" if isinstance(table, CodedEmbedding) else "table"]


def _evenly_routed(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute an experts module with equally many tokens per expert, since shapes do not tell the routing."""
    routing = Routing.of(index, weights, experts.num_experts, even=True)  # type: ignore[arg-type]
    return of_routing(experts, hidden, weights, routing)


def _embed(table: CodedEmbedding, ids: Tensor) -> Tensor:
    return torch.empty(*ids.shape, table.embedding_dim, dtype=table.dtype)


class _CodedWithoutValues(CodedWeight):
    def dense(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


class _Product(torch.autograd.Function):
    """The product of a layer, or with ``routing`` of a stack of experts."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, outputs: int, x: Tensor, routing: Routing | None = None, by_token: bool = False
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.routing = routing
        ctx.by_token = by_token
        if routing is not None:
            return x.new_empty(len(routing.order), outputs)
        return x.new_empty(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.routing is None:
            return None, None, torch.empty_like(x), None, None
        grad_x = grad_y.new_empty(len(grad_y), x.shape[1])  # (tokens of all experts, inputs)
        if ctx.by_token:
            grad_x = ctx.routing.summed(grad_x)  # (tokens, inputs)
        return None, None, grad_x, None, None


def _with_wide_values(attention: Code) -> Code:
    """Pad values to the width of queries, as in DeepSeek-V3: GPUs fuse attention for any widths, the emulated CPU only
    for equal ones."""

    def padded(query: Tensor, key: Tensor, value: Tensor, *more: object, **options: object) -> Tensor:
        width = value.shape[-1]
        wide = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
        out = attention(query, key, wide, *more, **options)
        assert isinstance(out, Tensor)
        return out[..., :width]

    return padded


class _Operators(TorchDispatchMode):
    """Count the live bytes of storages that operators make, their launches and the bytes that they move."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.moved = 0
        self.launches = 0
        self._sizes: dict[int, int] = {}
        # keeps the tensors alive, since a new storage may have the id of a freed one
        self._known = {id(t.untyped_storage()): t for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        out = func(*args, **(kwargs or {}))
        launches, moved = operator_traffic(func, args, kwargs or {}, out)
        self.launches += launches
        self.moved += moved
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._sizes and key not in self._known:
                self._sizes[key] = storage.nbytes()
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def operator_traffic(
    operator: OpOverload, args: object, kwargs: Mapping[str, object], result: object
) -> tuple[int, int]:
    """Return (launches, bytes read and written) of an ATen operator; 0 for views, 0 bytes for products.

    A result in one of the arguments (``out=``, or in place) is written; the argument is read unless it is ``out``.
    """
    space, _, name = operator._schema.name.partition("::")
    if space == "prim" or operator.is_view or name.startswith(_FREE):
        return 0, 0
    if name in PRODUCTS or _ATTENTION in name:
        return 1, 0
    out = {id(tensor) for tensor in _tensors(kwargs.get("out"))}
    read = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in out]
    if name in ("copy_", "fill_", "zero_"):  # they only write the first
        read = read[1:]
    elif name in ("index", "index_select", "embedding", "gather"):  # they read as much of the first as they write
        read = [*read[1:], *_tensors(result)]
    # caches are assumed to keep nothing between two operators
    return 1, sum(map(_nbytes, read)) + sum(map(_nbytes, _tensors(result)))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes that reading a tensor moves: expanded dimensions are read once."""
    once = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(once) * tensor.element_size()
