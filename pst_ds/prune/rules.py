"""Rules of one-shot pruning: pattern and sparsity of every layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from pst_ds.config.methods import OneShotMethod as Method
from pst_ds.config.pst import PSTConfig, name_matches
from pst_ds.core.fractions import percent_hint
from pst_ds.core.patterns import Pattern, parse_pattern
from pst_ds.core.quantization import Grid
from pst_ds.errors import InputError
from pst_ds.nn.targets import Target
from pst_ds.prune.blocks import block_of

_METHOD_PATTERNS: dict[Method, str] = {"magnitude": "matrix", "wanda": "row", "sparsegpt": "row", "alps": "row"}
"""Default pattern of each method."""
_MAX_SPARSITY_OF_MATRIX = 0.6
"""Up to this sparsity, budgets by saliency rank all rows of a matrix together: measured as better at 0.5, and as far
worse than equal sparsity per row at 0.7 (docs/background/results.md)."""


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Settings to prune one layer."""

    target: Target
    pattern: Pattern
    sparsity: float
    grid: Grid | None = None
    """Quantisation of the kept weights; only SparseGPT supports it."""
    keeps_zeros: bool = False
    """True to prune exactly the weights that are zero already, regardless of the pattern."""
    has_own_sparsity: bool = False
    """True if an override sets its sparsity."""
    output_factors: Tensor | None = field(default=None, repr=False, compare=False)
    """(O,) fp32, positive: weight of each row where rows are ranked together; None weighs them equally."""


def rules_by_block(rules: Sequence[LayerRule], stack: str) -> dict[int, list[LayerRule]]:
    """Return the rules of each block of ``stack``, by its index."""
    by_block: dict[int, list[LayerRule]] = {}
    for rule in rules:
        by_block.setdefault(block_of(rule.target.name, stack), []).append(rule)
    return by_block


def usual_pattern(method: Method, budgets: str, share: float) -> str:
    """Return the default pattern of a ``method`` at sparsity ``share``; see ``_MAX_SPARSITY_OF_MATRIX``."""
    if budgets == "saliency":
        return "matrix" if share <= _MAX_SPARSITY_OF_MATRIX else "row"
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
    """Return ``config`` with the pattern to prune with, for a ``model`` without the head of the run's task.

    ``pattern``: "" uses the config's, or :func:`usual_pattern` if that ranks the weights of a matrix or of several.
    Raises InputError for an unknown pattern, or one that conflicts with the config.
    """
    chosen = pattern
    if not chosen:
        chosen = config.pattern
        # One-shot methods prune one matrix after another, and most are better row by row.
        if chosen in ("matrix", "stack", "global"):
            chosen = usual_pattern(method, budgets, share)
    saved_modules = config.modules_to_save
    if saved_modules is not None:
        # The config may name the task's head, which this model does not have.
        names = [name for name, _ in model.named_modules()]
        present: list[str] = []
        for saved in saved_modules:
            if any(name_matches(name, (saved,)) for name in names):
                present.append(saved)
        saved_modules = tuple(present)
    try:
        return replace(config, pattern=chosen, modules_to_save=saved_modules)
    except ValueError as error:
        raise InputError(f'pattern = "{chosen}": {error}') from None


def requested_sparsity(settings: PSTConfig, asked: float | None, default: float) -> float:
    """Return the sparsity of layers without an override: ``asked``, or that of an N:M pattern, or ``default``.

    Raises InputError if it is out of range, or the pattern has another one.
    """
    fixed = parse_pattern(settings.pattern).fixed_sparsity
    # N:M prunes 1 - N / M of every group
    if fixed is not None:
        if asked not in (None, fixed):
            raise InputError(
                f"sparsity = {asked}: pattern {settings.pattern} has sparsity {fixed}. Set sparsity = {fixed}"
            )
        return fixed
    share = default
    if asked is not None:
        share = asked
    if not 0.0 <= share < 1.0:
        hint = percent_hint(share)
        raise InputError(f"sparsity = {share} must be in [0, 1): it is the fraction of pruned weights{hint}")
    return share


def layer_rules(
    targets: Sequence[Target], method: Method, share: float, *, grid: Grid | None = None, keeps_zeros: bool = False
) -> list[LayerRule]:
    """Return the rules of all ``targets``, in their order. Overrides take precedence over sparsity ``share``.

    ``keeps_zeros``: prune exactly the weights that are zero; pattern and overrides have no effect. Raises InputError,
    naming the layer, for a pattern or quantisation that does not fit the layer or the method.
    """
    for target in targets:
        try:
            if grid is not None:
                grid.num_groups(target.layout.in_features)
        except ValueError as error:
            raise InputError(
                f"{target.name}: {error}. Choose another group, or exclude the layer with pst.exclude_modules"
            ) from None
    rules: list[LayerRule] = []
    for target in targets:
        if keeps_zeros:
            rule = LayerRule(target=target, pattern=Pattern("matrix"), sparsity=0.0, grid=grid, keeps_zeros=True)
        else:
            rule = replace(_rule(target, method, share), grid=grid)
        rules.append(rule)
    return rules


def names_of(rules: Iterable[LayerRule]) -> list[str]:
    """Return the names of the layers, in the order of their rules."""
    return [rule.target.name for rule in rules]


def _rule(target: Target, method: Method, share: float) -> LayerRule:
    """Return the rule of a layer. Raises InputError, naming it, for a pattern that does not fit it or the method."""
    rule = target.rule
    if rule.pattern.kind == "experts":
        raise InputError(f'{target.name}: pattern "experts" removes whole experts. Set method = "reap"')
    if rule.pattern.pools_matrices:
        raise InputError(
            f'{target.name}: pattern "{rule.pattern}" ranks the weights of several matrices together, but one-shot '
            'pruning goes matrix by matrix. Set pattern = "matrix", "row" or "2:4"'
        )
    if rule.pattern.kind == "block" and method == "sparsegpt":
        raise InputError(
            f"{target.name}: SparseGPT prunes by matrix, row or N:M, not in blocks of {rule.pattern}. Choose another "
            'pattern, or set method = "alps"'
        )
    try:
        rule.pattern.require_fit(target.layout)
    except ValueError as error:
        raise InputError(
            f"{target.name}: {error}. Leave it dense with pst.exclude_modules, or give it another pattern with "
            "pst.overrides"
        ) from None
    overridden = rule.final_sparsity
    if overridden is not None:
        share = overridden
    return LayerRule(target=target, pattern=rule.pattern, sparsity=share, has_own_sparsity=overridden is not None)
