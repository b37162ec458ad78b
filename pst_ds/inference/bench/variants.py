"""The models that ``pst-ds bench`` compares, and the machine it runs on."""

from __future__ import annotations

import copy
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds.core.kernels.host import available_bytes, cpu_name
from pst_ds.formats import FORMATS, FormatError
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.hf.model_folder import ModelFolder, ModelFolderError
from pst_ds.inference.hf.semi_structured import is_two_four
from pst_ds.inference.runtime import SparseLinear, native, sparse_layers
from pst_ds.inference.runtime.backends import CSR_FROM_SPARSITY
from pst_ds.inference.runtime.dense import PrepackedLinear, can_prepack, prepack
from pst_ds.inference.runtime.quicken import quicken_decoding
from pst_ds.nn.model_structure import is_conv1d, untied_linear_layers

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass
class Variant:
    """One way to run the model."""

    model: PreTrainedModel
    file_bytes: int | None = None
    """Bytes of its weight files; None if it exists in memory only."""
    models: list[PreTrainedModel] = field(default_factory=list)
    """The model and its copies."""
    loaded_bytes: int = 0
    """Bytes of resident weights."""

    def __post_init__(self) -> None:
        self.models = [self.model]
        self.loaded_bytes = resident_bytes(self.model)

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
        facts = {"file_bytes": self._file_bytes, "sparse_layers": 0, "copies": 1}
        return {"resident_bytes": self.decoder.weight_bytes, **facts}

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
    fast output layer and fast attention. Raises ModelFolderError.
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
    """Return the folder's format (bitmask for a dense one), csr if it beats expansion, and 2:4 if the weights have
    it.
    """
    layers = untied_linear_layers(plain).values()
    own = folder.format if folder.format in FORMATS else "bitmask"
    kept = sum(int(layer.weight.count_nonzero()) for layer in layers)
    all_weights = sum(layer.weight.numel() for layer in layers)
    apply = {
        "bitmask": True,
        "csr": kept <= (1 - CSR_FROM_SPARSITY) * all_weights,
        "2:4": all(is_two_four(layer.weight.t() if is_conv1d(layer) else layer.weight) for layer in layers),
    }
    return [own, *(name for name, does in apply.items() if does and name != own)]


def _sparse(folder: ModelFolder, plain: PreTrainedModel | None, name: str, dtype: str) -> Variant:
    """Load the folder if it has the format; otherwise convert the dense model layer by layer."""
    if folder.format == name:
        return Variant(folder.load("sparse", dtype), folder.weight_file_bytes)
    model = copy.deepcopy(plain) if plain is not None else folder.load("dense", dtype)
    if not make_sparse(model, name):
        raise ModelFolderError(
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
            continue  # a group of four with three non-zeros
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
    """Copy each model until its weights fill ``total_bytes``. Raises ModelFolderError if memory is short."""
    needed = sum(max(0, total_bytes - c.loaded_bytes) + c.loaded_bytes for c in by_name.values())
    available = available_bytes()
    if available is not None and needed > 0.8 * available:
        raise ModelFolderError(
            f"--from-memory needs {needed / 1e9:.1f} GB of copies, and {available / 1e9:.1f} GB are free. Omit it"
        )
    for variant in by_name.values():
        count = max(2, -(-total_bytes // max(1, variant.loaded_bytes)))
        variant.models = [variant.model, *(_copied(variant.model) for _ in range(count - 1))]


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its weights; oneDNN's tensors support only clone()."""
    memo: dict[int, object] = {}
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if packed is not None:
            memo[id(packed)] = packed.clone()
    return copy.deepcopy(model, memo)


def last_level_cache_bytes() -> int:
    """Return the bytes of the first processor's largest cache; 32 MiB if unknown."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit():
            sizes.append(int(text[:-1]) * _UNITS.get(text[-1], 1))
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
