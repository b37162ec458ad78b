"""Settings of the pretrained model: ``[model]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pst_ds.config.methods import METHODS
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import MayDiffer, Section, Share, settings


@settings
class ModelConfig(Section):
    """The pretrained model."""

    path: MayDiffer[str]
    """Folder of a Hugging Face model, or its name on the hub."""
    tokenizer: MayDiffer[str] = ""
    """Folder or name of the tokenizer, if it is not in the model's folder."""
    dropout: Share = 0.0
    """Dropout probability everywhere in the model, instead of the values in its config: small trained matrices underfit
    rather than overfit. Exports restore the values of the config."""
    attn_implementation: MayDiffer[str] = ""
    """Attention implementation of transformers: "eager", "sdpa", "flash_attention_2" or another; empty is the model's
    default. On CPUs, "eager" trains short examples in bf16 faster than "sdpa"."""
    gradient_checkpointing: MayDiffer[bool] = False
    """Recompute activations in the backward pass."""
    gradient_checkpointing_reentrant: MayDiffer[bool] = False
    """Use torch's older, reentrant checkpointing, which nests a backward pass in the backward pass. Same gradients."""
    activation_offload: MayDiffer[bool] = False
    """Keep the inputs of recomputed blocks in host memory until the backward pass. Device memory for activations then
    does not grow with the number of blocks, at the cost of two copies. Requires reentrant gradient checkpointing."""
    base_bits: Literal[16, 8, 4] = 16
    """Bits per frozen weight of the pruned layers. 8 and 4 quantise them to integers with shared scales when the model
    is loaded; ZeRO-3 shards the result. 16 keeps them in ``train.precision``."""
    base_group: Literal[32, 64, 128, "row"] | None = None
    """Consecutive inputs of an output that share a scale of the frozen weights; must divide the inputs of every layer.
    "row" is all of them. Unset is "row" for 8 bits and 64 for 4."""
    embedding_bits: Literal[16, 8, 4] = 16
    """``base_bits`` for the frozen token embedding and a language model's output layer, tied or not, with the same
    groups. Neither exists in 16 bits once the model is loaded."""

    def problems(self) -> Iterator[str]:
        if self.base_bits == self.embedding_bits == 16 and self.base_group is not None:
            yield (
                f"model.base_group = {self.base_group!r} does nothing with model.base_bits = 16. Set model.base_bits "
                "to 8 or 4"
            )
        if self.gradient_checkpointing_reentrant and not self.gradient_checkpointing:
            yield (
                "model.gradient_checkpointing_reentrant = true does nothing without checkpointing. Set "
                "model.gradient_checkpointing = true"
            )
        if self.activation_offload and not self.gradient_checkpointing_reentrant:
            yield (
                "model.activation_offload = true moves the inputs of blocks that are recomputed reentrantly. Set "
                "model.gradient_checkpointing = true and model.gradient_checkpointing_reentrant = true"
            )

    def conflicts(self, method: str, injected: PSTConfig) -> Iterator[str]:
        """Yield a message for each kind of quantised base weights that would train."""
        everything = METHODS[method].trains_everything
        trained = {
            "base_bits": everything or injected.train_weights or injected.full_scores,
            "embedding_bits": everything,
        }
        for key in (key for key, trains in trained.items() if trains and getattr(self, key) != 16):
            frozen = ", ".join(repr(name) for name, other in METHODS.items() if not other.trains_everything)
            yield (
                f"model.{key} = {getattr(self, key)} quantises frozen weights, and method = {method!r} trains every "
                f"weight. Set method to one of {frozen}, or model.{key} = 16"
            )
