"""Settings of the injected layers: ``[pst]``."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Strict

from pst_ds.config.criteria import criterion_called, implied_criterion
from pst_ds.config.settings import (
    BeforeLoading,
    Finite,
    InShapes,
    MayDiffer,
    NotNegative,
    OnLoad,
    Positive,
    Rate,
    Section,
    Share,
    settings,
)
from pst_ds.config.update_forms import LOW_RANK, UPDATE_FORMS
from pst_ds.core.patterns import Pattern, parse_pattern
from pst_ds.errors import InputError

_BARE_NAME = re.compile(r"[\w.-]+")
"""A string without operators of regular expressions, except the full stop, which module names contain."""


def _as_tuple(value: object) -> object:
    """Convert lists and sets of names to tuples; sets are sorted."""
    if isinstance(value, set | frozenset):
        # The order of a set of strings differs between processes, and equal configs must be equal on all ranks.
        return tuple(sorted(value))
    if isinstance(value, list):
        return tuple(value)
    return value


def _as_names(value: object) -> object:
    """Convert as :func:`_as_tuple`, and a plain name to a tuple of it."""
    if isinstance(value, str) and _BARE_NAME.fullmatch(value):
        return (value,)
    return _as_tuple(value)


Modules = Annotated[str | tuple[str, ...], BeforeValidator(_as_tuple)]
"""A regular expression for whole module names, or names and their dotted endings."""
Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]


class _LibrarySection(Section):
    """Base of settings that are also used outside a run file: their messages name settings without a section."""

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            # From pydantic's error, settings() makes a ConfigError whose messages name the section, if there is one.
            raise ValueError("\n".join(problems))


@settings
class Override(_LibrarySection):
    """A different pattern, or final sparsity, for some layers."""

    modules: Modules
    """The layers, matched like ``target_modules``."""
    pattern: str = ""
    """Pattern of these layers; empty is ``pst.pattern``."""
    final_sparsity: Share | None = None
    """Sparsity at the end of the schedule; unset is the schedule's, or 1 - N/M. These layers follow the same schedule:
    when it reaches half of its final sparsity, so do they."""

    def problems(self) -> Iterator[str]:
        yield from _regex_problems("modules", self.modules)
        if not self.modules:
            yield f"modules = {self.modules!r} is empty. Name the layers of the override"
        if not self.pattern and self.final_sparsity is None:
            yield f"modules = {self.modules!r} set neither pattern nor final_sparsity. Set one of them"


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Settings that choose the mask of one layer."""

    pattern: Pattern
    final_sparsity: float | None = None
    """Final sparsity of this layer; None is the schedule's."""
    min_kept_share: float = 0.0


@settings
class PSTConfig(_LibrarySection):
    """Settings of what PST prunes and trains in a model. ``PSTConfig.paper()`` has the paper's constants.

    S = |W| / scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V,  y = x (M . W)' + bias

    A setting that changes what a layer computes from its saved tensors has no :class:`OnLoad` mark: adapters are loaded
    only into models with the same value. Raises ConfigError with one message for each wrong setting.
    """

    target_modules: InShapes[Modules] = "all-linear"
    """Layers to prune, as in PEFT: "all-linear" is every linear layer inside the transformer blocks except expert
    routers; another string is a regular expression for the whole module name; a list has names or their dotted endings.
    Experts stacked in 3-D Parameters count as linear layers, by the name of the Parameter or of its module
    (docs/how-to/large-models.md). "all-linear" rejects models with weights in the blocks outside linear layers."""
    exclude_modules: InShapes[Annotated[str | tuple[str, ...], BeforeValidator(_as_names)]] = ()
    """Modules that stay dense and frozen, matched like ``target_modules``; a list, or a plain name, also excludes
    everything inside its modules. Also names the weights that "all-linear" rejects."""
    prune_uncalled: BeforeLoading[MayDiffer[bool]] = False
    """Allow pruned layers that the forward pass of the first step does not call. By default such a layer is an error,
    as a vision tower is when training on text; experts without tokens in a step are allowed."""
    modules_to_save: InShapes[Names | None] = None
    """Modules trained in full. Unset is the task head: everything on top of the base model, and the pooler of BERT and
    similar models; nothing for language models. An empty list trains none."""
    fused_modules: InShapes[Names] = ("c_attn",)
    """Layers with several square matrices side by side (q, k, v), each scored and ranked separately."""
    score_rank: InShapes[NotNegative] = 8
    """Rank of A B; 0 disables it."""
    update_form: str = LOW_RANK
    """How the weights of layers are updated while they train: "low-rank" is W0 + beta U V; "spp" is multiplicative and
    keeps every zero of W0; "learned-ranks" cuts terms of U V; "beside" adds beta U V to the masked weight,
    without mask (docs/how-to/methods.md); installed packages can add forms by name."""
    update_rank: InShapes[NotNegative] = 8
    """Rank of U V; 0 disables it."""
    expert_rank: InShapes[NotNegative] = 4
    """Maximum of both ranks for experts stacked in a Parameter, which are many and small: rank 8 would add 3 % of
    Qwen3-30B-A3B's weights, each with optimizer state."""
    update_embeddings: InShapes[Names] = ()
    """Embeddings with an update U V of rank ``update_rank`` and no mask, such as "word_embeddings"; matched like a list
    in ``target_modules``."""
    structured_scores: InShapes[bool] = True
    """True if scores include the row and column terms R and C."""
    alpha1: Finite = 1.0
    """Weight of A B in the scores."""
    alpha2: Finite = 1.0
    """Weight of R and C in the scores."""
    beta: Finite = 1.0
    """Weight of U V in the merged weight."""
    magnitude: Literal["weight", "activation"] = "weight"
    """Untrained term of the scores: "weight" is |W|; "activation" is |W| times the norm of its input over calibration
    examples, relative to the mean norm, as in Wanda (arXiv 2306.11695)."""
    criterion: BeforeLoading[str] = ""
    """How weights are ranked: "magnitude", "activation", "learned" (magnitude and learned scores),
    "learned-activation", or the name of a criterion that an installed package adds. Unset is what ``magnitude``,
    ``score_rank`` and ``structured_scores`` imply."""
    frozen_magnitude: bool = False
    """Use |W0| instead of |W| in the scores: masks then change by the learned scores only, not as U V changes. For
    models that are pruned at once and then recover."""
    calibration_examples: BeforeLoading[Positive] = 128
    """Training examples for what is measured before the first masks: norms of "activation", scores of experts."""
    relative_magnitude: bool = True
    """Divide |W| in the scores by the mean of |W0| of the matrix, so that scores of all layers are near 1."""
    score_init_scale: BeforeLoading[Finite] = 0.3
    """Initial standard deviation of A."""
    update_init: BeforeLoading[Literal["normal", "lora"]] = "normal"
    """Initial standard deviation of U (of V for embeddings, whose U is initialised to zero). "lora" initialises U to
    zero and V with 1/sqrt(3 in_features), as LoRA does."""
    update_init_scale: BeforeLoading[Finite] = 0.1
    """Factor on the standard deviation of ``update_init``."""
    update_penalty: BeforeLoading[Rate] = 1.0
    """Factor on the penalty of update forms that have one, such as that of the gates of "learned-ranks"."""
    pattern: BeforeLoading[str] = "matrix"
    """Weights that are ranked together: "matrix", each matrix separately; "stack", the matrices of a layer (fused, or
    experts), whose sparsity may then differ; "global", all matrices; "row", the weights of each output; N:M such as
    "2:4", which keeps N of M consecutive inputs, on a ramp of a growing
    share of the groups; "16x1", blocks of outputs x inputs that are kept or pruned as one."""
    min_kept_share: BeforeLoading[Share] = 0.02
    """Minimum fraction of each matrix that patterns "stack" and "global" keep."""
    overrides: BeforeLoading[Annotated[tuple[Override, ...], Strict(False)]] = ()
    """Patterns and final sparsities of some layers; the last match applies."""
    initial_mask: BeforeLoading[Literal["magnitude", "zeros"]] = "magnitude"
    """Mask of methods with a fixed mask: "magnitude" ranks |W0| once, by ``pattern``; "zeros" keeps the non-zeros of
    the base model, such as a folder of ``pst-ds prune``."""
    train_weights: InShapes[bool] = False
    """Train the pruned weights themselves, under the mask (for baselines: every weight then has optimizer state)."""
    tile_bytes: BeforeLoading[MayDiffer[NotNegative]] = 0
    """Maximum bytes per rank of gradient tiles in the backward pass of a layer; 0 is 32 MiB on CPUs and 512 MiB on
    GPUs. Smaller tiles are slower."""
    seed: BeforeLoading[int | None] = None
    """Random seed of A and U (of V for embeddings). Together with a layer's name it determines their values, on any
    number of ranks. Unset is the run's ``seed``, or 0 outside a run."""

    def problems(self) -> Iterator[str]:
        for name in ("target_modules", "exclude_modules"):
            yield from _regex_problems(name, getattr(self, name))
        if self.frozen_magnitude and self.train_weights:
            yield (
                "frozen_magnitude = true ranks by the pretrained weights, and train_weights = true does not keep them. "
                "Set one of them to false"
            )
        # A known form is not imported here, because that imports torch.
        if self.update_form not in UPDATE_FORMS.names:
            try:
                UPDATE_FORMS.get(self.update_form)
            except InputError as error:
                yield f"update_form = {error}"
        if self.train_weights and self.update_form != LOW_RANK:
            yield (
                f"update_form = {self.update_form!r} updates frozen weights, and train_weights = true trains them. "
                "Remove one of them"
            )
        if self.update_embeddings and self.update_rank == 0:
            yield (
                f"update_embeddings = {list(self.update_embeddings)} with update_rank = 0 updates nothing. Set "
                "update_rank to at least 1, or update_embeddings to []"
            )
        yield from self._criterion_problems()
        yield from self._pattern_problems()

    def _criterion_problems(self) -> Iterator[str]:
        if not self.criterion:
            return
        try:
            needs = criterion_called(self.criterion).needs
        except InputError as error:
            yield f"criterion: {error}"
            return
        # Settings that a criterion does not read are refused: a user who sets them expects other masks.
        if self.initial_mask == "zeros":
            yield (
                f'criterion = "{self.criterion}" ranks weights, and initial_mask = "zeros" keeps the non-zeros of the '
                "base model. Remove one of them"
            )
        if self.magnitude == "activation" and "input_norms" not in needs:
            yield (
                f'criterion = "{self.criterion}" does not use norms of inputs, which magnitude = "activation" measures'
                ". Remove one of them"
            )
        if "learned_scores" in needs and not self.has_scores:
            yield (
                f'criterion = "{self.criterion}" uses learned scores, which score_rank = 0 and structured_scores = '
                "false omit. Change one of them"
            )

    def _pattern_problems(self) -> Iterator[str]:
        try:
            rules = self.rules
        except ValueError as error:
            yield str(error)
            return
        general, *overrides = rules
        if any(rule.pattern.kind == "experts" for rule in overrides):
            yield 'overrides: pattern "experts" removes equally many experts of every block. Remove overrides'
        pooled = next((rule.pattern for rule in (general, *overrides) if rule.pattern.pools_matrices), None)
        if pooled is not None and not self.relative_magnitude:
            yield (
                f'pattern = "{pooled}" with relative_magnitude = false would compare weights of different magnitude '
                "scales. Set relative_magnitude = true"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> "PSTConfig":
        """Return a config with the paper's constants: no relative magnitude, A and U from N(0, 1)."""
        constants_and_overrides = {**PAPER, **overrides}
        return cls(**constants_and_overrides)

    @classmethod
    def formula(cls) -> list[str]:
        """Return the names of the settings of which a saved adapter and its model must have the same values."""
        names = []
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if not any(isinstance(mark, OnLoad) for mark in _marks_of(hint)):
                names.append(name)
        return names

    @property
    def rules(self) -> tuple[MaskRule, ...]:
        """Rules for masks: the general one, then one for each override."""
        rules = [self._rule(self.pattern, None)]
        for override in self.overrides:
            rules.append(self._rule(override.pattern, override.final_sparsity))
        return tuple(rules)

    def rule_for(self, name: str) -> MaskRule:
        """Return the rule for the mask of the layer ``name``."""
        pattern = self.pattern
        sparsity = None
        for override in self.overrides:
            if name_matches(name, override.modules):
                # The last match applies as a whole: it does not keep the sparsity of an earlier one.
                pattern = override.pattern or self.pattern
                sparsity = override.final_sparsity
        return self._rule(pattern, sparsity)

    def _rule(self, pattern_name: str, sparsity: float | None) -> MaskRule:
        """Return the rule of a pattern ("" for ``pst.pattern``) and a sparsity (None for the schedule's).

        Raises ValueError for an unknown pattern, or one that cannot have this sparsity.
        """
        pattern = parse_pattern(pattern_name or self.pattern)
        fixed = pattern.fixed_sparsity
        if fixed is not None and sparsity not in (None, fixed):
            raise ValueError(
                f'overrides.final_sparsity = {sparsity} with pattern "{pattern}", which has sparsity {fixed}. Remove it'
            )
        # Pooled weights are pruned up to a common score, so a matrix cannot have a sparsity to itself.
        if pattern.kind == "global" and sparsity is not None:
            raise ValueError(
                f'overrides.final_sparsity = {sparsity} with pattern "global", whose matrices share one sparsity. '
                'Remove it, or set pattern = "matrix"'
            )
        if fixed is not None:
            sparsity = fixed
        return MaskRule(pattern=pattern, final_sparsity=sparsity, min_kept_share=self.min_kept_share)

    @property
    def has_scores(self) -> bool:
        """True if the scores include A B, or R and C."""
        return self.score_rank > 0 or self.structured_scores

    @property
    def criterion_name(self) -> str:
        """Name of the criterion: :attr:`criterion`, or what the other settings imply."""
        return self.criterion or implied_criterion(self.magnitude, has_scores=self.has_scores)

    @property
    def criterion_needs(self) -> frozenset[str]:
        """What the criterion reads besides weights (``pst_ds.core.criteria.criterion.NEEDS``)."""
        if self.criterion:
            return criterion_called(self.criterion).needs
        # Without a named criterion, the needs are known without importing torch.
        needs = set[str]()
        if self.magnitude == "activation":
            needs.add("input_norms")
        if self.has_scores:
            needs.add("learned_scores")
        return frozenset(needs)

    @property
    def of_experts(self) -> "PSTConfig":
        """The config of stacked experts: ranks limited to ``expert_rank``, and no embeddings."""
        return replace(
            self,
            score_rank=min(self.score_rank, self.expert_rank),
            update_rank=min(self.update_rank, self.expert_rank),
            update_embeddings=(),
        )


def _marks_of(hint: object) -> tuple[object, ...]:
    """Return the marks of an annotation, such as ``OnLoad.SHAPES`` of ``InShapes[int]``."""
    return getattr(hint, "__metadata__", ())


def name_matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Match a string as a regular expression for the whole name; each of a list as a name or its dotted ending."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    # With the full stop, "proj" does not match "k_proj".
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def is_inside(name: str, patterns: str | Iterable[str]) -> bool:
    """Match as :func:`name_matches`; a list also names all inside its modules."""
    if isinstance(patterns, str):
        # A regular expression says itself whether it covers what is inside.
        return name_matches(name, patterns)
    module = name
    while module:
        if name_matches(module, patterns):
            return True
        module = module.rpartition(".")[0]  # the module that contains it
    return False


def _regex_problems(name: str, pattern: str | tuple[str, ...]) -> Iterator[str]:
    """Yield a message if the setting ``name`` is a string, but not a regular expression."""
    if not isinstance(pattern, str):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{name} = {pattern!r} is not a regular expression: {error}. Correct it, or give a list of names"


PAPER: dict[str, Any] = {
    # The paper adds |W| itself, not relative to its mean in the matrix.
    "relative_magnitude": False,
    "score_init_scale": 1.0,
    "update_init": "normal",
    "update_init_scale": 1.0,
}
"""Settings of ``preset = "paper"`` (arXiv 2205.11005; ranks, alphas and beta are the same in both)."""
