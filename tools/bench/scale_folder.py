"""A folder of random weights for ``scale.py --from-files``, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.bench.scale_rank import model_of

FILE_BYTES = 1 << 30
DEVIATION = 0.02


def write_folder(settings: dict[str, Any], folder: Path) -> None:
    """Write a model of these ``settings`` in bf16: N(0, 0.02**2) for matrices, ones for the rest."""
    with torch.device("meta"):
        model = model_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    places: dict[str, str] = {}
    for number, tensors in enumerate(_files(model.state_dict())):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(shapes: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What each file has; values are drawn in fp32 and rounded."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape.shape) * DEVIATION if shape.dim() > 1 else torch.ones(shape.shape)
        tensors[name] = drawn.bfloat16()
        if sum(t.nbytes for t in tensors.values()) > FILE_BYTES:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors
