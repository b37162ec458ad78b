"""Which tokens of a batch see each other: documents that share a sequence, and sequences that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.core.documents import MOST_WITH_MASK, by_document, document_mask, is_long
from pst_ds.data.tasks import ExampleSet
from pst_ds.data.tasks.task import IGNORED
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import raise_on_all_ranks, raise_together
from pst_ds.parallel.sequence import SequenceParallel
from pst_ds.third_party import patched_entry, while_computing
from pst_ds.train.run_context import RunContext
from pst_ds.train.token_heads import following, why_all_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils import ModelOutput

_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations whose sequences ranks can share."""
_TOKENS = 8
"""Tokens of each document, and of each rank, in the checks."""
_DOCUMENT_ROUNDINGS = 4
"""Rounding errors of the largest logit that are not a difference between documents."""
_SHARING_ROUNDINGS = 8
"""Rounding errors of the largest logit that are not a difference between ranks that share a sequence and one rank."""
_LEAST_LEAK = 2.0**-15
"""Smallest difference that counts as a leak, as a share of the largest logit. In untrained models the smallest leaks
measured are 30 times as large; rounding errors of 24 blocks of experts in fp32, with products of other sizes, are a
seventh of it."""
_PER_TOKEN = ("input_ids", "position_ids", "labels")
_DOCUMENTS: ContextVar[Tensor | None] = ContextVar("documents", default=None)
"""Document of each token, (examples, length), in a forward pass that keeps them apart; None elsewhere."""
Inputs: TypeAlias = dict[str, Any]
"""Inputs of a model, by name: tensors and settings."""


def keep_documents_apart(model: nn.Module) -> None:
    """Make a transformers model keep documents apart whose ``position_ids`` restart at 0.

    Most models do so already, but some (OPT, BLOOM, MPT, gpt-oss) make their masks without the positions, so these get
    masks that know the documents, while the model computes. Flash attention finds the borders of documents by positions
    only if the batch is one row: inputs (batch, length) become one row, and logits and hidden states (batch, length,
    ...) again.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config = getattr(model, "config", None)
    if config is None:
        return
    # flash attention has no mask to change: it needs one row, whose documents it then finds by itself
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        flatten_packed_rows(model)
        return
    implementation = getattr(config.get_text_config(), "_attn_implementation", None) or ""
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    # also after an error: the documents of this pass must not reach the next one
    model.register_forward_hook(_leave, always_call=True)
    while_computing(model, partial(_knowing_documents, implementation))


@contextmanager
def _knowing_documents(implementation: str, module: nn.Module) -> Iterator[None]:
    """Let the masks, and ``sdpa``, of an attention ``implementation`` of transformers keep documents apart."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    takes_tables = implementation == "sdpa"
    with ExitStack() as patches:
        add_documents = partial(_adding_documents, takes_tables=takes_tables)
        patches.enter_context(patched_entry(ALL_MASK_ATTENTION_FUNCTIONS, implementation, add_documents))
        if takes_tables:
            patches.enter_context(patched_entry(ALL_ATTENTION_FUNCTIONS, implementation, by_document))
        yield


def _enter(module: nn.Module, args: tuple[object, ...], kwargs: Inputs) -> None:
    positions = kwargs.get("position_ids")
    documents = None
    if isinstance(positions, Tensor) and positions.dim() == 2 and kwargs.get("attention_mask") is None:
        documents = (positions == 0).cumsum(1)  # positions restart at 0 where a document starts
        # waits for the device, once per forward pass of the whole model
        if not bool((documents != documents[:, :1]).any()):
            documents = None  # plain causal attention needs no mask, which takes memory and time
    _DOCUMENTS.set(documents)


def _leave(module: nn.Module, args: tuple[object, ...], out: object) -> None:
    _DOCUMENTS.set(None)


def _adding_documents(make_mask: Callable[..., object], *, takes_tables: bool) -> Callable[..., object]:
    """Wrap ``make_mask``, a mask function of transformers, so that tokens attend to their own document only.

    ``takes_tables``: return a table of documents for long sequences, see :func:`by_document`.
    """
    names = tuple(signature(make_mask).parameters)

    @wraps(make_mask)
    def make(*args: object, **kwargs: object) -> object:
        documents = _DOCUMENTS.get()
        settings = {**dict(zip(names, args, strict=False)), **kwargs}
        # a mask of another length has other keys than these tokens, as in a pass with a cache
        if documents is None or settings.get("kv_length") != documents.shape[1]:
            return make_mask(*args, **kwargs)
        if takes_tables and is_long(documents.shape[1]) and settings.get("local_size") is None:
            return document_mask(documents)
        sees_by_place = cast("Callable[..., Tensor]", settings["mask_function"])

        def see(example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_same_document = documents[example, query] == documents[example, key]
            return sees_by_place(example, head, query, key) & is_same_document

        # without the skip, which returns no mask where plain causal attention would do
        return make_mask(**{**settings, "mask_function": see, "allow_is_causal_skip": False})

    return make


def flatten_packed_rows(model: nn.Module) -> None:
    """Flatten batches with restarting positions into one row, and restore the rows of the outputs."""
    shapes: list[torch.Size | None] = []

    def flatten(module: nn.Module, args: tuple[object, ...], kwargs: Inputs) -> tuple[tuple[object, ...], Inputs]:
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("attention_mask") is not None or args:
            shapes.append(None)
            return args, kwargs
        shapes.append(positions.shape)
        flat = dict(kwargs)
        for name in _PER_TOKEN:
            if name in flat:
                flat[name] = flat[name].reshape(1, -1)  # (1, batch * length)
        return args, flat

    def restore(module: nn.Module, args: tuple[object, ...], kwargs: Inputs, out: ModelOutput) -> ModelOutput:
        shape = shapes.pop()
        if shape is None:
            return out
        for name in ("logits", "last_hidden_state", "hidden_states"):
            if out.get(name) is not None:
                # (1, batch * length, ...) -> (batch, length, ...); hidden_states is a tuple of such tensors
                out[name] = tree_map(lambda values: values.reshape(*shape, *values.shape[2:]), out[name])
        return out

    model.register_forward_pre_hook(flatten, with_kwargs=True)
    model.register_forward_hook(restore, with_kwargs=True)


def require_documents_apart(engine: Engine, context: RunContext, examples: ExampleSet) -> str:
    """Return a warning if tokens attend to earlier documents in their sequence, "" if not. Collective.

    Raises ConfigError, on every rank, if ``data.document_mask = true`` rules that out.
    """
    run = context.run
    if not getattr(examples, "several_documents", False):
        return ""
    sampled, (index,) = raise_on_all_ranks(lambda: context.task.sample(examples, 1, run.seed))
    ids = sampled[index].tokens[: 2 * _TOKENS].astype("int64")  # type: ignore[index]
    leaks = reads_on(engine, torch.as_tensor(ids, device=context.device))
    kind = getattr(getattr(engine.module, "config", None), "model_type", "model")
    finding = f"model.path = {run.model.path!r} ({kind}) lets tokens see the documents before their own"
    problem = None
    if leaks and run.data.document_mask:
        problem = ConfigError(
            f"data.document_mask = true, but {finding}. Set data.document_mask = false, which joins documents"
        )
    raise_together(problem)  # a rounding error on a single rank must not leave the others waiting
    if not leaks:
        return ""
    return (
        f"warning: data.document_mask is not set, and {finding}: at most some of its layers keep documents apart. Set "
        "data.document_mask = false to join them"
    )


@torch.no_grad()
def reads_on(engine: Engine, ids: Tensor) -> bool:
    """Return whether a model sees earlier documents in a sequence. Collective under ZeRO-3.

    The halves of ``ids``, (n,) tokens, are two documents. If the first one is changed, the logits of the second must
    not change. Both pairs are rows of one batch, so that products, also of experts, have the same shapes and rounding.
    This is measured because transformers does not list the models that use positions for this: most attention does,
    recurrent layers do not.
    """
    first, second = ids.tensor_split(2)
    changed = first.flip(0)
    if torch.equal(first, changed):
        return False  # nothing to measure with; the ids are the same on all ranks, so all of them return here
    pairs = torch.stack([torch.cat([first, second]), torch.cat([changed, second])])  # (2, n)
    restarting = [torch.arange(len(first), device=ids.device), torch.arange(len(second), device=ids.device)]
    positions = torch.cat(restarting).expand_as(pairs)
    engine.eval()
    logits = engine(input_ids=pairs, position_ids=positions).logits[:, len(first) :]
    engine.train()
    allowed = max(_DOCUMENT_ROUNDINGS * torch.finfo(logits.dtype).eps, _LEAST_LEAK) * logits.abs().max().float()
    return bool((logits[0].float() - logits[1].float()).abs().max() > allowed)


def require_small_masks(run: RunConfig, config: PreTrainedConfig) -> None:
    """Raise ConfigError if attention would need a mask of all pairs of tokens in very long sequences."""
    attention = config._attn_implementation
    length = run.data.max_length
    window = _window(run, config)
    if length > MOST_WITH_MASK and (attention == "eager" or (attention == "sdpa" and window)):
        seen = ""
        if window:
            seen = f" with a sliding window of {window} tokens"
        raise ConfigError(
            f"data.max_length = {length}: attention {attention!r}{seen} needs a mask of {length} x {length} bytes. Set "
            f'model.attn_implementation = "flash_attention_2", or data.max_length to at most {MOST_WITH_MASK}'
        )


def _window(run: RunConfig, config: PreTrainedConfig) -> int | None:
    """Return the tokens of a sliding window shorter than ``data.max_length``; None without one."""
    text = config.get_text_config()
    if not getattr(text, "use_sliding_window", True):  # a config may name a window that its model does not use
        return None
    window = getattr(text, "sliding_window", None)
    if not window or window >= run.data.max_length:
        return None
    return int(window)


def require_shareable(run: RunConfig, config: PreTrainedConfig, stage: int, micro_batch_size: int) -> None:
    """Raise ConfigError when ranks cannot share the sequences of a model of transformers ``config`` at a ZeRO stage."""
    degree = run.train.sequence_parallel
    if degree == 1:
        return
    setting = f"train.sequence_parallel = {degree}"
    if stage != 3:
        raise ConfigError(f'{setting} is for ZeRO-3; set deepspeed_config = "ds_configs/zero3.json", not stage {stage}')
    text = config.get_text_config()
    attention = config._attn_implementation
    if attention not in _ATTENTIONS:
        raise ConfigError(
            f"{setting} cannot cut attention {attention!r}, which makes a mask of a rank's own tokens; set "
            f"model.attn_implementation to one of {', '.join(map(repr, _ATTENTIONS))}"
        )
    if "flash" in attention and micro_batch_size > 1:
        raise ConfigError(
            f"{setting} with model.attn_implementation = {attention!r} takes one sequence per micro-batch, not "
            f"{micro_batch_size}; raise train.gradient_accumulation_steps, or lower train.batch_size"
        )
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    # each rank computes whole heads; heads of keys that several heads of queries share may be repeated
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        raise ConfigError(
            f"{setting} must divide the {heads} attention heads of model.path = {run.model.path!r} (and divide its "
            f"{kv_heads} heads of keys, or be a multiple of them)"
        )
    window = _window(run, config)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    obstacle = ""
    alternative = ""
    if kinds:
        obstacle = f"layers of kind {', '.join(sorted(kinds))}"
    elif window:
        obstacle = f"a sliding window of {window} tokens"
        alternative = f", or data.max_length to at most {window}"
    if obstacle:
        raise ConfigError(
            f"{setting} needs full causal attention, and model.path = {run.model.path!r} has {obstacle}; set "
            f"train.sequence_parallel = 1{alternative}"
        )


def part_of_batch(
    shared: SequenceParallel, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return (this rank's inputs, positions of all tokens, its tokens' next labels, number of predicted tokens).

    ``inputs`` and ``labels``, (examples, length), are the same on all ranks that share them. Padding is on the right,
    where no token sees it, so there is no attention mask; more is added until the degree divides the length.
    """
    ids = inputs["input_ids"]
    more = -ids.shape[1] % shared.degree
    positions = inputs.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
    targets = following(labels, more)
    # padding continues the last document, so that it is not taken for another one
    added = positions[:, -1:] + torch.arange(1, more + 1, device=ids.device)
    positions = torch.cat([positions, added], dim=1)
    inputs_of_rank = {"input_ids": shared.part(pad(ids, (0, more))), "position_ids": shared.part(positions)}
    num_predicted = (targets != IGNORED).sum().clamp_min(1)  # a batch that predicts nothing has loss 0, not NaN
    return inputs_of_rank, positions, shared.part(targets), num_predicted


def shared_sequences(engine: Engine, context: RunContext) -> SequenceParallel | None:
    """Return the ranks that share sequences with this one; None for a run without ``train.sequence_parallel``.

    Collective. Raises ConfigError, on every rank, for a model whose sequences cannot be shared.
    """
    degree = context.run.train.sequence_parallel
    if degree == 1:
        return None
    if reason := why_all_logits(engine.module, context.task):
        raise ConfigError(f"train.sequence_parallel = {degree} needs a known head, but {reason}; set it to 1")
    config: PreTrainedConfig = engine.module.config  # type: ignore[assignment]
    shared = SequenceParallel(degree, engine.module, config._attn_implementation)
    require_same_when_shared(engine, context.run, shared, context.device)
    return shared


@torch.no_grad()
def require_same_when_shared(engine: Engine, run: RunConfig, shared: SequenceParallel, device: str) -> None:
    """Raise ConfigError, on every rank, if the logits of a short sequence change when ranks share it. Collective.

    This is measured because models cannot be recognised: recurrent layers, and attention that transformers does not
    let others replace, read nothing from the other ranks.
    """
    config: PreTrainedConfig = engine.module.config  # type: ignore[assignment]
    length = _TOKENS * shared.degree
    ids = (torch.arange(length, device=device) * 5 + 3).remainder(config.get_text_config().vocab_size)[None]
    positions = torch.arange(length, device=device)[None]
    if run.task_facts.packs_text and run.data.keeps_documents_apart:
        # documents whose borders are not those of the ranks' parts
        positions = positions.remainder(_TOKENS + 3)
    engine.eval()
    expected = shared.part(engine(input_ids=ids, position_ids=positions).logits).float()
    with shared.sharing(positions):
        logits = engine(input_ids=shared.part(ids), position_ids=shared.part(positions)).logits.float()
    engine.train()
    dtype = torch.float32
    if run.train.precision == "bf16":
        dtype = torch.bfloat16
    eps = torch.finfo(dtype).eps
    # products of experts have other sizes on each rank: in fp32 their roundings were up to 40 eps in 24 blocks
    allowed = max(_SHARING_ROUNDINGS * eps, _LEAST_LEAK)
    problem = None
    if bool((logits - expected).abs().max() > allowed * expected.abs().max()):
        problem = ConfigError(
            f"train.sequence_parallel = {shared.degree}, but model.path = {run.model.path!r} "
            f"({config.model_type}) gives other logits where ranks share a sequence: not all of it that reads "
            "several tokens is attention that can be cut. Set train.sequence_parallel = 1"
        )
    raise_together(problem)  # each rank compared its own part
