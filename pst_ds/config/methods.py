"""The table of training methods: when masks change, what trains, and which ``[pst]`` settings each method fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pst_ds.config.pst import PSTConfig

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
    defaults: Settings = field(default_factory=dict)
    """Fields of :class:`PSTConfig` for settings that the run file does not have."""
    injects: bool = True
    """Replace the target layers by PST layers."""
    score_penalty: float = 0.0
    """``train.score_penalty`` in files of ``pst-ds init``. Methods with 0 reject a penalty; the others require one."""
    prompt_text: str = ""
    """``prompt.text`` in files of ``pst-ds init``. Methods with a text require a prompt; it is optional for others."""

    def pst_config(self, config: PSTConfig) -> PSTConfig:
        """Return the config to inject, given the ``[pst]`` section of the run file."""
        settings = dict(self.settings)
        if settings.get("pattern") == "global" and config.pattern != "matrix":
            del settings["pattern"]  # N:M and similar patterns have no global threshold
        return replace(config, **settings)  # type: ignore[arg-type]


_NO_SCORES: Settings = {"score_rank": 0, "structured_scores": False}
_WEIGHTS: Settings = {**_NO_SCORES, "update_rank": 0, "update_embeddings": (), "train_weights": True}
"""Train the weights themselves, without scores and updates."""
_LORA: Settings = {**_NO_SCORES, "update_init": "lora", "update_init_scale": 1.0}
"""Train an update U V, without scores."""

METHODS: dict[str, Method] = {
    "pst": Method("Prune along the schedule by magnitude and low-rank scores, and train an update U V.", "ramp"),
    "dense": Method("Train every weight, and prune none.", "none", trains_everything=True, injects=False),
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
    "movement": Method(
        "Train every weight, and prune along the schedule by one score per weight (arXiv 2005.07683).",
        "ramp",
        trains_everything=True,
        settings={**_WEIGHTS, "full_scores": True},
    ),
    "soft-movement": Method(
        'Like "movement", with one threshold for all matrices and a penalty on the scores (arXiv 2005.07683).',
        "ramp",
        trains_everything=True,
        settings={**_WEIGHTS, "full_scores": True, "pattern": "global"},
        score_penalty=1.0,
    ),
    "spp": Method(
        "Train a multiplicative update under a fixed mask (arXiv 2405.16057).",
        "fixed",
        settings={**_LORA, "multiplicative_update": True, "update_embeddings": ()},
        defaults={"update_rank": 16, "beta": 2.0},  # the number of groups and the factor of its authors
    ),
    "masked-lora": Method("Train an update U V under a fixed mask.", "fixed", settings=_LORA),
    "sk-tuning": Method(
        "Train a prompt initialised from a text, under a fixed mask, and no weights (arXiv 2410.08598).",
        "fixed",
        settings={**_LORA, "update_rank": 0, "update_embeddings": ()},
        prompt_text="read the following text carefully:",
    ),
}
