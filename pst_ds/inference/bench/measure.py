"""Measure the variants of ``pst-ds bench``: medians over interleaved turns."""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pst_ds.inference.bench.variants import NativeLoop, Variant
from pst_ds.inference.hf.model_folder import ModelFolder, ModelFolderError
from pst_ds.inference.runtime import SparseLinear
from pst_ds.inference.runtime.dense import PrepackedLinear
from pst_ds.nn.model_structure import is_linear
from pst_ds.progress import Progress


def measure(
    by_name: Mapping[str, Variant | NativeLoop], folder: ModelFolder, batch: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return rates of each variant: tokens per second of prefill and decoding, and shares of a decoding step's time.

    A model that is not causal has only a forward pass, which counts as its prefill.
    """
    ids, num_steps = _token_ids(folder, batch, args.prompt_tokens), max(1, args.new_tokens - 1)
    prefill: dict[str, list[float]] = {name: [] for name in by_name}
    decode: dict[str, list[float]] = {name: [] for name in by_name}
    with Progress("measure", (args.repeats + 1) * len(by_name), "times") as progress:
        for turn in range(args.repeats + 1):
            for name, variant in by_name.items():
                if isinstance(variant, NativeLoop):
                    timed = variant.timed(ids, num_steps)
                else:
                    timed = _decode(variant, ids, num_steps) if folder.is_causal else _forward(variant, ids)
                if turn:  # the first turn warms up
                    prefill[name] += timed[0]
                    decode[name] += timed[1]
                progress.add(1, name)
    rates: dict[str, dict[str, float]] = {}
    for name, variant in by_name.items():
        rates[name] = {"prefill_tokens_per_second": ids.numel() / statistics.median(prefill[name])}
        if decode[name]:
            step = statistics.median(decode[name])
            rates[name] |= {"decode_tokens_per_second": batch / step, "decode_step_seconds": step}
            if isinstance(variant, Variant):
                rates[name] |= _shares(variant, ids, num_steps)
    return rates


def _decode(variant: Variant, ids: Tensor, num_steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each prefill and of each step; the copies of the model step in turn."""
    decoders = [Decoder(model) for model in variant.models]
    prefill = [_seconds(decoder.prefill, ids) for decoder in decoders]
    return prefill, [_seconds(decoders[step % len(decoders)].step) for step in range(num_steps)]


@torch.inference_mode()
def _forward(variant: Variant, ids: Tensor) -> tuple[list[float], list[float]]:
    inputs = {"input_ids": ids}
    if variant.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :1]
    return [_seconds(model, **inputs) for model in variant.models], []


def _seconds(work: Callable[..., object], *args: Tensor, **kwargs: Tensor) -> float:
    start = time.perf_counter()
    work(*args, **kwargs)
    return time.perf_counter() - start


def _shares(variant: Variant, ids: Tensor, num_steps: int) -> dict[str, float]:
    """Return the shares of a step's time outside the linear layers and in the output layer, as medians."""
    decoders = [Decoder(model) for model in variant.models]
    clocks = [LinearTime(model) for model in variant.models]
    for decoder, clock in zip(decoders, clocks, strict=True):
        decoder.prefill(ids)
        clock.start()
    outside, output_layer = [], []
    for step in range(num_steps):
        decoder, clock = decoders[step % len(decoders)], clocks[step % len(decoders)]
        clock.blocks = clock.output_layer = 0.0
        total = _seconds(decoder.step)
        outside.append(1 - (clock.blocks + clock.output_layer) / total)
        output_layer.append(clock.output_layer / total)
    for clock in clocks:
        clock.stop()
    return {
        "outside_linear_layers": statistics.median(outside),
        "output_layer_share": statistics.median(output_layer),
    }


def _token_ids(folder: ModelFolder, batch: int, tokens: int) -> Tensor:
    """Draw (batch, tokens) from the whole vocabulary, with a fixed seed."""
    size = getattr(folder.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelFolderError(f"{folder.path}: config.json has no vocab_size. Only text models can be measured")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))


class Decoder:
    """A transformers causal model with the keys and values of its previous tokens; decodes greedily."""

    def __init__(self, model: nn.Module):
        self.model = model
        accepted = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: object = None
        self.tokens = torch.empty(0, 0, dtype=torch.long)
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
                self._add_hooks(module, "output_layer" if module is output_layer else "blocks")

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add_hooks(self, module: nn.Module, total: str) -> None:
        started = 0.0

        def begin(*_: object) -> None:
            nonlocal started
            started = time.perf_counter()

        def end(*_: object) -> None:
            setattr(self, total, getattr(self, total) + time.perf_counter() - started)

        self._hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
