"""Faster decoding of a loaded transformers model on a CPU."""

from __future__ import annotations

from torch import nn

from pst_ds.inference.runtime.attention import quicken_attention
from pst_ds.inference.runtime.dense import quicken_output_layer


def quicken_decoding(model: nn.Module) -> None:
    """Let ``model`` compute the recurring parts of decoding in compiled code, in place.

    These are a dense output layer, tied or not, and the attention that transformers calls "sdpa", both on a CPU.
    Prompts and everything with a gradient stay unchanged. Logits are equal up to the rounding of sums. Call it after
    loading a model and before attaching anything to its layers: the output layer becomes another module.
    """
    quicken_output_layer(model)
    quicken_attention(model)
