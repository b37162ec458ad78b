"""Sequences that neighbouring ranks share, each with a stretch of every one: DeepSpeed's Ulysses.

Everything but attention treats tokens one by one, so a rank computes it for its own stretch. For attention the ranks of
a group trade: one gets a share of the heads for all tokens, and gives the result back (arXiv 2309.14509, 2506.13996).
DeepSpeed's engine knows nothing of it: ZeRO splits and averages over all ranks, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pst_ds.parallel.backward_pass import in_backward_pass

_CORE = "pst_ds_core"
"""Where an attention that was replaced keeps the one it replaced."""


class SequenceParallel:
    """A group of ``degree`` neighbouring ranks that train on the same sequences. Creating it is collective.

    It takes the place of ``attention``, the name of an attention of transformers, for all models of this process, and
    does as that does outside of :meth:`sharing` and of backward passes.
    """

    def __init__(self, degree: int, attention: str):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.degree = degree
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None
        self._is_sharing = False
        self._traders: dict[tuple[int, ...], Any] = {}
        groups = [list(range(first, first + degree)) for first in range(0, dist.get_world_size(), degree)]
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        self._ranks, self._group = next(pair for pair in made if dist.get_rank() in pair[0])
        self._takes_masks = attention == "sdpa"
        core = ALL_ATTENTION_FUNCTIONS[attention]
        self._core: Callable[..., Any] = getattr(core, _CORE, core)

        def attend(*args: Any, **kwargs: Any) -> Any:
            return self._attend(*args, **kwargs)

        setattr(attend, _CORE, self._core)
        ALL_ATTENTION_FUNCTIONS[attention] = attend

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's stretch of ``whole``, (texts, length, ...), whose length the degree divides."""
        length = whole.shape[1] // self.degree
        return whole.narrow(1, self._ranks.index(dist.get_rank()) * length, length)

    @contextmanager
    def sharing(self, positions: Tensor) -> Iterator[None]:
        """Let attention be over whole sequences while models are given parts of them, here and in the backward pass.

        ``positions``: those of the whole sequences, (texts, length) int64, which begin anew with each document.
        """
        self._positions, self._is_sharing = positions, True
        self._mask = _documents_apart(positions) if self._takes_masks else None
        try:
            yield
        finally:
            self._is_sharing = False

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._positions is None or not (self._is_sharing or in_backward_pass()):
            return self._core(module, query, key, value, mask, *args, **kwargs)
        kwargs["position_ids"] = self.part(self._positions)
        groups = getattr(module, "num_key_value_groups", None)
        try:
            return self._trader(query, key)(module, query, key, value, self._mask, *args, **kwargs)
        finally:
            if groups is not None:  # changed for ranks that outnumber the heads of keys
                module.num_key_value_groups = groups

    def _trader(self, query: Tensor, key: Tensor) -> Any:
        """Return DeepSpeed's module for tensors of these shapes (texts, heads, length, width of a head)."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        shape = (query.shape[0], query.shape[1], key.shape[1], query.shape[3])
        if shape not in self._traders:
            texts, heads, kv_heads, width = shape
            self._traders[shape] = UlyssesSPAttentionHF(
                attn=self._core,
                batch_size=texts,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=kv_heads,
                num_hidden_layers=1,
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._traders[shape]


def _documents_apart(positions: Tensor) -> Tensor | None:
    """Return which tokens each may see, (texts, 1, length, length) bool; None where that is all before it.

    Attention without a mask is causal; a mask takes a byte for each pair of tokens.
    """
    documents = (positions == 0).cumsum(1)
    if not bool((documents != 1).any()):
        return None
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril_().unsqueeze(1)
