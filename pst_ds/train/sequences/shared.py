"""Sequences that ranks share (``train.sequence_parallel``): which models can, and the inputs of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.tasks.task import IGNORED
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.parallel.sequence import SequenceParallel
from pst_ds.train.run_context import RunContext
from pst_ds.train.sequences.documents import LEAST_LEAK
from pst_ds.train.token_heads import following, why_all_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
_ROUNDINGS = 8
_TOKENS = 8
"""Tokens of each rank in the check."""


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
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        raise ConfigError(
            f"{setting} must divide the {heads} attention heads of model.path = {run.model.path!r} (and divide its "
            f"{kv_heads} heads of keys, or be a multiple of them)"
        )
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or (window and window < run.data.max_length):
        seen = f"layers of kind {', '.join(sorted(kinds))}" if kinds else f"a sliding window of {window} tokens"
        raise ConfigError(
            f"{setting} is for attention to all tokens before, and model.path = {run.model.path!r} has {seen}; set "
            "train.sequence_parallel = 1" + ("" if kinds else f", or data.max_length to at most {window}")
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
    added = positions[:, -1:] + torch.arange(1, more + 1, device=ids.device)
    positions = torch.cat([positions, added], dim=1)
    own = {"input_ids": shared.part(pad(ids, (0, more))), "position_ids": shared.part(positions)}
    return own, positions, shared.part(targets), (targets != IGNORED).sum().clamp_min(1)


def shared_sequences(engine: Engine, context: RunContext) -> SequenceParallel | None:
    """Return the ranks that share sequences with this one; None for a run without ``train.sequence_parallel``.

    Collective. Raises ConfigError, on every rank, for a model whose sequences cannot be shared.
    """
    degree = context.run.train.sequence_parallel
    if degree == 1:
        return None
    if reason := why_all_logits(engine.module, context.task):
        raise ConfigError(f"train.sequence_parallel = {degree} needs a head that is known, but {reason}; set it to 1")
    config: PreTrainedConfig = engine.module.config  # type: ignore[assignment]
    shared = SequenceParallel(degree, config._attn_implementation)
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
        positions = positions.remainder(_TOKENS + 3)
    engine.eval()
    expected = shared.part(engine(input_ids=ids, position_ids=positions).logits).float()
    with shared.sharing(positions):
        found = engine(input_ids=shared.part(ids), position_ids=shared.part(positions)).logits.float()
    engine.train()
    eps = torch.finfo(torch.bfloat16 if run.train.precision == "bf16" else torch.float32).eps
    # products of experts have other sizes on each rank: in fp32 their roundings were up to 40 eps in 24 blocks
    allowed = max(_ROUNDINGS * eps, LEAST_LEAK)
    differs = bool((found - expected).abs().max() > allowed * expected.abs().max())

    def refuse() -> None:
        if differs:
            raise ConfigError(
                f"train.sequence_parallel = {shared.degree}, but model.path = {run.model.path!r} "
                f"({config.model_type}) gives other logits where ranks share a sequence: not all of it that reads "
                "several tokens is attention that can be cut. Set train.sequence_parallel = 1"
            )

    raise_on_all_ranks(refuse)
