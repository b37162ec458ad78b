"""What each method of a run file is: what it injects, what it trains, and when its masks change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pst_ds.config.pst import PSTConfig

MethodName = Literal[
    "pst", "dense", "lora", "magnitude", "gmp", "movement", "soft-movement", "spp", "masked-lora"
]  # fmt: skip
OneShotMethod = Literal["magnitude", "wanda", "sparsegpt"]
Masks = Literal["none", "fixed", "ramp"]
_NO_SCORES: dict[str, Any] = {"score_rank": 0, "structured_scores": False}
_WEIGHTS: dict[str, Any] = {**_NO_SCORES, "update_rank": 0, "update_embeddings": (), "train_weights": True}
_LORA: dict[str, Any] = {**_NO_SCORES, "update_init": "lora", "update_init_scale": 1.0}


@dataclass(frozen=True, slots=True)
class Method:
    """One of the methods."""

    masks: Masks
    """"none": every weight is kept; "fixed": chosen before the first step; "ramp": along the schedule."""
    trains_everything: bool = False
    """Whether every weight of the model trains, not the small factors and the head alone."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of :class:`PSTConfig`, over those of the run file."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Of :class:`PSTConfig`, for what the run file leaves out."""
    injects: bool = True

    def pst_config(self, asked: PSTConfig) -> PSTConfig:
        """What is injected, where ``asked`` is the run file's."""
        settings = dict(self.settings)
        if settings.get("pattern") == "global" and asked.pattern != "matrix":
            del settings["pattern"]  # N:M and the like have no one threshold
        return replace(asked, **settings)


METHODS: dict[MethodName, Method] = {
    "pst": Method("ramp"),
    "dense": Method("none", trains_everything=True, injects=False),
    "lora": Method("none", settings=_LORA),
    "magnitude": Method("fixed", trains_everything=True, settings=_WEIGHTS),
    "gmp": Method("ramp", trains_everything=True, settings=_WEIGHTS),
    "movement": Method("ramp", trains_everything=True, settings={**_WEIGHTS, "full_scores": True}),
    "soft-movement": Method(
        "ramp", trains_everything=True, settings={**_WEIGHTS, "full_scores": True, "pattern": "global"}
    ),
    "spp": Method(
        "fixed",
        settings={**_LORA, "multiplicative_update": True, "update_embeddings": ()},
        defaults={"update_rank": 16, "beta": 2.0},  # its authors' groups and factor
    ),
    "masked-lora": Method("fixed", settings=_LORA),
}
"""LoRA is arXiv 2106.09685, gradual magnitude pruning (GMP) 1710.01878, movement and soft movement pruning 2005.07683,
SPP 2405.16057."""
