"""The last step of the examples: save the trained model as an ordinary folder, and count its sparsity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pst_ds import load_pretrained, merge_and_unload
from pst_ds.nn.inject import pst_layers


def save_merged(model_class: Any, base: str, small: Path, out: Path, **options: Any) -> float:
    """Load the adapter state ``small`` into the model ``base`` and save it merged in ``out``. Return its sparsity.

    ``options`` are those that ``base`` was loaded with. For one process only.
    """
    unset_hf_deepspeed_config()  # otherwise ZeRO-3 would partition the base, in only one process
    model = load_pretrained(model_class.from_pretrained(base, **options), small)
    names = list(pst_layers(model))
    merged: Any = merge_and_unload(model)
    merged.save_pretrained(out)
    saved = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = [saved[f"{name}.weight"] for name in names]
    sparsity = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    print(f"{out}: {sparsity:.6f} of the weights of {len(weights)} matrices are zero")
    return sparsity
