"""Settings of one-shot pruning: ``[start]`` of a run file, and ``pst-ds prune``."""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from annotated_types import Gt, Lt

from pst_ds.config.methods import METHODS, OneShotMethod
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import NotNegative, Positive, Section, Share, settings
from pst_ds.core.packings import VALUE_BITS
from pst_ds.core.patterns import parse_pattern

REAP: Final = "reap"
"""Drops whole experts instead of weights."""
CHANNELS: Final = "channels"
"""Removes channels of feed-forward layers, so that the model is smaller and dense."""
ENGINES = ("openvino", "llama.cpp", "vllm", "gpu")
"""Where the speed of a cut is predicted: pst_ds/planning/speedup.py."""
Budgets = Literal["equal", "saliency"]
_BITS = " or ".join(str(bits) for bits in sorted(VALUE_BITS.values()))
_QUANTISE_LATER = 'and then quantise the folder with method = "sparsegpt" and keep_zeros = true'


@settings
class OneShotConfig(Section):
    """One-shot pruning of the pretrained model on training data, before the first step (docs/how-to/methods.md)."""

    method: Literal["none", "magnitude", "wanda", "sparsegpt", "alps", "channels"] = "none"
    """One-shot method that chooses the initial masks, at ``schedule.initial_sparsity``, or at the final sparsity for
    methods with fixed masks; "channels" makes the model smaller instead (docs/how-to/shapes.md). The run folder keeps
    the pruned model, which becomes the run's base."""
    samples: Positive = 128
    """Calibration examples from ``data.train``; all of them if there are fewer."""
    reconstruct: NotNegative = 0
    """Epochs over the calibration examples that fit the kept weights of each block to the output of the dense block."""
    budgets: Budgets = "equal"
    """Distribution of the sparsity over layers: equal, or by the increase in loss."""
    ffn: Annotated[float, Gt(0.0), Lt(1.0)] | None = None
    """Method "channels": share of the channels of every feed-forward layer, or expert, that stay."""

    def problems(self) -> Iterator[str]:
        if self.method == "none":
            instead = 'set start.method, such as "alps"'
            yield from self.unused("start", 'with start.method = "none"', instead, "samples", "reconstruct", "budgets")
        if self.method != CHANNELS:
            instead = 'set start.method = "channels"'
            yield from self.unused("start", f'with start.method = "{self.method}"', instead, "ffn")
        else:
            yield from self.unused("start", 'with start.method = "channels"', "", "reconstruct", "budgets")
            if self.ffn is None:
                yield 'start.method = "channels" needs the share of channels that stay. Set start.ffn, such as 0.25'

    def conflicts(self, method: str, sparsity: float, pst: PSTConfig) -> Iterator[str]:
        """Yield a message where the run would not start from the masks of the one-shot method, at ``sparsity``."""
        # Channels are removed before PST layers exist, so the masks of the run are not concerned.
        if self.method in ("none", CHANNELS):
            return
        setting = f'start.method = "{self.method}"'
        masks = METHODS[method].masks
        if method == "experts":
            yield (
                f'{setting} prunes weights, and method = "experts" removes experts. Remove [start]; for experts that '
                "go before the first step set schedule.initial_sparsity"
            )
            return
        if masks == "none":
            yield f"{setting} prunes, and method = {method!r} does not. Remove [start], or set another method"
            return
        # The pruned model is the base then, and its zeros are the mask: "magnitude" could prune other weights.
        if masks == "fixed" and pst.initial_mask != "zeros":
            yield (
                f"{setting} chooses the masks, and method = {method!r} would choose others. Fix: "
                'pst.initial_mask = "zeros"'
            )
        if sparsity == 0.0:
            yield (
                f"{setting} prunes to schedule.initial_sparsity, which is 0. Set schedule.initial_sparsity above 0, or "
                "remove [start]"
            )
            return
        fixed = parse_pattern(pst.pattern).fixed_sparsity
        if fixed not in (None, sparsity):
            yield (
                f'{setting} prunes to schedule.initial_sparsity = {sparsity}, but pst.pattern = "{pst.pattern}" has '
                f"sparsity {fixed}. Fix: schedule.initial_sparsity = {fixed}"
            )
        if masks != "ramp":
            return
        # On the ramp, a layer with a separate final sparsity has a separate initial sparsity too.
        for rule in pst.overrides:
            if rule.final_sparsity is not None:
                yield (
                    f"{setting} prunes all layers to the same sparsity, and pst.overrides gives {rule.modules!r} a "
                    "separate final_sparsity. Remove one of them, or prune with pst-ds prune and train the folder"
                )
                return


@settings
class PruneConfig(OneShotConfig):
    """Settings of ``pst-ds prune``, which has more options than ``[start]``: there the run decides on the rest.

    Raises ConfigError, which names fields; the command line names its flags instead.
    """

    method: Literal[OneShotMethod, "reap", "channels"]  # type: ignore[assignment]
    """Method that chooses the weights; "reap" drops whole experts, "channels" removes feed-forward channels."""
    sparsity: Share | None = None
    """Fraction of pruned weights, or of dropped experts. Unset, the pattern or ``schedule.final_sparsity`` sets it."""
    pattern: str = ""
    """"row", "matrix", N:M or blocks. Empty is the run's pattern, or the method's default where that is "matrix"."""
    keep_zeros: bool = False
    """Prune exactly the weights that are zero already."""
    bits: Literal[8, 4] | None = None
    """Quantise the kept weights in the same pass, with SparseGPT."""
    group: Literal[32, 64, 128, "row"] | None = None
    """Weights of a row per scale. Unset, it is "row" for 8 bits, and 64 for 4."""
    seed: int = 0
    """Seed of the choice of calibration examples."""

    @property
    def needs_data(self) -> bool:
        """True if the method needs calibration data."""
        return self.method != "magnitude" or bool(self.reconstruct) or self.budgets != "equal"

    def problems(self) -> Iterator[str]:
        # Not those of OneShotConfig, whose messages name settings of [start].
        if self.method in (REAP, CHANNELS):
            yield from self._problems_of_removal()
        elif self.pattern:
            yield from self._problems_of_pattern()
        yield from self._problems_of_channels()
        yield from self._problems_of_bits()
        if self.keep_zeros:
            yield from self._problems_of_keep_zeros()

    def _problems_of_channels(self) -> Iterator[str]:
        """Yield what is wrong with the share of channels that stay."""
        if self.method != CHANNELS:
            if self.ffn is not None:
                yield (
                    f'ffn = {self.ffn} is for method = "channels". Remove it, or prune the folder that this method '
                    "writes"
                )
            return
        if self.ffn is None:
            yield 'method = "channels" needs the share of channels that stay. Set it, for example ffn = 0.25'
        if self.sparsity is not None:
            yield f"sparsity = {self.sparsity} is for weights. Say what stays: ffn = {1.0 - self.sparsity:.6g}"

    def _problems_of_bits(self) -> Iterator[str]:
        """Yield each setting that does not fit quantisation while pruning."""
        # REAP and CHANNELS refuse bits with a message about removal.
        if self.bits and self.method not in ("sparsegpt", REAP, CHANNELS):
            yield (
                f'bits = {self.bits} needs method = "sparsegpt", whose kept weights compensate for the quantisation '
                f'error. With method = "{self.method}" prune first, {_QUANTISE_LATER}'
            )
        if self.group and not self.bits:
            yield f"group = {self.group!r} is for quantised weights. Set bits = {_BITS} too"
        if self.bits and self.reconstruct:
            yield (
                f"reconstruct = {self.reconstruct} would change weights that bits = {self.bits} has quantised. "
                f"Reconstruct first, {_QUANTISE_LATER}"
            )
        if self.bits and self.budgets == "saliency":
            yield (
                f'bits = {self.bits} quantises while pruning, which budgets = "saliency" does not support. Prune '
                f"first, {_QUANTISE_LATER}"
            )

    def _problems_of_pattern(self) -> Iterator[str]:
        """Yield what is wrong with the pattern, by itself and with the sparsity."""
        try:
            pattern = parse_pattern(self.pattern)
        except ValueError as error:
            yield f'pattern = "{self.pattern}": {error}'
            return
        fixed = pattern.fixed_sparsity
        if self.sparsity is not None and fixed not in (None, self.sparsity):
            yield f'sparsity = {self.sparsity}: pattern = "{self.pattern}" has sparsity {fixed}. Remove one of them'

    def _problems_of_removal(self) -> Iterator[str]:
        """Yield each setting about single weights, for a method that removes whole experts or channels."""
        removed = "channels"
        if self.method == REAP:
            removed = "whole experts"
        for name in ("pattern", "bits", "group", "keep_zeros", "budgets", "reconstruct"):
            value = getattr(self, name)
            if value != getattr(PruneConfig, name):
                written = repr(value)
                if value is True:  # as in TOML
                    written = "true"
                yield (
                    f'{name} = {written} is for weights, and method = "{self.method}" removes {removed}. Remove it, or '
                    "prune the resulting folder once more"
                )

    def _problems_of_keep_zeros(self) -> Iterator[str]:
        """Yield each setting that does not fit a mask which the folder has already."""
        if not self.bits:
            yield f"keep_zeros = true prunes nothing more, so there is nothing to do. Set bits = {_BITS} too"
        without_effect: list[str] = []
        for name in ("sparsity", "pattern", "budgets"):
            value = getattr(self, name)
            if value != getattr(PruneConfig, name):
                without_effect.append(f"{name} = {value!r}")
        if without_effect:
            yield f"keep_zeros = true keeps the mask that the folder has. Remove {' and '.join(without_effect)}"
