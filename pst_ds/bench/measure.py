"""Times of the variants of ``pst-ds bench``: they take turns, and what counts is the median."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from pst_ds.bench.decode import Decoder, LinearTime
from pst_ds.bench.variants import Variant
from pst_ds.hf.model_folder import ModelFolder, ModelFolderError
from pst_ds.progress import Progress

Times = dict[str, list[float]]


def measure(
    found: dict[str, Variant], folder: ModelFolder, batch: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Rates of each variant: tokens a second of prefill and decode, and where a decoding step's time goes.

    A model that is not causal has a forward pass only, which counts as its prefill.
    """
    ids = _token_ids(folder, batch, args.prompt_tokens)
    prefill: Times = {name: [] for name in found}
    decode: Times = {name: [] for name in found}
    with Progress("measure", (args.repeats + 1) * len(found), "times") as shown:
        for turn in range(args.repeats + 1):
            for name, variant in found.items():
                timed = _run(variant, ids, args.new_tokens) if folder.is_causal else _forward(variant, ids)
                if turn:  # the first warms up
                    prefill[name] += timed[0]
                    decode[name] += timed[1]
                shown.add(1, name)
    rates: dict[str, dict[str, float]] = {}
    for name, variant in found.items():
        rates[name] = {"prefill_tokens_per_second": ids.numel() / statistics.median(prefill[name])}
        if decode[name]:
            step = statistics.median(decode[name])
            rates[name] |= {"decode_tokens_per_second": batch / step, "decode_step_seconds": step}
            rates[name] |= shares(variant, ids, args.new_tokens)
    return rates


def _run(variant: Variant, ids: Tensor, new_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of each prefill, and of each step; the copies of the model step in turn."""
    decoders = [Decoder(model) for model in variant.models]
    prefill, decode = [], []
    for decoder in decoders:
        start = time.perf_counter()
        decoder.prefill(ids)
        prefill.append(time.perf_counter() - start)
    for step in range(max(1, new_tokens - 1)):
        decoder = decoders[step % len(decoders)]
        start = time.perf_counter()
        decoder.step()
        decode.append(time.perf_counter() - start)
    return prefill, decode


@torch.inference_mode()
def _forward(variant: Variant, ids: Tensor) -> tuple[list[float], list[float]]:
    seconds = []
    for model in variant.models:
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :1]
        start = time.perf_counter()
        model(**inputs)
        seconds.append(time.perf_counter() - start)
    return seconds, []


def shares(variant: Variant, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Of the time of a step: what is outside the linear layers, and what the output layer takes. Medians of steps."""
    decoders = [Decoder(model) for model in variant.models]
    clocks = [LinearTime(model) for model in variant.models]
    for decoder, clock in zip(decoders, clocks, strict=True):
        decoder.prefill(ids)
        clock.start()
    outside, output_layer = [], []
    for step in range(max(1, new_tokens - 1)):
        decoder, clock = decoders[step % len(decoders)], clocks[step % len(decoders)]
        before, output_before = clock.blocks + clock.output_layer, clock.output_layer
        start = time.perf_counter()
        decoder.step()
        total = time.perf_counter() - start
        outside.append(1 - (clock.blocks + clock.output_layer - before) / total)
        output_layer.append((clock.output_layer - output_before) / total)
    for clock in clocks:
        clock.stop()
    shares = {"outside_linear_layers": outside, "output_layer_share": output_layer}
    return {name: statistics.median(values) for name, values in shares.items()}


def _token_ids(folder: ModelFolder, batch: int, tokens: int) -> Tensor:
    """(batch, tokens): the same every time, of the whole vocabulary."""
    size: Any = getattr(folder.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelFolderError(f"{folder.path}: config.json has no vocab_size, and only models of text are measured")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))
