"""Decoding speed of the 135M-parameter Llama of tools/fetch_smollm2.py on this CPU, sparse and dense.

Linear layers are pruned by magnitude, packed by ``pst-ds export --format bitmask`` and loaded by transformers.
``dense`` is bf16 as transformers runs it; ``prepacked`` has every linear layer in oneDNN's layout. The output layer is
the embedding and dense in all variants. Variants take turns. Prompt and new tokens are the same for all; times are
medians.

    OMP_NUM_THREADS=2 python -m tools.bench.decode --json
    OMP_NUM_THREADS=2 python -m tools.bench.decode --sparsity 0.5 --threads 1
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pst_ds.hf.model_folder import ModelFolder, open_model_folder
from pst_ds.inference import bench as benched
from pst_ds.inference.bench import measure
from pst_ds.nn.model_structure import untied_linear_layers
from tools.bench.timing import benchmark_parser, conditions, print_result, progress
from tools.fetch_smollm2 import FOLDER, pruned_folder
from tools.verbs import verb


def main() -> None:
    arguments = _parser().parse_args()
    torch.manual_seed(0)
    packed = {sparsity: packed_folder(arguments.folder, sparsity) for sparsity in arguments.sparsity}
    found = models(packed)
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        progress(f"decoding with {threads} threads")
        torch.set_num_threads(threads)
        rows += speed_rows(measure(found, next(iter(packed.values())), 1, arguments), threads)
    stated = conditions(
        **{k: v for k, v in benched.conditions().items() if k != "versions"},
        dtype="bfloat16",
        batch=1,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        clock="wall, medians, variants in turn",
    )
    stated["threads_per_rank"] = arguments.threads
    del found
    report = {"benchmark": "decode", "conditions": stated, "rows": rows}
    print_result(report, as_json=arguments.json)


def packed_folder(top: Path, sparsity: float) -> ModelFolder:
    """Open ``top``/bitmask-50 or the like, which ``pst-ds export`` writes unless it exists."""
    out = top / f"bitmask-{100 * sparsity:g}"
    if not (out / "config.json").is_file():
        progress(f"packing {out}")
        with contextlib.redirect_stdout(sys.stderr):
            verb("export", str(pruned_folder(top, sparsity)), "--format", "bitmask", "--out", str(out))
    return open_model_folder(out)


def models(packed: dict[float, ModelFolder]) -> dict[str, benched.Variant]:
    found: dict[str, benched.Variant] = {}
    for sparsity, folder in packed.items():
        made = benched.variants(folder, "bf16")
        if "prepacked" not in found and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found["prepacked"] = benched.Variant(prepacked(folder.load("dense", "bf16")), is_causal=True)
        found |= {name: model for name, model in made.items() if name != "bitmask" and name not in found}
        found[f"bitmask-{100 * sparsity:g}"] = made["bitmask"]
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("bitmask")))


class PrepackedLinear(nn.Module):
    """A linear layer in the layout that oneDNN prefers for products of one vector."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), 1)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepacked(model: PreTrainedModel) -> PreTrainedModel:
    """Convert the linear layers of a bf16 model to oneDNN's layout."""
    for name, layer in untied_linear_layers(model).items():
        model.set_submodule(name, PrepackedLinear(layer))
    return model


def speed_rows(measured: dict[str, dict[str, float]], threads: int) -> list[dict[str, Any]]:
    """Return a row per variant: its rates, also relative to both dense variants."""
    rows = []
    for name, rates in measured.items():
        row: dict[str, Any] = {"model": name, "threads": threads, **rates}
        for base in measured.keys() & {"dense", "prepacked"}:
            for stage in ("prefill", "decode"):
                key = f"{stage}_tokens_per_second"
                row[f"{stage}_over_{base}"] = rates[key] / measured[base][key]
        rows.append(row)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the models, which are made if missing")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    main()
