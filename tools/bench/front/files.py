"""Files of the decoders on the front: exports of pst-ds and quantisations of llama.cpp, made if missing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pst_ds.core.packings import DENSE
from pst_ds.file_names import RUN_FILE
from pst_ds.hf.model_folder import open_model_folder
from tools.bench.peers.decoder_files import evenly_spaced_chunks, quantised_gguf, weight_bytes
from tools.bench.timing import progress
from tools.verbs import verb

LLAMA_CPP = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_XXS")
"""llama.cpp's file types, from the largest to the smallest. Those below 8 bits get an importance matrix."""
OURS = {
    "int8": ("--values", "int8"),
    "int4, 64": ("--values", "int4", "--group", "64"),
    "int4, 32": ("--values", "int4", "--group", "32"),
}
"""Options of ``pst-ds export`` by name; the number is that of inputs per scale. Embeddings are int8."""
CALIBRATION = Path("runs/quality/data/brown-train.txt")
"""Text of the importance matrix, which sparse models are trained on too."""
CALIBRATION_CHUNKS, CHUNK_TOKENS = 16, 512


@dataclass(frozen=True)
class Model:
    """A decoder, dense or sparse, before quantisation."""

    name: str
    folder: Path
    """Model folder, the folder of a run that prunes, or a finished file: GGUF, or a packed or quantised folder."""
    references: tuple[str, ...]
    """Names of dense models from which the divergence is measured; the first is the model's own."""

    @cached_property
    def sha256(self) -> str:
        return hash_of(self.folder)

    @property
    def engine_of_file(self) -> str:
        """The engine of a finished file; "" if files are to be made of the model."""
        if self.folder.is_file():
            return "llama.cpp"
        return "pst-ds" if not self.is_run and open_model_folder(self.folder).format != DENSE else ""

    @property
    def is_run(self) -> bool:
        return (self.folder / RUN_FILE).is_file()

    @property
    def is_dense(self) -> bool:
        return not self.engine_of_file and not self.is_run and open_model_folder(self.folder).sparsity == 0.0


@dataclass(frozen=True)
class File:
    """A file of a model, or a folder of pst-ds."""

    model: Model
    engine: str
    """"pst-ds" or "llama.cpp"."""
    kind: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.engine} {self.kind}"

    @cached_property
    def sha256(self) -> str:
        return hash_of(self.path)

    def facts(self) -> dict[str, Any]:
        """Return what the rows of the file say of it."""
        about = {"model": self.model.name, "engine": self.engine, "file": self.kind, "sha256": self.sha256}
        types = {"tensors": tensor_types(self.path)} if self.engine == "llama.cpp" else {}
        return {**about, "file_bytes": weight_bytes(self.path), **types}


def hash_of(place: Path) -> str:
    """Return a hash of a file, or of the weight files of a folder."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def files_of(model: Model, top: Path, only: list[str]) -> Iterator[File]:
    """Yield the files of a model under ``top``; those of llama.cpp if it is dense; a finished file unchanged.

    Only those whose name has a word of ``only``, if it has any.
    """
    if engine := model.engine_of_file:
        yield File(model, engine, kind_of(model.folder), model.folder)
        return
    planned = [File(model, "pst-ds", kind, top / model.name / kind.replace(", ", "-")) for kind in OURS]
    if model.is_dense:
        planned += [File(model, "llama.cpp", kind, top / model.name / f"{kind}.gguf") for kind in LLAMA_CPP]
    for file in planned:
        if not only or any(word in file.name for word in only):
            make(file)
            yield file


def kind_of(place: Path) -> str:
    """Return the type of most weights of a finished file, such as "Q4_0" or "int4, 32"."""
    if place.is_file():
        return next(iter(tensor_types(place)))
    settings = open_model_folder(place).config.quantization_config
    values, group = str(settings.get("values") or "floats"), settings.get("group") or "row"
    return values if group == "row" else f"{values}, {group}"


def make(file: File) -> None:
    """Write the file unless it exists."""
    if file.path.exists():
        return
    progress(f"writing {file.path}")
    file.path.parent.mkdir(parents=True, exist_ok=True)
    source = str(file.model.folder)
    if file.engine == "pst-ds":
        layout = "dense" if file.model.is_dense else "bitmask"
        options = ["--format", layout, *OURS[file.kind], "--embeddings", "int8", "--quiet", "--out", str(file.path)]
        verb("export", source, *options)
        return
    whole = file.path.with_name("BF16.gguf")
    if not whole.is_file():
        verb("export", source, "--format", "gguf", "--dtype", "bf16", "--quiet", "--out", str(whole))
    if file.path != whole:
        importance = {} if file.kind == "Q8_0" else importance_of(file.model.folder, file.path.with_name("imatrix.npz"))
        quantised_gguf(whole, file.path, file.kind, importance)


@torch.no_grad()
def importance_of(folder: Path, kept: Path) -> dict[str, NDArray[np.float32]]:
    """Return the importance matrix: the mean square of each input of every linear layer in the blocks, by the name of
    its tensor in a GGUF file. As with llama.cpp's tool, embeddings and output layer have none. ``kept``: its file."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kept.is_file():
        return dict(np.load(kept))
    progress(f"computing {kept}")
    model, sums = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[str, torch.Tensor]()
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)

    def see(name: str, inputs: torch.Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in path:
            name = f"{names.get_name(path)}.weight"
            module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
    text, tokenizer = CALIBRATION.read_text(encoding="utf-8"), AutoTokenizer.from_pretrained(folder)
    for chunk in evenly_spaced_chunks(text, tokenizer, CALIBRATION_CHUNKS, CHUNK_TOKENS):
        model.model(input_ids=torch.tensor([chunk]))  # without the output layer
    tokens = CALIBRATION_CHUNKS * CHUNK_TOKENS
    found = {name: (squares / tokens).float().numpy() for name, squares in sums.items()}
    np.savez(kept, **found)  # type: ignore[arg-type]
    return found


def tensor_types(file: Path) -> dict[str, str]:
    """Return how many matrices of a GGUF file have each type, and the types of embedding and output layer."""
    from gguf import GGUFReader

    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    ends = {name: types.pop(name) for name in ("token_embd.weight", "output.weight") if name in types}
    return {kind: str(count) for kind, count in Counter(types.values()).most_common()} | ends
