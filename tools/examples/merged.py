"""How the examples end: the trained model as an ordinary folder, and its zeros, counted in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pst_ds import load_pretrained, merge_and_unload
from pst_ds.nn.inject import pst_layers


def save_merged(model_class: Any, base: str, small: Path, out: Path, **options: Any) -> float:
    """Put the adapter state ``small`` onto the model ``base`` and save it merged in ``out``; the share of zeros.

    ``options`` are those that ``base`` was loaded with. For one process alone.
    """
    unset_hf_deepspeed_config()  # or under ZeRO-3 the base would be partitioned, and this process is alone
    model = load_pretrained(model_class.from_pretrained(base, **options), small)
    names = list(pst_layers(model))
    merged: Any = merge_and_unload(model)
    merged.save_pretrained(out)
    saved = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = [saved[f"{name}.weight"] for name in names]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    print(f"{out}: {zeros:.6f} of the weights of {len(weights)} matrices are zero")
    return zeros
