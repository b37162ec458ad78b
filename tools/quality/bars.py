"""What a grid's table is measured against: its ``[[bars]]``, computed from the lines.

kind = "within"      the method is at most ``points`` (of the metric in percent; nats of a loss, which perplexities are
                     compared by) below the best of ``against``
kind = "not-below"   the method is not below any of ``against`` by more than ``standard_errors`` of the difference
kind = "ahead-by"    the method is at least ``points`` (as above) ahead of each of ``against``
kind = "ahead"       the method is ahead of each of ``against`` by ``standard_errors`` of the differences seed by seed
kind = "won-back"    of the loss that the best of ``against`` adds to ``dense``, the method wins ``share`` back
kind = "left-out"    the try that is best on the other data sets' validation files is on the test file here at most
                     ``points`` below the one that is best on the validation file here
kind = "gap"         where ``upper`` is ahead of ``lower`` by more than ``standard_errors`` of the differences seed by
                     seed, the method is ``share`` of the way from ``lower`` to ``upper``
kind = "verified"    every export of the grid passed ``pst-ds verify``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools.quality.cells import Line, chosen, plan, tries_run
from tools.quality.grid import Grid, GridError, Table
from tools.quality.stats import Figure, figure, figure_of, lines_of, settings_text, test_names

KINDS: dict[str, frozenset[str]] = {
    "within": frozenset({"method", "sparsity", "against", "points"}),
    "not-below": frozenset({"method", "sparsity", "against", "standard_errors"}),
    "ahead-by": frozenset({"method", "sparsity", "against", "points"}),
    "ahead": frozenset({"method", "sparsity", "against", "standard_errors"}),
    "won-back": frozenset({"method", "sparsity", "against", "dense", "share"}),
    "left-out": frozenset({"method", "points"}),
    "gap": frozenset({"method", "sparsity", "lower", "upper", "standard_errors", "share"}),
    "verified": frozenset(),
}
_EVERY_KIND = frozenset({"title", "kind", "data_sets", "test"})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One bar on one data set."""

    title: str
    data_set: str
    measured: str
    met: bool | None
    """None while figures are missing."""


def check_bars(grid: Grid) -> None:
    """Raise GridError for a bar that cannot be computed, whatever the lines are."""
    for bar in grid.bars:
        title = bar.get("title", "a bar without title")
        kind = bar.get("kind")
        if kind not in KINDS:
            raise GridError(f"bars, {title!r}: kind = {kind!r} must be one of {', '.join(KINDS)}")
        wanted = KINDS[kind] | {"title"}
        wrong = sorted((wanted - bar.keys()) | (bar.keys() - wanted - _EVERY_KIND))
        if wrong:
            raise GridError(f"bars, {title!r}: {', '.join(wrong)} missing or not of kind {kind!r}")
        for name in [*map(bar.get, ("method", "dense", "lower", "upper")), *bar.get("against", [])]:
            if name is not None and name not in grid.methods:
                raise GridError(f"bars, {title!r}: {name!r} is not one of the methods {', '.join(grid.methods)}")
        if kind == "left-out" and (grid.search.run or len(grid.methods[bar["method"]].tries) < 2):
            raise GridError(f"bars, {title!r}: {bar['method']!r} needs tries that are whole runs (no [search.run])")
        for name in bar.get("data_sets", []):
            if name not in grid.data_sets:
                raise GridError(f"bars, {title!r}: {name!r} is not one of the data sets {', '.join(grid.data_sets)}")


def verdicts(grid: Grid, lines: Mapping[str, Line]) -> list[Verdict]:
    """Every bar on every data set that it is for."""
    found = []
    for bar in grid.bars:
        if bar["kind"] == "verified":
            found.append(_verified(grid, lines, bar))
            continue
        for data_set in bar.get("data_sets", grid.data_sets):
            found.append(_RULES[bar["kind"]](grid, lines, bar, data_set))
    return found


def _verified(grid: Grid, lines: Mapping[str, Line], bar: Table) -> Verdict:
    cells = {planned.cell.id for planned in plan(grid, lines) if planned.cell}
    exports = [line for key, line in lines.items() if key in cells and "verified" in line]
    passed = sum(line["verified"] for line in exports)
    said = f"{passed} of {len(exports)} exports"
    return Verdict(title=bar["title"], data_set="all", measured=said, met=passed == len(exports) if exports else None)


def _within(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    metric = _compared_by(grid)
    own, others = _figures(grid, lines, bar, data_set, metric)
    if own is None or not others or None in others.values():
        return _missing(bar, data_set, own, others)
    sign, (scale, unit) = -1 if grid.lower_is_better else 1, _unit(metric)
    below = scale * (max(sign * f.mean for f in others.values() if f) - sign * own.mean)
    shown = f"{abs(below):.2f}" if unit == "points" else f"{abs(below):.3g}"
    said = f"{shown} {unit} {'below' if below > 0 else 'above'}"
    return Verdict(title=bar["title"], data_set=data_set, measured=said, met=below <= bar["points"])


def _not_below(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    """One seed has no standard error, so no room below."""
    return _on_means(grid, lines, bar, data_set, lambda error: -bar["standard_errors"] * (error or 0.0))


def _ahead_by(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    scale, _ = _unit(_compared_by(grid))
    return _on_means(grid, lines, bar, data_set, lambda _: bar["points"] / scale)


def _on_means(
    grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str, wanted: Callable[[float | None], float]
) -> Verdict:
    """Is the method ahead of each of the others by what is ``wanted``, given the difference's standard error?
    Perplexities are compared by their logarithm, the loss."""
    metric = _compared_by(grid)
    own, others = _figures(grid, lines, bar, data_set, metric)
    if own is None or not others or None in others.values():
        return _missing(bar, data_set, own, others)
    said, met = [], True
    for name, other in others.items():
        assert other is not None
        ahead = other.mean - own.mean if grid.lower_is_better else own.mean - other.mean
        error = None if own.error is None or other.error is None else math.hypot(own.error, other.error)
        said.append(_ahead_text(metric, ahead, name, error))
        met = met and ahead >= wanted(error)
    return Verdict(title=bar["title"], data_set=data_set, measured="; ".join(said), met=met)


def _ahead(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    """Seeds fix batches and starts of factors, the same for all methods; those that both have are compared."""
    said, met = [], True
    for name in bar["against"]:
        difference = _seed_by_seed(grid, lines, bar, data_set, bar["method"], name)
        if difference is None or difference.error is None:
            words = f"not measured: two seeds of {bar['method']} and {name}"
            return Verdict(title=bar["title"], data_set=data_set, measured=words, met=None)
        ahead = _ahead_text(_compared_by(grid), difference.mean, name, difference.error)
        said.append(f"{ahead}, {difference.seeds} seeds")
        met = met and difference.mean > bar["standard_errors"] * difference.error
    return Verdict(title=bar["title"], data_set=data_set, measured="; ".join(said), met=met)


def _gap(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    """Where there is no gap that the seeds can tell from nothing, there is none to win back, and the bar is met."""
    lower, upper = bar["lower"], bar["upper"]
    gap = _seed_by_seed(grid, lines, bar, data_set, upper, lower)
    own = _seed_by_seed(grid, lines, bar, data_set, bar["method"], lower)
    if gap is None or gap.error is None or own is None:
        words = f"not measured: two seeds of {lower}, {upper} and {bar['method']}"
        return Verdict(title=bar["title"], data_set=data_set, measured=words, met=None)
    said = f"{upper} is {_ahead_text(_compared_by(grid), gap.mean, lower, gap.error)}, {gap.seeds} seeds"
    if gap.mean <= bar["standard_errors"] * gap.error:
        return Verdict(title=bar["title"], data_set=data_set, measured=f"{said}: no gap", met=True)
    share = own.mean / gap.mean
    said += f"; {bar['method']} is {share:.0%} of the way"
    return Verdict(title=bar["title"], data_set=data_set, measured=said, met=share >= bar["share"])


def _seed_by_seed(
    grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str, name: str, other: str
) -> Figure | None:
    """How far a method is ahead of another, over the seeds that both have."""
    metric, sign = _compared_by(grid), 1 if grid.lower_is_better else -1
    own, theirs = (_by_seed(grid, lines, bar, data_set, of, metric) for of in (name, other))
    return figure_of([sign * (theirs[seed] - own[seed]) for seed in sorted(own.keys() & theirs.keys())])


def _by_seed(
    grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str, method: str, metric: str
) -> dict[int, float]:
    test = bar.get("test", "") or test_names(grid, data_set)[0]
    cells = lines_of(grid, lines, data_set, method, bar["sparsity"])
    return {line["seed"]: line["tests"][test][metric] for line in cells}


def _compared_by(grid: Grid) -> str:
    return "loss" if grid.metric == "perplexity" else grid.metric


def _unit(metric: str) -> tuple[float, str]:
    """What a difference of the metric is multiplied by to be shown, and is then called."""
    return (1.0, "nats") if metric == "loss" else (100.0, "points")


def _ahead_text(metric: str, ahead: float, name: str, error: float | None) -> str:
    scale, unit = _unit(metric)
    side = "ahead of" if ahead >= 0 else "behind"
    return f"{abs(scale * ahead):.3g} {unit} {side} {name} ({_error_text(error, scale)})"


def _error_text(error: float | None, scale: float) -> str:
    return "one seed: no standard error" if error is None else f"standard error {scale * error:.2g}"


def _won_back(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    own, others = _figures(grid, lines, bar, data_set, "loss")
    dense = _figure_at(grid, lines, data_set, bar["dense"], bar["sparsity"], bar.get("test", ""), "loss")
    if own is None or dense is None or not others or None in others.values():
        return _missing(bar, data_set, own, {**others, bar["dense"]: dense})
    name, best = min(((n, f.mean) for n, f in others.items() if f), key=lambda pair: pair[1])
    added = best - dense.mean
    if added <= 0:
        return Verdict(title=bar["title"], data_set=data_set, measured=f"{name} adds no loss to dense", met=None)
    share = (best - own.mean) / added
    said = f"{share:.0%} of the {added:.3f} nats that {name} adds"
    return Verdict(title=bar["title"], data_set=data_set, measured=said, met=share >= bar["share"])


def _left_out(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> Verdict:
    method, test = bar["method"], bar.get("test", "") or test_names(grid, data_set)[0]
    best, taken = chosen(grid, lines, data_set, method), _best_elsewhere(grid, lines, bar, data_set)
    if best is None or taken is None:
        return Verdict(title=bar["title"], data_set=data_set, measured=f"not measured: tries of {method}", met=None)
    here = [line["tests"][test][grid.metric] for line in tries_run(grid, lines, data_set, method) if line]
    below = 100 * (here[best] - here[taken]) * (-1 if grid.lower_is_better else 1)
    tried = settings_text(grid.methods[method].tries[taken])
    said = f"{abs(below):.2f} points {'below' if below > 0 else 'above'}, by {tried}"
    return Verdict(title=bar["title"], data_set=data_set, measured=said, met=below <= bar["points"])


def _best_elsewhere(grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str) -> int | None:
    """The try that is least below the best of each other data set, on average; None while some have not been run."""
    sign, losses = -1 if grid.lower_is_better else 1, []
    for name in bar.get("data_sets", grid.data_sets):
        run = tries_run(grid, lines, name, bar["method"])
        if any(line is None or line["outcome"] != "done" for line in run):
            return None
        if name != data_set:
            values = [sign * line["validation"][grid.metric] for line in run if line]
            losses.append([max(values) - value for value in values])
    totals = [sum(of_try) for of_try in zip(*losses, strict=True)]
    return totals.index(min(totals)) if totals else None


_RULES = {
    "within": _within, "not-below": _not_below, "ahead-by": _ahead_by, "ahead": _ahead, "won-back": _won_back,
    "left-out": _left_out, "gap": _gap,
}  # fmt: skip


def _figures(
    grid: Grid, lines: Mapping[str, Line], bar: Table, data_set: str, metric: str
) -> tuple[Figure | None, dict[str, Figure | None]]:
    """Of the bar's method, and of those it is measured against."""
    test = bar.get("test", "")
    own = figure(grid, lines, data_set, bar["method"], bar["sparsity"], test, metric)
    others = {n: _figure_at(grid, lines, data_set, n, bar["sparsity"], test, metric) for n in bar["against"]}
    return own, others


def _figure_at(
    grid: Grid, lines: Mapping[str, Line], data_set: str, method: str, sparsity: str, test: str, metric: str
) -> Figure | None:
    """At ``sparsity``, or of a method that is not run there at its only one."""
    sparsities = grid.sparsities_of(grid.methods[method])
    return figure(grid, lines, data_set, method, sparsity if sparsity in sparsities else sparsities[0], test, metric)


def _missing(bar: Table, data_set: str, own: Figure | None, others: Mapping[str, Figure | None]) -> Verdict:
    names = [name for name, found in {bar["method"]: own, **others}.items() if found is None]
    said = f"not measured: {', '.join(names)}"
    return Verdict(title=bar["title"], data_set=data_set, measured=said, met=None)
