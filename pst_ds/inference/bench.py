"""``pst-ds bench``: the variants of a model that are compared, and their speeds as medians over interleaved turns."""

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds.core.kernels.host import cpu_name
from pst_ds.core.kl_divergence import KLDivergence
from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder, open_model_folder
from pst_ds.inference.decoder import Decoder
from pst_ds.inference.engine import open_decoder
from pst_ds.progress import Progress
from pst_ds.runtime import native, sparse_layers

_PIECES = 16
"""Most pieces of a text on which predictions are compared."""


class Variant:
    """One way to run the model with transformers. ``file_bytes`` is None if it exists in memory only."""

    def __init__(self, model: PreTrainedModel, is_causal: bool, file_bytes: int | None = None):
        self.model = model
        self._is_causal = is_causal
        self.file_bytes = file_bytes

    def facts(self) -> dict[str, int | None]:
        return {
            "resident_bytes": resident_bytes(self.model),
            "file_bytes": self.file_bytes,
            "sparse_layers": len(sparse_layers(self.model)),
        }

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of each token of a sequence (tokens,): (tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0]
        return logits

    def timed(self, ids: Tensor, num_steps: int) -> tuple[list[float], list[float]]:
        """Return the seconds of the prefill of ``ids`` (batch, tokens), and of each step of a causal model."""
        if self._is_causal:
            # each next() is one pass of the model: the prefill first, then the steps
            tokens = greedy(self.model, ids)
            prefill = _seconds(next, tokens)
            steps = [_seconds(next, tokens) for _ in range(num_steps)]
            return [prefill], steps
        inputs = {"input_ids": ids}
        if self.model.config.is_encoder_decoder:
            # a single token, so that nearly all of the time is the encoder's
            inputs["decoder_input_ids"] = ids[:, :1]
        with torch.inference_mode():
            forward = _seconds(self.model, **inputs)
        return [forward], []


class NativeLoop:
    """A folder with quantised values in the native decoder; its weights are loaded once."""

    def __init__(self, decoder: Decoder, file_bytes: int):
        self.decoder = decoder
        self._file_bytes = file_bytes

    @classmethod
    def of(cls, folder: ModelFolder, positions: int, sequences: int) -> Self | None:
        """Open ``folder``. Return None if it is not causal, or :func:`open_decoder` would choose transformers."""
        if not folder.is_causal:
            return None
        instead = "the native decoder is not measured"
        decoder = open_decoder(folder, context=positions, sequences=sequences, instead=instead)
        if decoder is None:
            return None
        return cls(decoder, folder.weight_file_bytes)

    def facts(self) -> dict[str, int | None]:
        # weights only: caches and buffers depend on the settings, not on the format
        return {"resident_bytes": self.decoder.weight_bytes, "file_bytes": self._file_bytes, "sparse_layers": 0}

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of each token of a sequence (tokens,): (tokens, vocabulary)."""
        self.decoder.reset()
        return self.decoder.forward(ids, all_logits=True)

    def timed(self, ids: Tensor, num_steps: int) -> tuple[list[float], list[float]]:
        """Return the seconds of the prefill of ``ids`` (batch, tokens), and of each step."""
        decoder = self.decoder
        prompts = ids.tolist()
        # the number may have changed since the decoder was opened
        decoder.threads = torch.get_num_threads()
        for sequence in range(len(prompts)):
            decoder.reset(sequence=sequence)
        start = time.perf_counter()
        last_logits = [decoder.forward(prompt, sequence=number) for number, prompt in enumerate(prompts)]
        logits = torch.stack(last_logits)  # (batch, vocabulary)
        prefill = time.perf_counter() - start
        steps: list[float] = []
        for _ in range(num_steps):
            # the choice is not part of a step's time
            tokens = logits.argmax(-1).tolist()
            start = time.perf_counter()
            logits = decoder.step(tokens)
            steps.append(time.perf_counter() - start)
        return [prefill], steps


def divergences(
    by_name: Mapping[str, Variant | NativeLoop], folder: ModelFolder, text: str, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return how far the next-token predictions of each variant are from those of ``args.reference``, on pieces of
    ``args.prompt_tokens`` spread evenly over ``text``. Raises InputError."""
    other = open_model_folder(args.reference)
    tokens = args.prompt_tokens
    vocabulary = folder.config.get_text_config().vocab_size
    other_vocabulary = other.config.get_text_config().vocab_size
    ids = torch.tensor(folder.tokenizer()(text)["input_ids"])
    if vocabulary != other_vocabulary:
        raise InputError(
            f"reference = {str(other.path)!r} has {other_vocabulary:,} tokens, and {folder.path} {vocabulary:,}"
        )
    if len(ids) < tokens:
        raise InputError(
            f"text = {args.text!r} has {len(ids)} tokens, fewer than prompt_tokens = {tokens}. Name a longer one"
        )
    reference = Variant(other.load("dense", "fp32"), is_causal=True)
    divergence_of = {name: KLDivergence() for name in by_name}
    count = min(_PIECES, len(ids) // tokens)
    for number in range(count):
        start = number * len(ids) // count
        piece = ids[start : start + tokens]
        expected = reference.logits(piece)
        for name, variant in by_name.items():
            divergence_of[name].add(expected, variant.logits(piece))
    return {name: divergence.result() for name, divergence in divergence_of.items()}


def variants(folder: ModelFolder, dtype: str) -> dict[str, Variant]:
    """Return the models by name: "dense", and the folder's packed format. Raises InputError."""
    # the dense model of a packed folder exists in memory only
    file_bytes = folder.weight_file_bytes if folder.is_plain else None
    by_name = {"dense": Variant(folder.load("dense", dtype), folder.is_causal, file_bytes)}
    if folder.omits_pruned:
        by_name[folder.format] = Variant(folder.load("sparse", dtype), folder.is_causal, folder.weight_file_bytes)
    return by_name


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared storage once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def conditions() -> dict[str, object]:
    """Describe the machine, its instructions, and the versions."""
    sparse_kernel = "torch"
    if native.library() is not None:
        sparse_kernel = native.LEVELS[native.best_level()]
    return {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sparse_kernel": sparse_kernel,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def measure(
    by_name: Mapping[str, Variant | NativeLoop], folder: ModelFolder, batch: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return rates of each variant: tokens per second of prefill and decoding, and seconds of a decoding step.

    A model that is not causal has only a forward pass, which counts as its prefill.
    """
    ids = _token_ids(folder, batch, args.prompt_tokens)
    num_steps = max(1, args.new_tokens - 1)  # the prefill gives the first token
    prefill: dict[str, list[float]] = {name: [] for name in by_name}
    decode: dict[str, list[float]] = {name: [] for name in by_name}
    with Progress("measure", (args.repeats + 1) * len(by_name), "times") as progress:
        # in turns, so that a slow phase of the machine affects all variants alike
        for turn in range(args.repeats + 1):
            for name, variant in by_name.items():
                prefill_seconds, step_seconds = variant.timed(ids, num_steps)
                if turn:  # the first turn warms up
                    prefill[name] += prefill_seconds
                    decode[name] += step_seconds
                progress.add(1, name)
    rates: dict[str, dict[str, float]] = {}
    for name in by_name:
        rates[name] = {"prefill_tokens_per_second": ids.numel() / statistics.median(prefill[name])}
        if decode[name]:
            step = statistics.median(decode[name])
            rates[name] |= {"decode_tokens_per_second": batch / step, "decode_step_seconds": step}
    return rates


def _seconds(work: Callable[..., object], *args: object, **kwargs: Tensor) -> float:
    start = time.perf_counter()
    work(*args, **kwargs)
    return time.perf_counter() - start


def _token_ids(folder: ModelFolder, batch: int, tokens: int) -> Tensor:
    """Draw (batch, tokens) from the whole vocabulary, with a fixed seed."""
    size = getattr(folder.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise InputError(f"{folder.path}: config.json has no vocab_size. Only text models can be measured")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def greedy(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Yield the most likely next tokens (batch, 1) of a transformers causal model after ``ids`` (batch, tokens)."""
    accepted = inspect.signature(type(model).forward).parameters
    cache = None  # made by the prefill
    cache_name = "cache" if "cache" in accepted else "past_key_values"  # renamed in transformers 5
    options: dict[str, int] = {}
    if "logits_to_keep" in accepted:
        # of the last token only, as in generate() of transformers
        options["logits_to_keep"] = 1
    while True:
        with torch.inference_mode():
            out = model(input_ids=ids, use_cache=True, **{cache_name: cache}, **options)
            cache = out[cache_name]
            ids = out.logits[:, -1:].argmax(-1)  # (batch, 1)
        yield ids
