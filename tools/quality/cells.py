"""Cells of a grid, the order in which they run, and their results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.methods import METHODS
from pst_ds.errors import InputError
from tools.quality.grid import Grid, Method, Table, laid_over, sparsity_settings

Line = dict[str, Any]
Kind = Literal["search", "cell"]
State = Literal["to do", "waits", "done", "failed", "over budget"]
FIXED_MASK = frozenset(name for name, method in METHODS.items() if method.masks == "fixed")
"""Methods of the run file whose mask exists before training."""


class LinesError(InputError):
    """A damaged results file."""


class Lines:
    """The results of a grid, tools/quality/logs/results/NAME.jsonl: a line per finished cell."""

    def __init__(self, path: Path):
        self.path = path
        self.by_id = _read(path)

    def put(self, line: Line) -> None:
        """Add a line, or replace the one with its id. A crash leaves the old file or the new one.

        Lines that others have added meanwhile stay, unless two processes write at the same moment.
        """
        self.by_id = {**_read(self.path), line["id"]: line}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path, "".join(json.dumps(kept, sort_keys=True) + "\n" for kept in self.by_id.values()))


def _read(path: Path) -> dict[str, Line]:
    """Return the lines of a results file by id; none of a missing one. Raises LinesError."""
    found: dict[str, Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            line = json.loads(text)
            found[line["id"]] = line
        except (ValueError, KeyError, TypeError):
            raise LinesError(f"{path}, line {number}, is not a result. Remove it: {text[:80]!r}") from None
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """A pruned folder or a teacher that is made before a cell."""

    settings: Table
    prune: Table = field(default_factory=dict)
    """Options of ``pst-ds prune``. Without them the settings are trained and exported dense."""

    @property
    def id(self) -> str:
        return digest({"settings": self.settings, "prune": self.prune})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run or an evaluation."""

    kind: Kind
    data_set: str
    method: str
    sparsity: str
    seed: int
    attempt: int | None
    """Number of the method's try, from 0; None without tries."""
    settings: Table
    """Settings of the run file, without output_dir and what the steps set."""
    tests: dict[str, str]
    train: bool
    shallow: str = ""
    base: Step | None = None
    teacher: Step | None = None
    reference: str = ""
    """Model folder from which the KL divergence is measured."""

    @property
    def name(self) -> str:
        if self.kind == "search":
            return f"{self.data_set}/{self.method}/search/{self.attempt}"
        return f"{self.data_set}/{self.method}/{self.sparsity}/{self.seed}"

    @property
    def id(self) -> str:
        """Hash of everything that determines the result. A try of the search can thus be the cell that needs it."""
        steps = {name: step and step.id for name, step in (("base", self.base), ("teacher", self.teacher))}
        others = {name: value for name in ("shallow", "reference") if (value := getattr(self, name))}
        return digest({"settings": self.settings, "tests": self.tests, "train": self.train, **steps, **others})


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell of the grid and its state; ``cell`` is None while it waits for a search."""

    name: str
    data_set: str
    method: str
    state: State
    cell: Cell | None = None

    @property
    def is_search(self) -> bool:
        return "/search/" in self.name


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(grid: Grid, lines: Mapping[str, Line]) -> list[Planned]:
    """Return every cell in the order to run them: all tries, then one seed of everything, then the next seed.

    The table is balanced wherever the runner is stopped.
    """
    searched = grid.search.data_sets or tuple(grid.data_sets)
    found = []
    for attempt in range(max((len(m.tries) for m in grid.methods.values()), default=0)):
        for data_set in searched:
            for method in grid.methods_of(data_set):
                if method.tries:
                    place = (data_set, method.name, grid.search_sparsity(method), grid.search.seed)
                    found.append(_planned(grid, lines, "search", *place, attempt))
    seeds = list(dict.fromkeys(seed for m in grid.methods.values() for seed in grid.seeds_of(m)))
    sparsities = list(dict.fromkeys(s for m in grid.methods.values() for s in grid.sparsities_of(m)))
    for seed in seeds:
        for sparsity in sparsities:
            for data_set in grid.data_sets:
                for method in grid.methods_of(data_set):
                    if seed in grid.seeds_of(method, sparsity) and sparsity in grid.sparsities_of(method, data_set):
                        found.append(_planned(grid, lines, "cell", data_set, method.name, sparsity, seed, None))
    return found


def _planned(
    grid: Grid, lines: Mapping[str, Line], kind: Kind, data_set: str, method: str, sparsity: str, seed: int,
    attempt: int | None,
) -> Planned:  # fmt: skip
    cell = cell_of(grid, lines, kind, data_set, method, sparsity, seed, attempt)
    if cell is None:
        return Planned(name=f"{data_set}/{method}/{sparsity}/{seed}", data_set=data_set, method=method, state="waits")
    return Planned(
        name=cell.name, data_set=data_set, method=method, state=state_of(grid, lines.get(cell.id)), cell=cell
    )


def state_of(grid: Grid, line: Line | None) -> State:
    """Return the state of a cell with this line. A cell that exceeded a smaller budget than the grid's runs again."""
    if line is None or (line["outcome"] == "over budget" and line["budget_cpu_seconds"] < grid.cpu_seconds):
        return "to do"
    outcome: State = line["outcome"]
    return outcome


def cell_of(
    grid: Grid, lines: Mapping[str, Line], kind: Kind, data_set: str, method: str, sparsity: str, seed: int,
    attempt: int | None = None,
) -> Cell | None:  # fmt: skip
    """Return a cell with all its settings; None while a search that it needs is not done.

    ``attempt`` is the number of the try; None is the chosen one.
    """
    row = grid.methods[method]
    source = grid.methods[row.tries_of] if row.tries_of else row
    if attempt is None and source.tries:
        attempt = chosen(grid, lines, data_set, source.name)
        if attempt is None:
            return None
    teacher = None
    if row.teacher:
        trained = cell_of(grid, lines, "cell", data_set, row.teacher, "0", seed)
        if trained is None:
            return None
        teacher = Step(settings=trained.settings)
    tries = source.tries[attempt] if attempt is not None else {}
    given = (grid.run, grid.data_sets[data_set].run, sparsity_settings(sparsity))
    shorter = grid.search.run if kind == "search" else {}
    settings = laid_over(*given, row.run, tries, row.at.get(sparsity, {}), shorter, grid.overrides, _seeds(seed))
    reference = grid.data_sets[data_set].reference or grid.reference
    tests = grid.data_sets[data_set].tests or {"test": settings.get("data", {}).get("test", "")}
    settings = laid_over(settings, {"data": {"test": next(iter(tests.values()))}})
    if shorter:
        tests, reference = {}, ""  # not a cell of the table: the validation file decides which try is best
    base = None
    if row.base:
        options = {key: value for key, value in row.base.items() if key != "run"}
        base = Step(
            settings=untrained(laid_over(*given, row.base.get("run", {}), grid.overrides)),
            prune={"seed": 0, "sparsity": sparsity, **options},
        )
        if settings.get("method") in FIXED_MASK and "initial_mask" not in settings.get("pst", {}):
            settings = laid_over(settings, {"pst": {"initial_mask": "zeros"}})
    settings = settings if row.train else untrained(settings)
    return Cell(
        kind=kind, data_set=data_set, method=method, sparsity=sparsity, seed=seed, attempt=attempt, settings=settings,
        tests=tests, train=row.train, shallow=row.shallow, base=base, teacher=teacher, reference=reference,
    )  # fmt: skip


def untrained(settings: Table) -> Table:
    """Return the settings that an untrained model depends on, so that others do not change the cell's id."""
    kept: Table = {key: settings[key] for key in ("task", "model", "data", "eval", "pst") if key in settings}
    parts = (("schedule", "final_sparsity"), ("train", "precision"))
    found = {table: {key: settings[table][key]} for table, key in parts if key in settings.get(table, {})}
    return laid_over(kept, found, {"train": {"num_steps": 1}})  # a run file needs some


def _seeds(seed: int) -> Table:
    """Return the seeds of batches and head, and of the factors."""
    return {"seed": seed, "pst": {"seed": seed}}


def chosen(grid: Grid, lines: Mapping[str, Line], data_set: str, method: str) -> int | None:
    """Return the try of a method that is best on the validation file; None until every try has run.

    Of equal tries the first is chosen. Tries that failed or exceeded the budget are not chosen.
    """
    tries = tries_run(grid, lines, data_set, method)
    if any(line is None or state_of(grid, line) == "to do" for line in tries):
        return None
    values = {i: line["validation"][grid.metric] for i, line in enumerate(tries) if line and line["outcome"] == "done"}
    values = {i: value for i, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    sign = 1 if grid.lower_is_better else -1
    return min(values, key=lambda i: (sign * values[i], i))


def tries_run(grid: Grid, lines: Mapping[str, Line], data_set: str, method: str) -> list[Line | None]:
    """Return the line of each try that counts for a data set; None for tries that have not run."""
    row: Method = grid.methods[method]
    place = (grid.searched_data_set(data_set), method, grid.search_sparsity(row), grid.search.seed)
    cells = [cell_of(grid, lines, "search", *place, attempt) for attempt in range(len(row.tries))]
    return [None if cell is None else lines.get(cell.id) for cell in cells]
