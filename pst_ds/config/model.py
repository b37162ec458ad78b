"""Settings of the model and of its quantisation in training: ``[model]``, ``[quantization]``."""

import math
from collections.abc import Iterator
from typing import Literal

from pst_ds.config.methods import METHODS
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import ConfigError, MayDiffer, NotNegative, Positive, Section, Share, settings
from pst_ds.core.schedule import CubicSchedule, RoundingSchedule, Schedule, ScheduleConfig

_TOLERANCE = 1e-9
"""Rounding error of 1 - cooldown_fraction."""
_SEARCHES = 10
"""Searches for scales in a run, unless ``quantization.interval`` is set."""


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
    recomputed_blocks: MayDiffer[Positive | None] = None
    """Blocks that do so, from the first; unset is all of them. The others are faster and keep their activations:
    ``pst-ds plan --search`` finds how many fit."""
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

    base_placement: MayDiffer[Literal["auto", "sharded", "node", "replicated"]] = "auto"
    """Where frozen weights and masks are held under ZeRO-3. "sharded" splits them over all ranks. "node" keeps a second
    copy in each node, split over its ranks, so that only factors travel between nodes. "replicated" keeps them whole on
    every rank, so that no step gathers them. "auto" is "node" on several nodes if it takes at most half of a rank's
    memory, else "sharded"; ``zero_hpz_partition_size`` in the DeepSpeed JSON takes precedence. Results are the same."""

    def problems(self) -> Iterator[str]:
        if self.base_bits == self.embedding_bits == 16:
            yield from self.unused("model", "with model.base_bits = 16", "set model.base_bits to 8 or 4", "base_group")
        if self.gradient_checkpointing_reentrant and not self.gradient_checkpointing:
            yield (
                "model.gradient_checkpointing_reentrant = true does nothing without checkpointing. Set "
                "model.gradient_checkpointing = true"
            )
        if self.recomputed_blocks is not None and not self.gradient_checkpointing:
            yield (
                f"model.recomputed_blocks = {self.recomputed_blocks} does nothing without checkpointing. Set "
                "model.gradient_checkpointing = true"
            )
        # The loop offloads all that autograd saves. Under reentrant checkpointing, these are the inputs of blocks only.
        if self.recomputed_blocks is not None and self.activation_offload:
            yield (
                f"model.recomputed_blocks = {self.recomputed_blocks} lets the other blocks keep their activations, all "
                "of which model.activation_offload = true would move. Leave one of them out"
            )
        if self.activation_offload and not self.gradient_checkpointing_reentrant:
            yield (
                "model.activation_offload = true moves the inputs of blocks that are recomputed reentrantly. Set "
                "model.gradient_checkpointing = true and model.gradient_checkpointing_reentrant = true"
            )

    def conflicts(self, method: str, injected: PSTConfig) -> Iterator[str]:
        """Yield a message for each kind of quantised base weights that would train."""
        # Quantised values are integers, which have no gradient.
        everything = METHODS[method].trains_everything
        trained = {"base_bits": everything or injected.train_weights, "embedding_bits": everything}
        for key, trains in trained.items():
            if not trains or getattr(self, key) == 16:
                continue
            frozen = ", ".join(repr(name) for name, other in METHODS.items() if not other.trains_everything)
            yield (
                f"model.{key} = {getattr(self, key)} quantises frozen weights, and method = {method!r} trains every "
                f"weight. Set method to one of {frozen}, or model.{key} = 16"
            )


@settings
class QuantizationConfig(Section):
    """Training with quantised weights, so that the exported file computes what was trained (docs/how-to/methods.md)."""

    values: Literal["", "int8", "int4"] = ""
    """Type to which the weights M . W of every layer in ``pst.target_modules`` are quantised in the forward pass.
    Gradients use the straight-through estimator. Empty switches quantisation off."""
    embeddings: Literal["", "int8", "int4"] = ""
    """The same for embedding tables and a language model's output layer, tied or not. Where they train,
    ``train.precision`` must be "bf16"."""
    group: Literal[32, 64, 128, "row"] | None = None
    """Consecutive inputs of an output that share a scale; must divide the inputs of every layer. "row" is all of them.
    Unset is "row" for int8 and 64 for int4. With 32, int4 is Q4_0 and int8 Q8_0 of llama.cpp."""
    start_fraction: Share | None = None
    """Share of all steps before quantisation starts; masks must be final by then. Unset starts as soon as masks are
    final: after the ramp, or at the first step without a ramp."""
    interval: NotNegative = 0
    """Optimizer steps between searches for the scales with the least squared error; 0 is about ten searches per run.
    Scales do not change in between."""

    @property
    def is_on(self) -> bool:
        return bool(self.values or self.embeddings)

    @property
    def _setting(self) -> str:
        if self.values:
            return f'quantization.values = "{self.values}"'
        return f'quantization.embeddings = "{self.embeddings}"'

    def problems(self) -> Iterator[str]:
        if not self.is_on:
            reason = "without quantization.values or embeddings"
            instead = 'set one of them to "int8" or "int4"'
            yield from self.unused("quantization", reason, instead, "group", "start_fraction", "interval")

    def conflicts(self, method: str, schedule: ScheduleConfig) -> Iterator[str]:
        """Yield a message where masks still change when quantisation starts."""
        # Fixed masks are final from the first step on.
        if not self.is_on or METHODS[method].masks != "ramp":
            return
        cooldown = schedule.cooldown_fraction
        if cooldown == 0.0:
            yield (
                f"{self._setting} starts once masks are final, and schedule.cooldown_fraction = 0 leaves no step for "
                "it. Set schedule.cooldown_fraction above 0"
            )
        elif self.start_fraction is not None and self.start_fraction < 1.0 - cooldown - _TOLERANCE:
            yield (
                f"quantization.start_fraction = {self.start_fraction}, but masks change until {1.0 - cooldown:.4g} of "
                f"the steps (schedule.cooldown_fraction = {cooldown}), and scales are searched for final masks. "
                f"Fix: quantization.start_fraction = {1.0 - cooldown:.4g}, or remove it"
            )

    def make_schedule(self, masks: Schedule | None, num_steps: int) -> RoundingSchedule | None:
        """Return when a run of ``num_steps`` with the schedule ``masks`` quantises its weights; None for never.

        Raises ConfigError for a run that ends before quantisation starts.
        """
        if not self.is_on:
            return None
        final = 0
        if isinstance(masks, CubicSchedule):
            final = masks.ramp_end
        start = max(final, math.floor((self.start_fraction or 0.0) * num_steps))
        if start >= num_steps:
            raise ConfigError(
                f"{self._setting} starts once masks are final, which is after step {final} of {num_steps}. Raise "
                "train.num_steps or schedule.cooldown_fraction"
            )
        interval = self.interval or max(1, round((num_steps - start) / _SEARCHES))
        return RoundingSchedule(start=start, interval=interval, num_steps=num_steps)
