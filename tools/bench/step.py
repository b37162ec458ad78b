"""Forward and backward of one linear layer: PST against full fine-tuning's, as a ratio of medians."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from timing import hardware, medians

from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.train.mask_update import update_masks

SHAPES = ((384, 384), (1536, 384), (384, 1536), (1024, 1024))
TOKENS = (256, 1024, 4096)


def main() -> None:
    torch.set_num_threads(1)
    print(hardware())
    print("forward + backward of one layer, ranks 8 and 8, sparsity 0.9: seconds of PST / seconds of nn.Linear")
    print("   O x I         dtype   " + "".join(f"{tokens:>7} tokens" for tokens in TOKENS))
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES:
            ratios = [_ratio(outputs, inputs, tokens, dtype) for tokens in TOKENS]
            name = str(dtype).removeprefix("torch.")
            print(f"{outputs:>6} x {inputs:<6} {name:>9}" + "".join(f"{ratio:>14.2f}" for ratio in ratios))


def _ratio(outputs: int, inputs: int, tokens: int, dtype: torch.dtype) -> float:
    dense = nn.Linear(inputs, outputs).to(dtype)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(inputs, outputs).to(dtype)])
    inject_pst(model, PSTConfig(modules_to_save=()))
    update_masks(model, 0.9)
    (layer,) = pst_layers(model).values()
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, dtype=dtype)
    found = medians(
        {
            "dense": lambda: dense(x).backward(grad),
            "pst": lambda: layer(x).backward(grad),
        }
    )
    return found["pst"] / found["dense"]


if __name__ == "__main__":
    main()
