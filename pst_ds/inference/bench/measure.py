"""Measure the variants of ``pst-ds bench``: medians over interleaved turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pst_ds.inference.bench.decode import Decoder, LinearTime
from pst_ds.inference.bench.native_loop import NativeLoop
from pst_ds.inference.bench.variants import Variant
from pst_ds.inference.hf.model_folder import ModelFolder, ModelFolderError
from pst_ds.progress import Progress

Times = dict[str, list[float]]


def measure(
    by_name: Mapping[str, Variant | NativeLoop], folder: ModelFolder, batch: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return rates of each variant: tokens per second of prefill and decoding, and shares of a decoding step's time.

    A model that is not causal has only a forward pass, which counts as its prefill.
    """
    ids = _token_ids(folder, batch, args.prompt_tokens)
    prefill: Times = {name: [] for name in by_name}
    decode: Times = {name: [] for name in by_name}
    with Progress("measure", (args.repeats + 1) * len(by_name), "times") as progress:
        for turn in range(args.repeats + 1):
            for name, variant in by_name.items():
                timed = _timed(variant, folder, ids, args.new_tokens)
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
                rates[name] |= shares(variant, ids, args.new_tokens)
    return rates


def _timed(
    variant: Variant | NativeLoop, folder: ModelFolder, ids: Tensor, new_tokens: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of each prefill and of each step."""
    if isinstance(variant, NativeLoop):
        return variant.timed(ids, new_tokens)
    return _run(variant, ids, new_tokens) if folder.is_causal else _forward(variant, ids)


def _run(variant: Variant, ids: Tensor, new_tokens: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each prefill and of each step; the copies of the model step in turn."""
    decoders = [Decoder(model) for model in variant.models]
    prefill = [_seconds(decoder.prefill, ids) for decoder in decoders]
    return prefill, [_seconds(decoders[step % len(decoders)].step) for step in range(max(1, new_tokens - 1))]


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


def shares(variant: Variant, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Return the shares of a step's time outside the linear layers and in the output layer, as medians."""
    decoders = [Decoder(model) for model in variant.models]
    clocks = [LinearTime(model) for model in variant.models]
    for decoder, clock in zip(decoders, clocks, strict=True):
        decoder.prefill(ids)
        clock.start()
    outside, output_layer = [], []
    for step in range(max(1, new_tokens - 1)):
        decoder, clock = decoders[step % len(decoders)], clocks[step % len(decoders)]
        before, output_before = clock.blocks + clock.output_layer, clock.output_layer
        total = _seconds(decoder.step)
        outside.append(1 - (clock.blocks + clock.output_layer - before) / total)
        output_layer.append((clock.output_layer - output_before) / total)
    for clock in clocks:
        clock.stop()
    shares = {"outside_linear_layers": outside, "output_layer_share": output_layer}
    return {name: statistics.median(values) for name, values in shares.items()}


def _token_ids(folder: ModelFolder, batch: int, tokens: int) -> Tensor:
    """Draw (batch, tokens) from the whole vocabulary, with a fixed seed."""
    size: object = getattr(folder.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelFolderError(f"{folder.path}: config.json lacks vocab_size. Only text models can be measured")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))
