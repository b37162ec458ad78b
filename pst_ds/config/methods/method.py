"""The description of a method, and the settings that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pst_ds.config.pst import PSTConfig

Masks = Literal["none", "fixed", "ramp"]
Settings = Mapping[str, object]
_NO_SCORES: Settings = {"score_rank": 0, "structured_scores": False}
WEIGHTS: Settings = {**_NO_SCORES, "update_rank": 0, "update_embeddings": (), "train_weights": True}
"""Train the weights themselves, without scores and updates."""
LORA: Settings = {**_NO_SCORES, "update_init": "lora", "update_init_scale": 1.0}
"""Train an update U V, without scores."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method, as the run file names it."""

    masks: Masks
    """"none": every weight is kept; "fixed": chosen before the first step; "ramp": along the schedule."""
    trains_everything: bool = False
    """Train every weight of the model, not the small factors and the head alone."""
    settings: Settings = field(default_factory=dict)
    """Fields of :class:`PSTConfig` that override those of the run file."""
    defaults: Settings = field(default_factory=dict)
    """Fields of :class:`PSTConfig` for what the run file leaves out."""
    injects: bool = True
    score_penalty: float = 0.0
    """The ``train.score_penalty`` that ``pst-ds init`` writes; a method with 0 must not have one."""

    prompt_text: str = ""
    """The ``prompt.text`` that ``pst-ds init`` writes; a method with one needs one, and the others may have one."""

    def pst_config(self, asked: PSTConfig) -> PSTConfig:
        """Return the config to inject, given the ``[pst]`` of the run file."""
        settings = dict(self.settings)
        if settings.get("pattern") == "global" and asked.pattern != "matrix":
            del settings["pattern"]  # N:M and the like have no one threshold
        return replace(asked, **settings)  # type: ignore[arg-type]
