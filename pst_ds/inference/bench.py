"""``pst-ds bench``: the variants of a model that are compared, and their speeds as medians over interleaved turns."""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pst_ds.core.kernels.host import available_bytes, cpu_name
from pst_ds.errors import InputError
from pst_ds.formats import FORMATS, FormatError
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.hf.model_folder import ModelFolder
from pst_ds.inference.hf.semi_structured import is_two_four
from pst_ds.inference.runtime import SparseLinear, native, sparse_layers
from pst_ds.inference.runtime.attention import quicken_decoding
from pst_ds.inference.runtime.dense import PrepackedLinear, can_prepack, prepack
from pst_ds.inference.runtime.ops import CSR_FROM_SPARSITY
from pst_ds.nn.model_structure import is_conv1d, is_linear, untied_linear_layers
from pst_ds.progress import Progress

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Variant:
    """One way to run the model: the model and its copies. ``file_bytes`` is None if it exists in memory only."""

    def __init__(self, model: PreTrainedModel, file_bytes: int | None = None):
        self.model, self.file_bytes = model, file_bytes
        self.models, self.loaded_bytes = [model], resident_bytes(model)

    def facts(self) -> dict[str, int | None]:
        return {
            "resident_bytes": self.loaded_bytes,
            "file_bytes": self.file_bytes,
            "sparse_layers": len(sparse_layers(self.model)),
            "copies": len(self.models),
        }


class NativeLoop:
    """A folder with quantised values in the native decoder; its weights are loaded once."""

    def __init__(self, decoder: Decoder, file_bytes: int):
        self.decoder, self._file_bytes = decoder, file_bytes

    @classmethod
    def of(cls, folder: ModelFolder, positions: int, sequences: int) -> NativeLoop | None:
        """Open ``folder``. Return None if its values are not quantised, or the decoder does not support the model."""
        if not folder.is_causal or folder.values is None:
            return None
        try:
            decoder = Decoder.from_pretrained(folder.path, positions, sequences=sequences)
        except (DecoderError, RuntimeError) as error:
            print(f"the native loop is not measured: {error}", file=sys.stderr)
            return None
        return cls(decoder, folder.weight_file_bytes)

    def facts(self) -> dict[str, int | None]:
        nbytes = {"resident_bytes": self.decoder.weight_bytes, "file_bytes": self._file_bytes}
        return {**nbytes, "sparse_layers": 0, "copies": 1}

    def timed(self, ids: Tensor, num_steps: int) -> tuple[list[float], list[float]]:
        """Return the seconds of the prefill of ``ids`` (batch, tokens), and of each step."""
        decoder, prompts = self.decoder, ids.tolist()
        decoder.threads = torch.get_num_threads()
        for sequence in range(len(prompts)):
            decoder.reset(sequence=sequence)
        start = time.perf_counter()
        logits = torch.stack([decoder.forward(prompt, sequence=number) for number, prompt in enumerate(prompts)])
        prefill, steps = time.perf_counter() - start, []
        for _ in range(num_steps):
            tokens = logits.argmax(-1).tolist()
            start = time.perf_counter()
            logits = decoder.step(tokens)
            steps.append(time.perf_counter() - start)
        return [prefill], steps


def variants(folder: ModelFolder, dense: ModelFolder | None, formats: list[str], dtype: str) -> dict[str, Variant]:
    """Return the models by name: "dense" (transformers unchanged), "prepacked", and each sparse format.

    ``formats`` default to :func:`default_formats`. Without ``dense`` the folder is unpacked. All but "dense" have a
    fast output layer and fast attention. Raises InputError.
    """
    base = dense or folder
    plain = base.load("dense", dtype)
    by_name = {"dense": Variant(plain, base.weight_file_bytes if base.format == "dense" else None)}
    if can_prepack(plain.dtype):
        packed = copy.deepcopy(plain)
        prepack(packed, vectors=1)
        quicken_decoding(packed)
        by_name["prepacked"] = Variant(packed)
    for name in formats or default_formats(folder, plain if dense is None else folder.load("dense", dtype)):
        by_name[name] = _sparse(folder, plain if dense is None else None, name, dtype)
        quicken_decoding(by_name[name].model)
    return by_name


def default_formats(folder: ModelFolder, plain: PreTrainedModel) -> list[str]:
    """Return the folder's format (bitmask for a dense one), csr if it beats expansion, and 2:4 if it applies."""
    weights = [m.weight.t() if is_conv1d(m) else m.weight for m in untied_linear_layers(plain).values()]
    kept, all_weights = sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)
    found = [folder.format if folder.format in FORMATS else "bitmask", "bitmask"]
    found += ["csr"] if kept <= (1 - CSR_FROM_SPARSITY) * all_weights else []
    found += ["2:4"] if all(map(is_two_four, weights)) else []
    return list(dict.fromkeys(found))


def _sparse(folder: ModelFolder, plain: PreTrainedModel | None, name: str, dtype: str) -> Variant:
    """Load the folder if it has the format; otherwise convert the dense model layer by layer."""
    if folder.format == name:
        return Variant(folder.load("sparse", dtype), folder.weight_file_bytes)
    model = copy.deepcopy(plain) if plain is not None else folder.load("dense", dtype)
    if not make_sparse(model, name):
        raise InputError(
            f"{folder.path}: no linear layer can be packed as {name} and become smaller. Omit {name} from --formats"
        )
    return Variant(model)


@torch.no_grad()
def make_sparse(model: nn.Module, format_name: str) -> int:
    """Pack each linear layer that ``format_name`` makes smaller, in place, as an export does. Return their number."""
    made = 0
    for name, module in untied_linear_layers(model).items():
        weight = module.weight.t().contiguous() if is_conv1d(module) else module.weight
        try:
            layer = SparseLinear.from_dense(weight, module.bias, format_name)
        except FormatError:
            continue  # a group of four with three kept weights
        if sum(part.nbytes for part in layer.parts().values()) < weight.nbytes:
            model.set_submodule(name, layer.train(module.training))
            made += 1
    return made


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, shared storage once. Prepacked weights count as the original ones."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    packed = sum(module.weight_bytes for module in model.modules() if isinstance(module, PrepackedLinear))
    return sum(storages.values()) + packed


def copy_until(by_name: dict[str, Variant], total_bytes: int) -> None:
    """Copy each model until its weights fill ``total_bytes``. Raises InputError if memory is short."""
    needed = sum(max(total_bytes, variant.loaded_bytes) for variant in by_name.values())
    available = available_bytes()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"--from-memory needs {needed / 1e9:.1f} GB of copies, and {available / 1e9:.1f} GB are free. Omit it"
        )
    for variant in by_name.values():
        count = max(2, -(-total_bytes // max(1, variant.loaded_bytes)))
        variant.models = [variant.model, *(_copied(variant.model) for _ in range(count - 1))]


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its weights; oneDNN's tensors support only clone()."""
    packed = [module.packed for module in model.modules() if isinstance(module, PrepackedLinear)]
    return copy.deepcopy(model, {id(tensor): tensor.clone() for tensor in packed})


def last_level_cache_bytes() -> int:
    """Return the bytes of the first processor's largest cache; 32 MiB if unknown."""
    found = [path.read_text(encoding="ascii").strip() for path in _CACHES.glob("index*/size")]
    sizes = [int(text[:-1]) * _UNITS.get(text[-1], 1) for text in found if text[:-1].isdigit()]
    return max(sizes, default=32 << 20)


def conditions() -> dict[str, object]:
    """Describe the machine, its caches and instructions, and the versions."""
    return {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "last_level_cache_bytes": last_level_cache_bytes(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sparse_kernel": native.LEVELS[native.best_level()] if native.library() is not None else "torch",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


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
    decoders = [GreedyDecoder(model) for model in variant.models]
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
    decoders = [GreedyDecoder(model) for model in variant.models]
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
    return {"outside_linear_layers": statistics.median(outside), "output_layer_share": statistics.median(output_layer)}


def _token_ids(folder: ModelFolder, batch: int, tokens: int) -> Tensor:
    """Draw (batch, tokens) from the whole vocabulary, with a fixed seed."""
    size = getattr(folder.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise InputError(f"{folder.path}: config.json has no vocab_size. Only text models can be measured")
    return torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))


class GreedyDecoder:
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
