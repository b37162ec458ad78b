"""Rules of one-shot pruning: the method, and the pattern and share of zeros of every target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from pst_ds.config.methods import OneShotMethod as Method
from pst_ds.config.pst import PSTConfig, name_matches
from pst_ds.core.patterns import Pattern, parse_pattern
from pst_ds.core.quantization import Grid
from pst_ds.errors import InputError
from pst_ds.nn.targets import Target

_METHOD_PATTERNS: dict[Method, str] = {"magnitude": "matrix", "wanda": "row", "sparsegpt": "row", "alps": "row"}
"""The pattern of each method unless another is given."""
_ROWS_TOGETHER = 0.6
"""Up to this share of zeros rows are ranked together by what the loss loses with their outputs: measured as better at
0.5, and as far worse than rows of equal shares at 0.7 (docs/background/results.md)."""


@dataclass(frozen=True, slots=True)
class LayerRule:
    """A layer to prune, its pattern and its fraction of zeros."""

    target: Target
    pattern: Pattern
    sparsity: float
    grid: Grid | None = None
    """What kept weights are rounded to, by SparseGPT alone."""
    keeps_zeros: bool = False
    """Whether exactly the weights that are zero already are pruned, whatever the pattern."""
    swaps: int = 0
    """Passes of swaps that refine the method's mask, at most; 0: none."""
    has_own_share: bool = False
    """Whether an override says its fraction of zeros."""
    output_factors: Tensor | None = field(default=None, repr=False, compare=False)
    """(O,) fp32, above 0: how much a change of each output counts where rows are ranked together; None: all alike."""


def usual_pattern(method: Method, budgets: str, share: float) -> str:
    """Return the pattern of a ``method`` unless another is given, with ``share`` zeros in all.

    With ``budgets`` by saliency rows are ranked together up to 60 % of zeros, and have equal shares beyond.
    """
    if budgets == "saliency":
        return "matrix" if share <= _ROWS_TOGETHER else "row"
    return _METHOD_PATTERNS[method]


def settings_for(
    model: nn.Module,
    config: PSTConfig,
    method: Method,
    pattern: str = "",
    *,
    budgets: str = "equal",
    share: float = 0.0,
) -> PSTConfig:
    """``config`` with the pattern to prune by, for a ``model`` that has not the head of the run's task.

    ``pattern``: "" takes the config's, or :func:`usual_pattern` where the config has "matrix". Raises InputError for a
    pattern that there is not, or that does not go with the config.
    """
    chosen = pattern or (usual_pattern(method, budgets, share) if config.pattern == "matrix" else config.pattern)
    saved = config.modules_to_save
    if saved is not None:
        names = [name for name, _ in model.named_modules()]
        saved = tuple(one for one in saved if any(name_matches(name, (one,)) for name in names))
    try:
        return replace(config, pattern=chosen, modules_to_save=saved)
    except ValueError as error:
        raise InputError(f"--pattern {chosen}: {error}") from None


def share_of_zeros(settings: PSTConfig, asked: float | None, default: float) -> float:
    """The fraction of zeros of layers that no override names: ``asked``, or the pattern's only one, or ``default``.

    Raises InputError for one that is out of range, or that the pattern does not have.
    """
    fixed = parse_pattern(settings.pattern).fixed_sparsity
    if fixed is not None:
        if asked not in (None, fixed):
            raise InputError(f"--sparsity {asked}: pattern {settings.pattern} has {fixed} zeros; leave it out")
        return fixed
    share = default if asked is None else asked
    if not 0.0 <= share < 1.0:
        raise InputError(f"--sparsity {share} must be in [0, 1): it is the fraction of zeros")
    return share


def layer_rules(
    targets: Sequence[Target],
    method: Method,
    share: float,
    *,
    grid: Grid | None = None,
    keeps_zeros: bool = False,
    swaps: int = 0,
) -> list[LayerRule]:
    """The rules of all ``targets``, in their order; overrides have the last word on their layers.

    ``keeps_zeros``: no pattern and no override prunes anything. ``swaps``: passes, see :class:`LayerRule`. Raises
    InputError, naming the layer, for a pattern or a ``grid`` that does not fit it, or a pattern that the method, or
    swaps, do not have.
    """
    for target in targets:
        if grid is not None:
            _require_groups(target, grid)
    if keeps_zeros:
        return [LayerRule(target, Pattern("matrix"), 0.0, grid, keeps_zeros=True) for target in targets]
    return [replace(_rule(target, method, share, swaps), grid=grid) for target in targets]


def _require_groups(target: Target, grid: Grid) -> None:
    try:
        grid.num_groups(target.layout.in_features)
    except ValueError as error:
        raise InputError(
            f"{target.name}: {error}. Choose another --group, or leave the layer as it is with pst.exclude_modules"
        ) from None


def _rule(target: Target, method: Method, share: float, swaps: int) -> LayerRule:
    rule = target.rule
    if rule.pattern.pools_matrices:
        raise InputError(
            f'{target.name}: pattern "{rule.pattern}" ranks the weights of several matrices together, and one-shot '
            "pruning goes matrix by matrix; choose --pattern matrix, row or N:M"
        )
    if rule.pattern.kind == "block" and method == "sparsegpt":
        raise InputError(
            f"{target.name}: SparseGPT prunes by matrix, row or N:M, not in blocks of {rule.pattern}; choose another "
            "with --pattern, or --method alps"
        )
    if rule.pattern.kind == "block" and swaps:
        raise InputError(
            f"{target.name}: --swaps {swaps} swaps single weights, and pattern {rule.pattern} prunes whole blocks; "
            "leave --swaps out, or choose --pattern matrix, row or N:M"
        )
    try:
        rule.pattern.require_fit(target.layout)
    except ValueError as error:
        raise InputError(
            f"{target.name}: {error}. Leave it dense with pst.exclude_modules, or give it another pattern with "
            "pst.overrides"
        ) from None
    own = rule.final_sparsity
    return LayerRule(target, rule.pattern, share if own is None else own, swaps=swaps, has_own_share=own is not None)
