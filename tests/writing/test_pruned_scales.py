"""Damaged folders that were pruned to a grid: refused by name, or exactly what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pst_ds.core.quantization import Grid, dequantize, quantize
from pst_ds.errors import InputError
from pst_ds.formats.safetensors_file import TensorFile
from pst_ds.writing.pruned_scales import read_pruned_scales

MUTANTS = 2000
SHAPES = {"layers.0.up": (6, 64), "layers.0.down": (5, 96), "layers.1.up": (3, 32)}
STRANGE = [None, True, -1, 0, 1, 2**63, 1.5, "", "int8", "row", "a" * 3000, [], {}, [[]], [{}], {"name": 1}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Weights of int4 in groups of 32, their scales and their record."""
    weights, scales = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        codes, found = quantize(torch.where(weight.abs() > 0.5, weight, 0.0), None, Grid(4, 32))
        weights[f"{name}.weight"], scales[f"{name}.scales"] = dequantize(codes, found, torch.bfloat16), found
    save_file(weights, tmp_path / "model.safetensors")
    save_file(scales, tmp_path / "scales.safetensors")
    layers = [
        {
            "name": name,
            "shape": shape,
            "pattern": "matrix",
            "sparsity_requested": 0.4,
            "zeros": int((weights[f"{name}.weight"] == 0).sum()),
        }
        for name, shape in SHAPES.items()
    ]
    record = {"format": 1, "values": "int4", "group": 32, "layers": layers}
    (tmp_path / "pruning.json").write_text(json.dumps(record))
    return tmp_path


def _read(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, Grid]] | None:
    """(weight, scales, grid) of each layer; None for a folder that promises nothing. Raises InputError."""
    promised = read_pruned_scales(folder)
    if promised is None:
        return None
    file, found = TensorFile(folder / "model.safetensors"), {}
    for layer in promised.layers:
        name = f"{layer}.weight"
        if name not in file.slots or len(file.slots[name].shape) != 2 or not file.slots[name].dtype.is_floating_point:
            raise InputError(f"{folder} has no weight {name}")
        weight = file.read(name)
        found[layer] = weight, promised.scales_of(layer, weight), promised.grid
    return found


def _require_exact(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> None:
    """Every weight is a whole number of its scale, in numpy's float64, but for its rounding to bf16."""
    size = weight.shape[1] // scales.shape[1]
    steps = np.repeat(scales.double().numpy(), size, 1)
    codes = np.rint(weight.double().numpy() / steps)
    assert codes.size == 0 or grid.least <= codes.min() <= codes.max() <= grid.largest
    assert torch.equal(torch.from_numpy(codes * steps).to(weight.dtype), weight)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    some = rng.randrange(1, 40)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(some) + data[at + some :]
        case 2:
            return data[:at] + data[at + some :]
        case 3:
            return data[:at] + bytes(some) + data[at + some :]
        case _:
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
            return bytes(changed)


def _strange_record(data: bytes, rng: random.Random) -> bytes:
    table = json.loads(data)
    if rng.random() < 0.3:
        table["layers"][rng.randrange(3)]["name"] = rng.choice(["layers.9", "", 3, None, "../x", "layers.0.up"])
    elif rng.random() < 0.2:
        del table[rng.choice(sorted(table))]
    elif rng.random() < 0.2:
        layer = rng.choice(table["layers"])
        layer[rng.choice(sorted(layer))] = rng.choice(STRANGE)
    else:
        table[rng.choice(sorted(table))] = rng.choice(STRANGE)
    return json.dumps(table).encode()


def test_damage_is_refused_or_what_is_read_is_exact(folder):
    rng, refused, exact = random.Random(1), 0, 0
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for turn in range(MUTANTS):
        path = rng.choice(list(originals))
        change = _strange_record if path.suffix == ".json" and turn % 2 else _mutated
        path.write_bytes(change(originals[path], rng))
        try:
            found = _read(folder)
        except InputError as error:
            refused += str(folder) in str(error)
        else:
            exact += 1
            for weight, scales, grid in (found or {}).values():
                _require_exact(weight, scales, grid)
        path.write_bytes(originals[path])
    assert refused > 0.6 * MUTANTS
    assert exact > 0
    assert refused + exact == MUTANTS
    assert _read(folder).keys() == SHAPES.keys()
