"""Settings of the injected modules, as a frozen dataclass."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pst_ds.config.checks import Finite, NotNegative, Positive, Rate, Share, check_fields
from pst_ds.core.patterns import Pattern, parse_pattern

InitScale = Literal["normal", "rank", "width"]
UpdateInit = Literal["normal", "rank", "width", "lora"]
Magnitude = Literal["weight", "activation", "none"]
InitialMask = Literal["magnitude", "zeros"]
UpdateGates = Literal["none", "layer", "component"]
Bias = Literal["none", "pst_only", "all"]
NMRamp = Literal["share", "steps"]
_BARE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """Another pattern, or another share of zeros, for some layers."""

    modules: str | tuple[str, ...]
    """Matched as ``target_modules`` is."""
    pattern: str = ""
    """Empty is the config's pattern."""
    final_sparsity: Share | None = None
    """Fraction of zeros at the end of the schedule; None is the schedule's, or 1 - N/M. On the way there these layers
    keep step with the others: at half of the schedule's final sparsity they have half of theirs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", _names(self.modules))
        _require_regex("modules", self.modules)
        if not self.modules:
            raise ValueError(f"modules = {self.modules!r} is empty; name the layers that the override is for")
        if not self.pattern and self.final_sparsity is None:
            raise ValueError(f"modules = {self.modules!r} set neither pattern nor final_sparsity; set one of them")
        check_fields(self)


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Rule by which the mask of one layer is chosen."""

    pattern: Pattern
    final_sparsity: float | None = None
    """Of this layer alone; None is the schedule's."""
    min_kept_share: float = 0.0
    nm_ramp: NMRamp = "share"


@dataclass(frozen=True, kw_only=True, slots=True)
class PSTConfig:
    """What PST prunes and trains in a model. ``PSTConfig.paper()`` has the paper's constants.

    S = |W| / scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V,  y = x (M . W)' + bias
    """

    target_modules: str | tuple[str, ...] = "all-linear"
    """As in PEFT: "all-linear" is every linear layer inside the blocks, but the routers of experts, which stay dense;
    another string is a regular expression for the whole module name; a list holds names or their dotted endings.
    Stacks of experts in 3-D Parameters count as linear layers, by the name of the Parameter or of the module around it
    (docs/how-to/large-models.md). "all-linear" rejects a model whose blocks hold weights outside of linear layers."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules left dense and frozen, matched as ``target_modules`` is, but a list also names all that is in its
    modules, and a string that is a plain name counts as a list of it; also those that "all-linear" refuses."""
    prune_uncalled: bool = False
    """Prune layers too that no forward pass of the first step calls. Such a layer is an error otherwise, as a vision
    tower is in training on text alone; an expert without a token in a step is none."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained in full; None is the task head: all that is on top of the base model, and the pooler that BERT
    and others have inside it, but of a language model nothing. An empty list trains none."""
    bias: Bias = "none"
    """Which biases train, as in PEFT: none, those of the pruned layers, or all of the model."""
    fused_modules: tuple[str, ...] = ("c_attn",)
    """Layers that hold several square matrices side by side (q, k, v), each scored and ranked by itself."""
    score_rank: NotNegative = 8
    """Rank of A B; 0 leaves both out."""
    update_rank: NotNegative = 8
    """Rank of U V; 0 leaves both out."""
    expert_rank: NotNegative = 4
    """The most that either rank is in the matrices of experts that are stacked in a Parameter, of which a model has
    hundreds, and small ones: rank 8 would be 3 % of Qwen3-30B-A3B's weights, each with optimizer state."""
    update_embeddings: tuple[str, ...] = ()
    """Embeddings that get an update U V of ``update_rank`` too, and no mask, such as "word_embeddings"; matched as a
    list in ``target_modules`` is."""
    structured_scores: bool = True
    """Whether the scores have R and C."""
    alpha1: Finite = 1.0
    """Weight of A B in the scores."""
    alpha2: Finite = 1.0
    """Weight of R and C in the scores."""
    beta: Finite = 1.0
    """Weight of U V in the merged weight."""
    magnitude: Magnitude = "weight"
    """The term of the scores that needs no training: "weight" is |W|; "activation" |W| times the norm of its input over
    some training text (relative to the mean norm), as in Wanda (arXiv 2306.11695); "none" leaves it out."""
    frozen_magnitude: bool = False
    """Have |W0| in the scores, not |W|: then weights near the cut do not come and go as U V moves, and only what the
    scores learn changes the masks. For models that are pruned at once and then recover."""
    calibration_examples: Positive = 128
    """Training examples that the norms of "activation" are taken over, before the first step and the first masks."""
    gated_norms: bool = False
    """Whether the norms of "activation" weigh a token that an expert gets by what the router gives it there, as
    MoE-Pruner does (arXiv 2410.12013)."""
    relative_magnitude: bool = True
    """Divide |W| in the scores by the mean of |W0|, matrix by matrix, so that scores of every layer are near 1."""
    detach_magnitude: bool = False
    """True stops the gradient of the scores from reaching U V through |W|."""
    score_init: InitScale = "normal"
    """Standard deviation of A at the start: 1, 1/sqrt(rank) or 1/sqrt(3 in_features), times ``score_init_scale``."""
    score_init_scale: Finite = 0.3
    """Factor on the standard deviation that ``score_init`` names."""
    update_init: UpdateInit = "normal"
    """The same for U (for V of an embedding, whose U starts at zero). "lora" starts as LoRA does: U at zero, and V with
    1/sqrt(3 in_features)."""
    update_init_scale: Finite = 0.1
    """Factor on the standard deviation that ``update_init`` names."""
    update_gates: UpdateGates = "none"
    """Learned ranks: W = W0 + beta U diag(g) V with trained gates g = 2 sigmoid(a), one for each "component", a column
    of U with its row of V (as SoRA, arXiv 2311.11696), or one a matrix, "layer" (arXiv 2509.03057)."""
    target_rank: Rate = 0.0
    """Mean rank of the updates at the end of the schedule, as in AdaLoRA (arXiv 2303.10512): of all components
    ``target_rank`` / ``update_rank`` are kept, the most important of all matrices together. 0 keeps them all."""
    pattern: str = "matrix"
    """What is ranked against what: "matrix", every matrix by itself; "stack", the matrices of a layer together, fused
    ones or experts, which may then differ; "global", all matrices together; "row", every output's weights; N:M such as
    "2:4", N kept of M consecutive inputs; "16x1", blocks of outputs x inputs, kept or pruned whole."""
    min_kept_share: Share = 0.02
    """Of the patterns "stack" and "global": the least share of every matrix that is kept."""
    nm_ramp: NMRamp = "share"
    """How N:M comes about along the schedule: "share" constrains a growing share of the groups, those first that lose
    the least score; "steps" lets every group lose one weight more at a time."""
    overrides: tuple[Override, ...] = ()
    """Patterns and shares of zeros of some layers; of two that match a layer the later one counts."""
    initial_mask: InitialMask = "magnitude"
    """Of the methods with a fixed mask: "magnitude" ranks |W0| once, in ``pattern``; "zeros" keeps the non-zeros of the
    base model, such as a folder that ``pst-ds prune`` wrote."""
    train_weights: bool = False
    """Train the pruned weights themselves, under the mask (for baselines: every weight then has optimizer state)."""
    full_scores: bool = False
    """Give every weight a score of its own instead of the small factors and |W| (movement pruning, arXiv 2005.07683);
    every score has optimizer state."""
    multiplicative_update: bool = False
    """W = W0 + beta W0 . (U V) with U (out_features,) and an output of each of ``update_rank`` groups sharing a row of
    V: SPP (arXiv 2405.16057), which keeps every zero of W0. For masks that are fixed before the first step. With
    method = "spp" ``update_rank`` is 16 and ``beta`` 2 unless the run file sets them, as its authors have them."""
    tile_bytes: NotNegative = 0
    """Bytes that the backward pass of a layer may hold besides tensors as large as its input or its factors, on each
    rank; 0 is 32 MiB on a CPU and 512 MiB on a GPU. Smaller tiles are slower."""
    seed: int | None = None
    """Seed of A and U (of V in an embedding); together with a layer's name it fixes their values, on any number of
    ranks. None takes the run's ``seed``, or 0 outside a run."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "fused_modules", "update_embeddings"):
            object.__setattr__(self, name, _names(getattr(self, name), bare=name != "target_modules"))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for name in ("modules_to_save", "fused_modules", "update_embeddings"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} = {getattr(self, name)!r} is no name of a module; give a list of names")
        for name in ("target_modules", "exclude_modules"):
            _require_regex(name, getattr(self, name))
        check_fields(self)
        if self.frozen_magnitude and self.train_weights:
            raise ValueError(
                "frozen_magnitude = true ranks by the pretrained weights, and train_weights = true does not keep them; "
                "set one of them to false"
            )
        if self.full_scores and self.has_scores:
            raise ValueError(
                "full_scores = true takes the place of the small factors of the scores; set score_rank = 0 and "
                "structured_scores = false"
            )
        if self.multiplicative_update and (self.has_scores or self.update_rank == 0):
            raise ValueError(
                "multiplicative_update = true is for fixed masks, and needs factors; set score_rank = 0, "
                "structured_scores = false, full_scores = false and update_rank of at least 1"
            )
        if self.multiplicative_update and self.expert_rank == 0:
            raise ValueError("expert_rank = 0 leaves a multiplicative update without groups; set it to at least 1")
        self._require_gates_fit()
        if self.update_embeddings and self.update_rank == 0:
            raise ValueError(
                f"update_embeddings = {list(self.update_embeddings)} with update_rank = 0 updates nothing; set "
                "update_rank to at least 1, or update_embeddings to []"
            )
        for rule in self.rules:
            if rule.pattern.pools_matrices and not self.relative_magnitude and not self.full_scores:
                raise ValueError(
                    f'pattern = "{rule.pattern}" with relative_magnitude = false would rank weights of different '
                    "scales against each other; set relative_magnitude = true"
                )

    def _require_gates_fit(self) -> None:
        if self.update_gates != "none" and (self.update_rank == 0 or self.multiplicative_update):
            raise ValueError(
                f'update_gates = "{self.update_gates}" learns the rank of U V, which update_rank = {self.update_rank}'
                f"{' with multiplicative_update = true' if self.multiplicative_update else ''} does not have; set "
                'update_gates = "none"'
            )
        if self.target_rank and self.update_gates == "none":
            raise ValueError(
                f"target_rank = {self.target_rank} drops components by their gates, and there are none; set "
                'update_gates = "component" or "layer"'
            )
        if self.target_rank > self.update_rank:
            raise ValueError(
                f"target_rank = {self.target_rank} is more than update_rank = {self.update_rank}, which updates begin "
                f"with; set it to at most {self.update_rank}"
            )

    @property
    def dropped_share(self) -> float:
        """Share of the components of all updates that learned ranks drop in the end."""
        return 1.0 - self.target_rank / self.update_rank if self.target_rank else 0.0

    @classmethod
    def paper(cls, **overrides: Any) -> PSTConfig:
        """Return the constants of the paper: no relative scale, A and U from N(0, 1)."""
        return cls(**{**PAPER, **overrides})

    @property
    def factor_seed(self) -> int:
        """``seed``, or 0 if it is None."""
        return self.seed or 0

    @property
    def rules(self) -> tuple[MaskRule, ...]:
        """Rules for masks: the config's own, then that of every override."""
        overridden = (self._rule(o.pattern, o.final_sparsity) for o in self.overrides)
        return self._rule(self.pattern, None), *overridden

    def rule_for(self, name: str) -> MaskRule:
        """Return the rule for the mask of the layer ``name``."""
        pattern, sparsity = self.pattern, None
        for override in self.overrides:
            if name_matches(name, override.modules):
                pattern = override.pattern or self.pattern
                sparsity = override.final_sparsity
        return self._rule(pattern, sparsity)

    def _rule(self, name: str, sparsity: float | None) -> MaskRule:
        pattern = parse_pattern(name or self.pattern)
        fixed = pattern.fixed_sparsity
        if fixed is not None and sparsity not in (None, fixed):
            raise ValueError(
                f"overrides.final_sparsity = {sparsity} with pattern {name!r}, which has {fixed} zeros; leave it out"
            )
        if pattern.kind == "global" and sparsity is not None:
            raise ValueError(
                f'overrides.final_sparsity = {sparsity} with pattern "global", whose matrices share one number of '
                'zeros; leave it out, or set pattern = "matrix"'
            )
        return MaskRule(pattern, fixed if fixed is not None else sparsity, self.min_kept_share, self.nm_ramp)

    @property
    def has_scores(self) -> bool:
        """True if A B, or R and C, are part of the scores."""
        return self.score_rank > 0 or self.structured_scores

    @property
    def of_experts(self) -> PSTConfig:
        """Return the same with the ranks of experts' factors."""
        return replace(
            self,
            score_rank=min(self.score_rank, self.expert_rank),
            update_rank=min(self.update_rank, self.expert_rank),
            update_embeddings=(),
        )

    @property
    def scores_start_equal(self) -> bool:
        """True if all scores are equal before the first step: S, B, R and C start at zero."""
        return self.full_scores or self.magnitude == "none"

    @property
    def scores_stay_equal(self) -> bool:
        """True if training cannot tell weights apart either."""
        learned = (self.score_rank > 0 and self.alpha1 != 0.0) or (self.structured_scores and self.alpha2 != 0.0)
        return self.scores_start_equal and not (self.full_scores or learned)


def _names(value: Any, *, bare: bool = False) -> Any:
    """Turn lists and sets into tuples, sets in order; if ``bare``, a plain name into a tuple of it."""
    if isinstance(value, list | set | frozenset):
        return tuple(value) if isinstance(value, list) else tuple(sorted(value))
    return (value,) if bare and isinstance(value, str) and _BARE_NAME.fullmatch(value) else value


def name_matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Match a string as a regular expression for the whole name; each of a list as a name or its dotted ending."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def is_inside(name: str, patterns: str | Iterable[str]) -> bool:
    """Match as :func:`name_matches`; a list also names all inside its modules."""
    if isinstance(patterns, str):
        return name_matches(name, patterns)
    parts = name.split(".")
    return any(name_matches(".".join(parts[:i]), patterns) for i in range(len(parts), 0, -1))


def _require_regex(name: str, pattern: str | tuple[str, ...]) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{name} = {pattern!r} is not a regular expression: {error}; mend it, or give a list of names"
            ) from None


PAPER: dict[str, Any] = {
    "relative_magnitude": False,
    "score_init": "normal",
    "score_init_scale": 1.0,
    "update_init": "normal",
    "update_init_scale": 1.0,
}
"""Settings of ``preset = "paper"`` (arXiv 2205.11005; ranks, alphas and beta are the same in both)."""
