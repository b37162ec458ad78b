"""Writes packed folders by the description of the format alone: numpy, no code of the package."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"
FILE_STEMS = {"bitmask": "pst_bitmask", "2:4": "pst_2of4", "csr": "pst_csr"}


def _bitmask(weight: Tensor, keep: np.ndarray) -> dict[str, Tensor]:
    starts = np.concatenate([[0], np.cumsum(keep.sum(1))[:-1]])
    return {
        "compressed": weight[torch.from_numpy(keep)],
        "bitmask": torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")),
        "row_offsets": torch.from_numpy(starts.astype(np.int64)),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _two_four(weight: Tensor, keep: np.ndarray) -> dict[str, Tensor]:
    assert (keep.reshape(-1, 4).sum(1) == 2).all()
    parts = _bitmask(weight, keep)
    del parts["row_offsets"]
    parts["compressed"] = parts["compressed"].reshape(weight.shape[0], -1)
    parts["shape"] = parts["shape"].reshape(2, 1)
    return parts


def _csr(weight: Tensor, keep: np.ndarray) -> dict[str, Tensor]:
    return {
        "crow_indices": torch.from_numpy(np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)),
        "col_indices": torch.from_numpy(np.nonzero(keep)[1].astype(np.uint16)),
        "values": weight[torch.from_numpy(keep)],
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _rounded(weight: Tensor, bits: int, group: int | None) -> tuple[np.ndarray, Tensor]:
    """(codes, scales): of every group of a row the largest magnitude has the largest code."""
    rows, columns = weight.shape
    grouped = weight.detach().float().numpy().reshape(rows, -1, group or columns)
    largest = 2 ** (bits - 1) - 1
    scales = torch.from_numpy(np.abs(grouped).max(2) / largest).bfloat16()
    scales[scales == 0] = 1.0
    codes = np.clip(np.rint(grouped / scales.float().numpy()[:, :, None]), -largest, largest)
    return codes.reshape(rows, columns).astype(np.int8), scales


def _coded(weight: Tensor, keep: np.ndarray | None, packing: str, bits: int, group: int | None) -> dict[str, Tensor]:
    """Codes of what is kept, row by row; two int4 ones in a byte, and every row begins with its own."""
    codes, scales = _rounded(weight, bits, group)
    rows = [codes[row] if keep is None else codes[row][keep[row]] for row in range(len(codes))]
    if bits == 4:
        rows = [np.append(row, [0] * (len(row) % 2)).astype(np.int16) & 15 for row in rows]
        rows = [(row[::2] | row[1::2] << 4).astype(np.uint8) for row in rows]
    held = np.concatenate(rows) if packing == "bitmask" else np.stack(rows)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    parts = {
        "codes": torch.from_numpy(held),
        "scales": scales,
        "shape": shape.reshape(2, 1) if packing == "2:4" else shape,
    }
    if keep is not None:
        mask = np.packbits(keep, axis=1, bitorder="little")
        mask = np.frombuffer(zlib.compress(mask.tobytes()), np.uint8) if (packing, bits) == ("bitmask", 4) else mask
        parts["bitmask"] = torch.tensor(mask)
    return parts


PACKERS = {"bitmask": _bitmask, "2:4": _two_four, "csr": _csr}


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Untied linear layers by name."""
    tied = {id(model.get_input_embeddings().weight)}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and id(module.weight) not in tied
    }


def _oriented(module: torch.nn.Module) -> Tensor:
    return module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data


@torch.no_grad()
def _prune(model: torch.nn.Module) -> None:
    """Zeros two of each group of four inputs, and gives biases and norms values that are not those of a new model."""
    rng = torch.Generator().manual_seed(3)
    for param in model.parameters():
        if param.dim() == 1:
            param.add_(0.1 * torch.randn(param.shape, generator=rng))
    for module in _linears(model).values():
        weight = _oriented(module)
        groups = torch.rand(weight.shape[0], weight.shape[1] // 4, 4, generator=rng)
        weight[(groups.argsort(-1) < 2).reshape(weight.shape)] = 0.0


def _models() -> dict[str, Callable[[], torch.nn.Module]]:
    def made(name: str, config: Any, **changes: Any) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            torch.manual_seed(7)
            for key, value in changes.items():
                setattr(config, key, value)
            return getattr(transformers, name)(config)

        return make

    def config(folder: str) -> Any:
        return transformers.AutoConfig.from_pretrained(DATA / folder)

    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=35, n_positions=48)
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=35, decoder_start_token_id=0
    )
    return {
        "llama": made("LlamaForCausalLM", config("tiny-llama")),
        "tied llama": made("LlamaForCausalLM", config("tiny-llama"), tie_word_embeddings=True),
        "classifier": made("LlamaForSequenceClassification", config("tiny-llama"), num_labels=3, pad_token_id=0),
        "bert": made("BertForSequenceClassification", config("tiny-bert"), num_labels=3),
        "masked bert": made("BertForMaskedLM", config("tiny-bert")),
        "t5": made("T5ForConditionalGeneration", t5),
        "gpt2": made("GPT2LMHeadModel", gpt2),
    }


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """``packed(model name, format, dtype, shards)``: (packed folder, dense folder) of a pruned model, to read only."""
    made: dict[Any, tuple[Path, Path]] = {}

    def make(name: str, form: str, dtype: torch.dtype = torch.float32, shards: int = 1) -> tuple[Path, Path]:
        key = (name, form, dtype, shards)
        if key not in made:
            folder = tmp_path_factory.mktemp("packed")
            model = _models()[name]()
            _prune(model)
            model.to(dtype).save_pretrained(folder / "dense")
            made[key] = _write(model, form, folder / "packed", shards), folder / "dense"
        return made[key]

    return make


def _write(model: torch.nn.Module, form: str, folder: Path, shards: int) -> Path:
    model.config.save_pretrained(folder)
    linears = _linears(model)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module in linears and leaf == "weight":
            weight = _oriented(linears[module])
            parts = PACKERS[form](weight, (weight != 0).numpy())
            tensors |= {f"{module}.{part}": part_value for part, part_value in parts.items()}
        elif name not in getattr(model, "all_tied_weights_keys", {}):
            tensors[name] = value
    weights_file = write_tensors(tensors, folder, FILE_STEMS[form], shards)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "pst_ds",
        "format": form,
        "format_version": 1,
        "weights_file": weights_file,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tensors(tensors: dict[str, Tensor], folder: Path, stem: str, shards: int) -> str:
    """Writes the weight files; returns the name that config.json gives."""
    names = sorted(tensors)
    if shards == 1:
        save_file(
            {name: tensors[name].contiguous() for name in names}, folder / f"{stem}.safetensors", {"format": "pt"}
        )
        return f"{stem}.safetensors"
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return f"{stem}.safetensors.index.json"


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """``quantized(model name, packing, bits, bits of embeddings or None, group, dtype)``: (folder, dense folder).

    Linear layers are rounded; bits of 16 leave them. The dense folder has the weights that codes and scales stand for.
    Bitmasks of int4 layers are compressed.
    """
    made: dict[Any, tuple[Path, Path]] = {}

    def make(
        name: str, packing: str, bits: int = 8, table_bits: int | None = 8, group: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Path, Path]:  # fmt: skip
        key = (name, packing, bits, table_bits, group, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized")
            model = _models()[name]().to(dtype)
            _prune(model)
            made[key] = _write_quantized(model, folder / "packed", packing, bits, table_bits, group), folder / "dense"
            model.save_pretrained(folder / "dense")
        return made[key]

    return make


@torch.no_grad()
def _write_quantized(
    model: torch.nn.Module, folder: Path, packing: str, bits: int, table_bits: int | None, group: int | None
) -> Path:
    """Write the folder, and round the weights of the model."""
    model.config.save_pretrained(folder)
    linears, tables = _linears(model), {}
    if table_bits:
        modules = model.named_modules()
        tables = {
            n: m for n, m in modules if type(m) is torch.nn.Embedding and not any(p.isdigit() for p in n.split("."))
        }
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if name in getattr(model, "all_tied_weights_keys", {}):
            continue
        if leaf != "weight" or module not in {**linears, **tables} or (module in linears and bits == 16):
            tensors[name] = value.clone()
            if leaf == "weight" and module in linears:
                weight = _oriented(linears[module])
                parts = PACKERS[packing](weight, (weight != 0).numpy())
                tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
                del tensors[name]
            continue
        weight = _oriented(linears[module]) if module in linears else value
        keep = (weight != 0).numpy() if module in linears and packing != "dense" else None
        how = (bits, group) if module in linears else (table_bits, None)
        parts = _coded(weight, keep, packing if module in linears else "dense", *how)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        codes, scales = _rounded(weight, *how)
        exact = torch.from_numpy(codes).double().reshape(*scales.shape, -1) * scales.double().unsqueeze(2)
        weight.copy_(exact.reshape(weight.shape))
    stem = {"dense": "pst_dense", **FILE_STEMS}[packing]
    version = 3 if (packing, bits) == ("bitmask", 4) else 2
    said = {"quant_method": "pst_ds", "format": packing, "format_version": version}
    if bits != 16:
        said |= {"values": f"int{bits}", "group": group or "row"}
    if table_bits:
        said |= {"embeddings": f"int{table_bits}", "embedding_group": "row"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = said | {"weights_file": write_tensors(tensors, folder, stem, 1)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def edited(packed: Any, tmp_path: Path) -> Callable[..., Path]:
    """``edited(model name, format, change)``: a copy of the packed folder after ``change(dict of all tensors)``."""

    def make(name: str, form: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        folder, _ = packed(name, form)
        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        tensors = load_file(copy / f"{FILE_STEMS[form]}.safetensors")
        change(tensors)
        write_tensors(tensors, copy, FILE_STEMS[form], 1)
        return copy

    return make


@pytest.fixture
def alone(monkeypatch):
    """No trace of another Trainer's accelerate, nor of a launcher."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    transformers.AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data():
    tokenizer = transformers.AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    rows = [json.loads(line) for line in Path("tests/data/train.jsonl").read_text().splitlines()]
    options = {"truncation": True, "max_length": 24, "padding": "max_length"}
    return [{**tokenizer(row["text"], **options), "labels": int(row["label"] == "good")} for row in rows]
