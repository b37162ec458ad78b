"""Read a grid of methods x sparsities x seeds x data sets from a TOML file.

Tables called ``run`` hold settings of the run file. Later ones override earlier ones: the grid's, the data set's, the
sparsity's, the method's, the try's, the method's for that sparsity, and those of the command line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from pst_ds.errors import InputError

Table = dict[str, Any]
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "byte_perplexity", "bits_per_byte"})
_CONFIG = ConfigDict(strict=True, extra="forbid")
_SPARSITY = re.compile(r"0|0\.\d+|\d+:\d+")
_BASE = ("prune", "samples", "seed", "pattern", "reconstruct", "sparsity", "run")


class GridError(InputError):
    """A wrong grid file."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class DataSet:
    """A corpus that every method runs on."""

    name: str
    title: str
    make: tuple[str, ...] = ()
    """Names of what tools/quality/texts.py makes for it."""
    run: Table = field(default_factory=dict)
    sparsities: tuple[str, ...] = ()
    """Subset of the methods' sparsities; default all."""
    tests: dict[str, str] = field(default_factory=dict)
    """Test files by name; default {"test": data.test}. The first is the run's data.test, on which exports are
    verified.
    """
    reference: str = ""
    """Folder of a model of the data set, in place of the grid's ``reference``."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Method:
    """A row of the tables."""

    name: str
    title: str
    train: bool = True
    """Whether to train. Otherwise the base model, or the result of ``base``, is evaluated."""
    run: Table = field(default_factory=dict)
    at: dict[str, Table] = field(default_factory=dict)
    """Additional settings for some sparsities."""
    tries: tuple[Table, ...] = ()
    """Settings that the search chooses from; the same number for each method with tries."""
    untuned: bool = False
    """Whether the method runs with default settings, without tries."""
    tries_of: str = ""
    """Method whose chosen try is used, for variants of it."""
    sparsities: tuple[str, ...] = ()
    """Sparsities; "0" for a dense method; default the grid's."""
    seeds: tuple[int, ...] = ()
    """Seeds; default the grid's."""
    data_sets: tuple[str, ...] = ()
    """Data sets; default all."""
    base: Table = field(default_factory=dict)
    """Pruning before the cell: {prune = "wanda", samples = 128, seed = 0, pattern = "", reconstruct = 0, sparsity = "",
    run = {}}. ``pst-ds prune`` runs with the grid's settings and those of ``run``, to the cell's sparsity by default.
    The result is the cell's base model; methods with a fixed mask keep its sparsity.
    """
    shallow: str = ""
    """Kind of a classifier without a transformer (tools/quality/shallow.py), which is trained instead of a run."""
    teacher: str = ""
    """Dense method, trained first with the cell's seed, whose export is distillation.teacher."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Search:
    """How the tries run: once each, at one sparsity and seed. The best on the validation file is chosen."""

    sparsity: str
    """Sparsity of the tries. A method with only one other sparsity is searched at that one."""
    seed: int = 0
    data_sets: tuple[str, ...] = ()
    """Data sets that are searched; default each. The others use the choice of the first."""
    run: Table = field(default_factory=dict)
    """Settings of only these runs, such as fewer steps. They override all others."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Files:
    """Additional exports of a finished cell, for a table of metrics and bytes."""

    export: dict[str, list[str]] = field(default_factory=dict)
    """Options of ``pst-ds export`` by name, without the format: bitmask for sparse cells, otherwise dense."""
    peers: tuple[str, ...] = ()
    """Files of other programs for dense methods; see run_cell.py."""
    data_sets: tuple[str, ...] = ()
    """Data sets; default all."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Grid:
    """All cells of one table."""

    name: str
    title: str
    about: str = ""
    """Paragraph for the page."""
    metric: str
    """Metric that is shown, and by which a try is chosen."""
    cpu_seconds: float
    """Budget of a cell with its evaluations. Preceding steps, such as pruning, have the same budget again."""
    sparsities: tuple[str, ...]
    seeds: tuple[int, ...]
    seeds_at: dict[str, list[int]] = field(default_factory=dict)
    """Subsets of the seeds by sparsity."""
    search: Search
    run: Table = field(default_factory=dict)
    data_sets: dict[str, DataSet] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    verify_examples: int = 0
    """Examples of the test on which an export is compared with the masked model; 0 is all, whose metrics are then the
    cell's.
    """
    files: Files = Files()
    reference: str = ""
    """Folder of a model from which the KL divergence of every cell is measured on every test."""
    overrides: Table = field(default_factory=dict)
    """Settings from the command line."""
    path: str = ""

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    def sparsities_of(self, method: Method, data_set: str = "") -> tuple[str, ...]:
        """Return the sparsities of a method, on one data set or on any."""
        some = self.data_sets[data_set].sparsities if data_set else ()
        return tuple(s for s in method.sparsities or self.sparsities if not some or s in some)

    def seeds_of(self, method: Method, sparsity: str = "") -> tuple[int, ...]:
        """Return the seeds of a method's cells, at one sparsity or at any."""
        seeds = method.seeds or self.seeds
        return tuple(seed for seed in seeds if seed in self.seeds_at.get(sparsity, seeds))

    def methods_of(self, data_set: str) -> list[Method]:
        return [m for m in self.methods.values() if not m.data_sets or data_set in m.data_sets]

    def search_sparsity(self, method: Method) -> str:
        """Return the sparsity of a method's tries."""
        own = self.sparsities_of(method)
        return self.search.sparsity if self.search.sparsity in own else own[0]

    def searched_data_set(self, data_set: str) -> str:
        """Return the data set whose search counts for ``data_set``."""
        searched = self.search.data_sets or tuple(self.data_sets)
        return data_set if data_set in searched else searched[0]


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid from a TOML file. Raises GridError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"grid {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"{path} is not TOML: {error}") from None
    try:
        return grid_from_table({"name": path.stem, **table}, overrides, str(path))
    except GridError as error:
        raise GridError(f"{path}: {error}") from None


def grid_from_table(table: Table, overrides: Sequence[str] = (), path: str = "") -> Grid:
    """Build a grid from nested tables. Raises GridError."""
    named = {
        part: {name: {"title": name, **inner, "name": name} for name, inner in table.get(part, {}).items()}
        for part in ("data_sets", "methods")
    }
    whole = {**table, **named, "overrides": nested(overrides), "path": path}
    try:
        # JSON, in which strict pydantic accepts lists for tuples
        grid = TypeAdapter(Grid).validate_json(json.dumps(whole, default=str))
    except ValidationError as error:
        raise GridError("; ".join(map(_problem, error.errors(include_url=False)))) from None
    _check(grid)
    return grid


def nested(settings: Sequence[str]) -> Table:
    """Return settings such as "train.num_steps=8" as nested tables; values as in TOML, or strings."""
    table: Table = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise GridError(f"--set {setting!r} must have the form key=value, such as train.num_steps=8")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        table = laid_over(table, value)
    return table


def laid_over(*tables: Table) -> Table:
    """Merge nested tables; later ones override earlier ones."""
    result: Table = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = laid_over(result[key], value) if both else value
    return result


def sparsity_settings(sparsity: str) -> Table:
    """Return the run settings of a sparsity such as "0.9" or "2:4"; none for "0"."""
    if sparsity == "0":
        return {}
    if ":" not in sparsity:
        return {"schedule": {"final_sparsity": float(sparsity)}}
    return {"pst": {"pattern": sparsity}, "schedule": {"final_sparsity": zeros(sparsity)}}


def zeros(sparsity: str) -> float:
    """Return the sparsity of "0.9" or "2:4" as a number."""
    kept, _, of = sparsity.partition(":")
    return 1.0 - int(kept) / int(of) if of else float(sparsity)


def _check(grid: Grid) -> None:
    if grid.cpu_seconds <= 0:
        raise GridError(f"cpu_seconds = {grid.cpu_seconds} must be above 0")
    for where, sparsities in [("", grid.sparsities), *((m.name, m.sparsities) for m in grid.methods.values())]:
        for sparsity in sparsities:
            if not _SPARSITY.fullmatch(sparsity):
                at = f"methods.{where}." if where else ""
                raise GridError(f'{at}sparsities: {sparsity!r} must be a share such as "0.9", or N:M such as "2:4"')
    _require_known(grid.seeds_at, grid.sparsities, "seeds_at")
    for sparsity, seeds in grid.seeds_at.items():
        _require_known(seeds, grid.seeds, f"seeds_at.{sparsity}")
    if not grid.methods or not grid.data_sets:
        raise GridError("[data_sets.NAME] and [methods.NAME] are needed, at least one of each")
    numbers = {len(m.tries) for m in grid.methods.values() if m.tries}
    if len(numbers) > 1:
        counts = ", ".join(f"{m.name} {len(m.tries)}" for m in grid.methods.values() if m.tries)
        raise GridError(f"every method must have the same number of tries: {counts}")
    _require_known(grid.search.data_sets, grid.data_sets, "search.data_sets")
    _require_known(grid.files.data_sets, grid.data_sets, "files.data_sets")
    for method in grid.methods.values():
        _check_method(grid, method)


def _check_method(grid: Grid, method: Method) -> None:
    where = f"methods.{method.name}"
    if method.untuned and (method.tries or method.tries_of):
        raise GridError(f"{where} is untuned, so it can have no tries or tries_of")
    if method.train and not (method.untuned or method.shallow or method.tries or method.tries_of):
        raise GridError(f"{where} has no tries; give it as many as the others have, or tries_of another method")
    if method.tries and method.tries_of:
        raise GridError(f"{where} has tries and tries_of; leave one of them out")
    if not method.train and (method.tries or method.tries_of or method.teacher):
        raise GridError(f"{where} has train = false, so it can have no tries, tries_of or teacher")
    _require_known([n for n in (method.tries_of, method.teacher) if n], grid.methods, f"{where}.tries_of or teacher")
    _require_known(method.data_sets, grid.data_sets, f"{where}.data_sets")
    if method.tries_of and not grid.methods[method.tries_of].tries:
        raise GridError(f"{where}.tries_of = {method.tries_of!r} names a method without its own tries")
    source = grid.methods[method.tries_of] if method.tries_of else method
    searches = method.train and not method.untuned and not method.shallow
    for data_set in (name for name in grid.data_sets if searches and name in (method.data_sets or grid.data_sets)):
        searched = grid.searched_data_set(data_set)
        if searched not in (source.data_sets or grid.data_sets):
            raise GridError(
                f"{where} needs the tries of {source.name!r} on {searched!r}, which its data_sets leave out"
            )
    own = grid.sparsities_of(method)
    if method.tries and grid.search.sparsity not in own and len(own) > 1:
        raise GridError(f"{where}.sparsities lacks search.sparsity = {grid.search.sparsity!r}, where tries are run")
    if method.teacher and grid.sparsities_of(grid.methods[method.teacher]) != ("0",):
        raise GridError(f'{where}.teacher = {method.teacher!r} must be a method with sparsities = ["0"]')
    _require_known(method.at, own, f"{where}.at")
    _require_known(method.base, _BASE, f"{where}.base")
    if method.base and "prune" not in method.base:
        raise GridError(f'{where}.base must say how to prune, such as base = {{prune = "wanda"}}')


def _require_known(names: Any, known: Any, where: str) -> None:
    for name in names:
        if name not in known:
            raise GridError(f"{where}: {name!r} is not one of {', '.join(map(str, known))}")


def _problem(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}"
    return f"{key!r} is missing" if error["type"] == "missing" else f"{key} = {error['input']!r}: {error['msg']}"
