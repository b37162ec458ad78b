"""A mask update on one process: nanoseconds a weight, and the ratio to reading the weights once."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from timing import hardware, medians

from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.train import mask_update
from pst_ds.train.mask_update import update_masks

SHAPES = ((384, 384), (1536, 384), (1024, 1024), (4096, 1024))
LAYERS = 4


def main() -> None:
    torch.set_num_threads(1)
    print(hardware())
    print(f"{LAYERS} layers of each shape, fp32 weights, ranks 8 and 8, sparsity 0.9")
    print("   O x I        ns/weight   ns/weight, keys not kept   ratio to one read of the weights")
    for outputs, inputs in SHAPES:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(LAYERS))
        inject_pst(model, PSTConfig(modules_to_save=()))
        for layer in pst_layers(model).values():
            for _, param in layer.factor_parameters():
                nn.init.normal_(param, std=0.1)
        weights = [layer.weight.detach() for layer in pst_layers(model).values()]
        found = medians(
            {
                "update": partial(_update, model, 1 << 40),
                "recompute": partial(_update, model, 0),
                "read": partial(_read, weights),
            }
        )
        count = LAYERS * outputs * inputs
        print(
            f"{outputs:>6} x {inputs:<6} {found['update'] / count * 1e9:>9.1f} "
            f"{found['recompute'] / count * 1e9:>15.1f} {found['update'] / found['read']:>30.0f}"
        )


def _read(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.sum()


def _update(model: nn.Module, cache_bytes: int) -> None:
    mask_update.KEY_CACHE_BYTES = cache_bytes
    update_masks(model, 0.9)


if __name__ == "__main__":
    main()
