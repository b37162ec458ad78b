"""The table of training methods: when masks change, what trains, and which ``[pst]`` settings each method fixes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pst_ds.config.pst import PSTConfig
from pst_ds.config.update_forms import LOW_RANK
from pst_ds.core.patterns import parse_pattern

Masks = Literal["none", "fixed", "ramp"]
OneShotMethod = Literal["magnitude", "wanda", "sparsegpt", "alps"]
Settings = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Method:
    """Properties of a training method, named by ``method`` in the run file."""

    description: str
    """One sentence for the documentation."""
    masks: Masks
    """When masks change: "none" prunes nothing, "fixed" chooses masks before the first step, "ramp" follows the
    schedule."""
    trains_everything: bool = False
    """Train every weight of the model instead of the small factors and the head."""
    settings: Settings = field(default_factory=dict)
    """Fields of :class:`PSTConfig` that the method fixes."""
    injects: bool = True
    """Replace the target layers by PST layers, also in runs that do not quantise weights."""

    def pst_config(self, config: PSTConfig) -> PSTConfig:
        """Return the config to inject, given the ``[pst]`` section of the run file."""
        return replace(config, **self.settings)  # type: ignore[arg-type]


# What trains decides the group of settings: a method below differs from another of its group in its masks only.
_NO_SCORES: Settings = {"score_rank": 0, "structured_scores": False}
_WEIGHTS: Settings = {
    **_NO_SCORES,
    "update_form": LOW_RANK,
    "update_rank": 0,
    "update_embeddings": (),
    "train_weights": True,
}
"""Train the weights themselves, without scores and updates."""
_LORA: Settings = {**_NO_SCORES, "update_init": "lora", "update_init_scale": 1.0}
"""Train an update U V, without scores."""

METHODS: dict[str, Method] = {
    "pst": Method("Prune along the schedule by magnitude and low-rank scores, and train an update U V.", "ramp"),
    "dense": Method(
        "Train every weight, and prune none.", "none", trains_everything=True, settings=_WEIGHTS, injects=False
    ),
    "lora": Method("Train an update U V, and prune no weight (arXiv 2106.09685).", "none", settings=_LORA),
    "magnitude": Method(
        "Train every weight under a fixed mask, which `pst.initial_mask` names.",
        "fixed",
        trains_everything=True,
        settings=_WEIGHTS,
    ),
    "gmp": Method(
        "Train every weight, and prune the smallest along the schedule (arXiv 1710.01878).",
        "ramp",
        trains_everything=True,
        settings=_WEIGHTS,
    ),
    "masked-lora": Method("Train an update U V under a fixed mask.", "fixed", settings=_LORA),
    "experts": Method(
        "Remove whole experts of a mixture along the schedule, and train an update U V and the routers.",
        "ramp",
        settings={**_NO_SCORES, "pattern": "experts"},
    ),
}


def method_conflicts(method: str, pst: PSTConfig, final_sparsity: float) -> Iterator[str]:
    """Yield a message for each setting that does not fit the method; ``pst`` is the section of the run file."""
    facts = METHODS[method]
    if pst.initial_mask == "zeros" and facts.masks != "fixed":
        fixed = ", ".join(repr(name) for name, other in METHODS.items() if other.masks == "fixed")
        yield (
            f'pst.initial_mask = "zeros" is for methods with a fixed mask ({fixed}), not for method = {method!r}. '
            "Remove it"
        )
    # The settings that the method fixes may contradict those of the run file.
    try:
        injected = facts.pst_config(pst)
    except ValueError as error:
        yield f"method = {method!r}: pst.{error}"
        return
    if pst.criterion:
        yield from _criterion_conflicts(method, pst)
    if pst.magnitude == "activation" and pst.initial_mask == "zeros" and facts.masks != "none":
        yield (
            'pst.magnitude = "activation" modifies the ranking by |W|, which pst.initial_mask = "zeros" does not use. '
            "Remove it"
        )
    yield from _expert_conflicts(method, pst)
    yield from _sparsity_conflicts(method, pst, injected, final_sparsity)


def _criterion_conflicts(method: str, pst: PSTConfig) -> Iterator[str]:
    """Yield a message where the method cannot rank weights by ``pst.criterion``."""
    masks = METHODS[method].masks
    if masks == "none":
        yield f'pst.criterion = "{pst.criterion}" ranks weights, and method = {method!r} prunes none. Remove it'
    # There are no gradients before the first step.
    if masks == "fixed" and "gradients" in pst.criterion_needs:
        yield (
            f'pst.criterion = "{pst.criterion}" needs gradients, and method = {method!r} chooses its mask before the '
            "first step. Choose another criterion"
        )


def _expert_conflicts(method: str, pst: PSTConfig) -> Iterator[str]:
    """Yield a message for each setting that does not fit the removal of whole experts, or requires it."""
    if method != "experts":
        if pst.pattern == "experts":
            yield f'pst.pattern = "experts" is for method = "experts", not for method = {method!r}. Set the method'
        return
    # A user did not choose the default values, nor the pattern that the method sets itself.
    allowed = {"pattern": ("matrix", "experts"), "magnitude": ("weight",), "criterion": ("",)}
    for name, values in allowed.items():
        if getattr(pst, name) not in values:
            yield f'method = "experts" removes whole experts, and pst.{name} is about single weights. Remove it'


def _sparsity_conflicts(method: str, pst: PSTConfig, injected: PSTConfig, final_sparsity: float) -> Iterator[str]:
    """Yield a message where the pattern cannot have the final sparsity."""
    # The pattern of the run file, not of the method: a user who asks for 2:4 expects its sparsity.
    pattern = parse_pattern(pst.pattern)
    if pattern.fixed_sparsity not in (None, final_sparsity):
        yield (
            f'schedule.final_sparsity = {final_sparsity}, but pst.pattern = "{pattern}" has sparsity '
            f"{pattern.fixed_sparsity}. Fix: schedule.final_sparsity = {pattern.fixed_sparsity}"
        )
    for rule in injected.rules:
        section = "schedule"
        sparsity = final_sparsity
        if rule.final_sparsity is not None:
            section = "overrides"
            sparsity = rule.final_sparsity
        # Pooled matrices could not lose enough weights in all, however they share the loss.
        if rule.pattern.pools_matrices and pst.min_kept_share > 1.0 - sparsity:
            yield (
                f'pst.min_kept_share = {pst.min_kept_share} of every matrix of pattern "{rule.pattern}" '
                f"(method = {method!r}) is more than {section}.final_sparsity = {sparsity} keeps in all. Fix: "
                f"pst.min_kept_share below {1.0 - sparsity:.4g}"
            )
