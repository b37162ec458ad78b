"""A plain greedy loop for transformers causal models: one prefill, then a step per token."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pst_ds.inference.runtime.dense import PrepackedLinear
from pst_ds.inference.runtime.linear import SparseLinear
from pst_ds.nn.model_structure import is_linear


class Decoder:
    """A model with the keys and values of its previous tokens; decodes greedily."""

    def __init__(self, model: nn.Module):
        self.model = model
        accepted = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: object = None
        self.tokens: Tensor = torch.empty(0, 0, dtype=torch.long)
        """The last tokens, (batch, 1)."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Start over with ``ids`` (batch, tokens). Return the first new tokens (batch, 1)."""
        self._cache = None
        return self._forward(ids)

    def step(self) -> Tensor:
        """Return the next tokens (batch, 1)."""
        return self._forward(self.tokens)

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, use_cache=True, **{self._cache_name: self._cache}, **self._options)
        self._cache = out[self._cache_name]
        self.tokens = out.logits[:, -1:].argmax(-1)
        return self.tokens


@dataclass
class LinearTime:
    """Wall-clock seconds in a model's linear layers, between :meth:`start` and :meth:`stop`."""

    model: nn.Module
    blocks: float = 0.0
    output_layer: float = 0.0

    def start(self) -> None:
        get = getattr(self.model, "get_output_embeddings", None)
        output_layer = get() if get is not None else None
        self._hooks: list[RemovableHandle] = []
        for module in self.model.modules():
            if isinstance(module, SparseLinear | PrepackedLinear) or is_linear(module):
                begin, end = self._stopwatch("output_layer" if module is output_layer else "blocks")
                self._hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _stopwatch(self, total: str) -> tuple[Callable[..., None], Callable[..., None]]:
        started = 0.0

        def begin(*_: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def end(*_: object) -> None:
            setattr(self, total, getattr(self, total) + time.perf_counter() - started)

        return begin, end


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared storage once. Prepacked weights count as the original ones."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    packed = sum(module.weight_bytes for module in model.modules() if isinstance(module, PrepackedLinear))
    return sum(storages.values()) + packed
