"""Sequence parallelism: neighbouring ranks share every sequence, each with a stretch of it (DeepSpeed's Ulysses).

Only attention mixes tokens. For it, the ranks of a group exchange data: each computes some of the heads for all tokens
and returns the result (arXiv 2309.14509, 2506.13996). DeepSpeed's engine is not involved: ZeRO partitions and averages
over all ranks as usual.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps

import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.core.documents import by_document, document_mask
from pst_ds.parallel.sharding import in_backward_pass
from pst_ds.third_party import patched_entry, while_computing


class SequenceParallel:
    """A group of ``degree`` neighbouring ranks that train ``model`` on the same sequences. Creating it is collective.

    It replaces ``attention``, a name in the registry of transformers, while the model or a part of it computes inside
    :meth:`sharing`, or inside a backward pass.
    """

    def __init__(self, degree: int, model: nn.Module, attention: str):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.degree = degree
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None
        self._is_sharing = False
        self._traders: dict[tuple[int, ...], Callable[..., object]] = {}
        groups = [list(range(first, first + degree)) for first in range(0, dist.get_world_size(), degree)]
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        self._ranks, self._group = next(pair for pair in made if dist.get_rank() in pair[0])
        self._takes_masks = attention == "sdpa"
        core = ALL_ATTENTION_FUNCTIONS[attention]
        self._core: Callable[..., object] = by_document(core) if self._takes_masks else core

        def scope(module: nn.Module) -> AbstractContextManager[None]:
            if self._positions is None or not (self._is_sharing or in_backward_pass()):
                return nullcontext()
            return patched_entry(ALL_ATTENTION_FUNCTIONS, attention, self._sharing_attention)

        while_computing(model, scope)

    def part(self, whole: Tensor) -> Tensor:
        """Return this rank's stretch of ``whole``, (sequences, length, ...); the degree must divide the length."""
        length = whole.shape[1] // self.degree
        return whole.narrow(1, self._ranks.index(dist.get_rank()) * length, length)

    @contextmanager
    def sharing(self, positions: Tensor) -> Iterator[None]:
        """Let models that get stretches attend to whole sequences in the context, and in its backward pass.

        ``positions``: positions in the whole sequences, (sequences, length) int64, which restart at 0 in each document.
        """
        self._positions = positions
        self._is_sharing = True
        self._mask = document_mask((positions == 0).cumsum(1)) if self._takes_masks else None
        try:
            yield
        finally:
            self._is_sharing = False

    def _sharing_attention(self, attend: Callable[..., object]) -> Callable[..., object]:
        """Return a function with the signature of ``attend`` that computes a share of the heads for all tokens."""

        @wraps(attend)
        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: object,
            *args: object,
            **kwargs: object,
        ) -> object:
            assert self._positions is not None
            kwargs["position_ids"] = self.part(self._positions)
            groups = getattr(module, "num_key_value_groups", None)
            try:
                # attention_mask is for this rank's tokens; self._mask is for those of all ranks
                return self._trader(query, key)(module, query, key, value, self._mask, *args, **kwargs)
            finally:
                if groups is not None:  # DeepSpeed changes it if there are more ranks than key heads
                    module.num_key_value_groups = groups

        return attention

    def _trader(self, query: Tensor, key: Tensor) -> Callable[..., object]:
        """Return DeepSpeed's module for tensors of these shapes, (sequences, heads, length, width of a head)."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        shape = (query.shape[0], query.shape[1], key.shape[1], query.shape[3])
        if shape not in self._traders:
            sequences, heads, kv_heads, width = shape
            self._traders[shape] = UlyssesSPAttentionHF(
                attn=self._core,
                batch_size=sequences,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=kv_heads,
                num_hidden_layers=1,
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._traders[shape]
