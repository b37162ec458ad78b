"""Quantise a dense encoder with torchao on a CPU, weights only in int8 or int4, as a baseline.

All linear layers and embeddings are quantised, the rest is bf16: int8 with per-row scales, int4 with a scale per 64
inputs. ``packings`` reports which of its layouts with two int4 values per byte run here. If none does, its generic
tensor has one value per byte, and ``file_bytes_packed`` is the file's size with two.

    pip install 'pst-ds[peers]'
    python -m tools.torchao_files runs/demo/dense/export --test runs/demo/data/test.jsonl --out runs/torchao --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.machine import hardware
from tools.onnx_int8 import share_of_right_answers

BITS = (8, 4)
GROUP = 64
FILE = "model.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="dense model folder")
    parser.add_argument("--test", type=Path, required=True, help="examples and labels, .jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--max-length", type=int, default=64, help="maximum tokens of an example")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    rows = {
        f"int{bits}": measure(args.model, args.out / f"int{bits}", args.test, args.max_length, bits) for bits in BITS
    }
    for name, row in rows.items():
        packed = f" ({row['file_bytes_packed'] / 1e6:.1f} with two values per byte)" if name == "int4" else ""
        print(f"torchao {name}: {row['file_bytes'] / 1e6:.1f} MB{packed}, accuracy {row['accuracy']:.4f}")
    tried = packings()
    for name, problem in tried.items():
        print(f"packing {name!r} of int4 on this CPU: {problem or 'runs'}")
    if args.json:
        print(json.dumps({"files": rows, "packings": tried, "torchao": version(), "hardware": hardware()}))


def version() -> str:
    import torchao

    return str(torchao.__version__)


def measure(folder: Path, out: Path, texts: Path, max_length: int, bits: int) -> dict[str, Any]:
    """Quantise the dense model in ``folder``, write it to ``out`` and test it.

    ``file_bytes_packed`` is the size without unused bits. Weights are dequantised once for the test, since products
    would dequantise them every time.
    """
    model, num_codes = rounded(folder, bits)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), out / FILE)
    nbytes = (out / FILE).stat().st_size
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            codes: Any = module.weight
            module.weight = nn.Parameter(codes.dequantize(), requires_grad=False)

    def logits_of(feed: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(values) for name, values in feed.items()}).logits.float().numpy()

    right = share_of_right_answers(logits_of, folder, texts, max_length)
    return {"file_bytes": nbytes, "file_bytes_packed": nbytes - num_codes * (8 - bits) // 8, "accuracy": right}


def rounded(folder: Path, bits: int) -> tuple[nn.Module, int]:
    """Return the classifier in ``folder`` quantised to ``bits``, and its number of quantised values."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    weights: list[Tensor] = [model.get_submodule(name).weight for name in named]
    num_codes = sum(weight.numel() for weight in weights)
    shares = PerGroup(GROUP) if bits == 4 else PerAxis(0)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=shares)
    quantize_(model, config, filter_fn=lambda _, name: name in named)
    return model, num_codes


def packings() -> dict[str, str]:
    """Return the error of each layout that packs int4 values, for a bf16 layer on a CPU; "" if it works."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    found = {}
    for packing in Int4PackingFormat:
        layer = nn.Sequential(nn.Linear(2 * GROUP, 2 * GROUP)).bfloat16()
        try:
            quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packing))
            layer(torch.ones(1, 2 * GROUP, dtype=torch.bfloat16))
            found[packing.value] = ""
        except Exception as error:  # each has its own errors
            found[packing.value] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


if __name__ == "__main__":
    main()
