"""What makes a loaded model of transformers decode quicker on a CPU."""

from __future__ import annotations

from torch import nn

from pst_ds.inference.runtime.attention import quicken_attention
from pst_ds.inference.runtime.dense import quicken_output_layer


def quicken_decoding(model: nn.Module) -> None:
    """Let ``model`` compute what decoding does for each new token by compiled code, in place.

    That is a dense output layer, tied or not, and the attention that transformers calls "sdpa", both on a CPU; the rest
    stays, and so do prompts and whatever has a gradient. Logits are the same but for the rounding of sums. Call it once
    a model is loaded, and before anything is put on its layers: the output layer becomes another module.
    """
    quicken_output_layer(model)
    quicken_attention(model)
