"""Run the trials of a search, each a short separate run, and record them in a file."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.run import ConfigError, PicturesConfig, RunConfig
from pst_ds.config.settings import OnResume, resume_rules
from pst_ds.config.toml import dump_run, flatten, is_removed
from pst_ds.config.train import RATES
from pst_ds.data.tasks import ExampleSet, Task
from pst_ds.file_names import CHECKPOINTS, RESULT_FILE, RUN_FILE, TRIALS, TUNE_FILE
from pst_ds.json_text import json_of
from pst_ds.parallel.engine import Engine, free_released
from pst_ds.parallel.ranks import all_gather_objects, is_main, raise_on_all_ranks
from pst_ds.parallel.stop_signals import StoppedError
from pst_ds.progress import Progress
from pst_ds.train import run_folder
from pst_ds.train.divergence import DivergedError
from pst_ds.train.evaluate import predict
from pst_ds.train.resume import as_table
from pst_ds.train.run import Splits, load_splits, run_stages, train_prepared
from pst_ds.train.run_context import RunContext
from pst_ds.train.tune.halving import Candidate, Outcome, Rung, candidates, chosen, promoted, rungs
from pst_ds.train.tune.report import Record

STANDARD_ERROR = "standard_error"
_DRAWS = 100


def search(context: RunContext, share: float, *, restart: bool = False) -> list[Record]:
    """Run the missing trials of a search; return all lines of tune.jsonl, the choice last. Collective. ``restart``
    discards the trials of an earlier search. Raises InputError, and StoppedError after a signal."""
    with run_folder.without_other_runs(Path(context.run.output_dir)):
        splits = load_splits(context)
        num_steps = context.run.num_steps(len(splits[0]))
        context = context.with_rates(splits[0])
        run, folder = context.run, Path(context.run.output_dir)
        has_head = not run.mask_method.trains_everything and (context.task.new_head or bool(run.pst.modules_to_save))
        tried = candidates(has_head=has_head)
        plan = rungs(num_steps, share, len(tried))
        head: Record = {
            "event": "search",
            "num_steps": num_steps,
            "share": share,
            "rungs": [asdict(rung) for rung in plan],
            "metric": run.metric,
            "lower_is_better": context.task.lower_is_better,
            "data_digest": splits[0].digest,
            "run": as_table(run),
        }
        lines = raise_on_all_ranks(partial(_read_lines, folder, json.loads(json_of(head)), restart))
        if lines[-1]["event"] != "choice":
            if is_main() and (restart or not (folder / TUNE_FILE).is_file()):
                shutil.rmtree(folder / TRIALS, ignore_errors=True)
                _write_lines(folder, lines)
            _write_run_file(folder, run)
            # all trials, and the run itself, start from the same model
            started = run_stages(context, splits, resume=True, restart=False, quiet=False)
            with Progress("tune", sum(rung.trials * rung.steps for rung in plan), "steps") as progress:
                best = _run_trials(started, splits, plan, tried, lines, progress)
            rates: dict[str, Any] = dict(best.rates(run.train))
            _write_run_file(folder, replace(run, train=replace(run.train, **rates)))
            _add(folder, lines, {"event": "choice", "trial": tried.index(best), **asdict(best), **rates})
        return lines


def _run_trials(
    context: RunContext,
    splits: Splits,
    plan: list[Rung],
    tried: tuple[Candidate, ...],
    lines: list[Record],
    progress: Progress,
) -> Candidate:
    """Run the trials that ``lines`` lacks, add them to it and to the file, and return the chosen candidate. The next
    trial depends only on the lines, so an interrupted search resumes."""
    folder, lower, outcomes = Path(context.run.output_dir), context.task.lower_is_better, list[Outcome]()
    for i, rung in enumerate(plan):
        names = list(range(rung.trials)) if i == 0 else promoted(outcomes, rung.trials, lower_is_better=lower)
        outcomes = []
        for name in names:
            line = next((of for of in lines if of["event"] == "trial" and (of["rung"], of["trial"]) == (i, name)), None)
            if line is None:
                line = {"event": "trial", "rung": i, "trial": name, **asdict(tried[name])}
                line |= _run_trial(context, splits, tried[name], rung.steps, lines[0]["num_steps"], f"{i}-{name}")
                line = _add(folder, lines, line)
            if is_main():
                shutil.rmtree(folder / TRIALS / f"{i}-{name}" / CHECKPOINTS, ignore_errors=True)
            outcomes.append(Outcome(name, math.nan if line["value"] is None else line["value"], line[STANDARD_ERROR]))
            progress.add(rung.steps, f"{tried[name]}: {context.run.metric} {outcomes[-1].value:.4g}")
    return tried[chosen(outcomes, lower_is_better=lower)]


def _read_lines(folder: Path, head: Record, restart: bool) -> list[Record]:
    """Return the existing lines of this search, at least ``head``. Raises ConfigError if the folder has another search,
    or a trained run."""
    path = folder / TUNE_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() and not restart else json_of(head)
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}. Start over with --restart") from None
    before, now = ({key.removeprefix("run."): value for key, value in flatten(of).items()} for of in (lines[0], head))
    may_change = resume_rules(RunConfig)
    for key in now | before:
        may_differ = may_change.get(key) is OnResume.MAY_DIFFER or is_removed(key)
        if before.get(key) != now.get(key) and not may_differ:
            raise ConfigError(
                f"{path} has the trials of another search: {key} = {before.get(key)!r} there, and {now.get(key)!r} "
                "now. Use the old value, a new search with --restart, or another output_dir"
            )
    is_trained = (folder / RESULT_FILE).exists() or (folder / CHECKPOINTS).exists()
    if lines[-1]["event"] != "choice" and is_trained:
        raise ConfigError(
            f"output_dir = {str(folder)!r} has a trained run, but a search comes before it. Name another folder with "
            "--set output_dir="
        )
    return lines


def _write_run_file(folder: Path, run: RunConfig) -> None:
    if is_main():
        write_text_atomic(folder / RUN_FILE, dump_run(run))


def _add(folder: Path, lines: list[Record], line: Record) -> Record:
    """Add a line to ``lines`` and to the file, and return it. Collective: all ranks use the line of rank 0."""
    lines.append(all_gather_objects(line)[0])
    if is_main():
        _write_lines(folder, lines)
    return lines[-1]


def _write_lines(folder: Path, lines: list[Record]) -> None:
    write_text_atomic(folder / TUNE_FILE, "".join(json_of(line) + "\n" for line in lines))


def trial_run(run: RunConfig, candidate: Candidate, steps: int, num_steps: int, folder: Path) -> RunConfig:
    """Return a run of ``num_steps`` shortened to ``steps``, with the rates of a candidate, and evaluated at its end.
    Masks are updated as often as in the whole run, if there are enough steps."""
    rates: dict[str, Any] = dict(candidate.rates(run.train, steps, num_steps))
    interval = max(1, round(run.schedule.update_interval * steps / num_steps))
    return replace(
        run,
        output_dir=str(folder),
        distillation=replace(run.distillation, teacher=run.teacher),
        train=replace(run.train, num_steps=steps, num_epochs=0.0, **rates),
        schedule=replace(run.schedule, update_interval=interval),
        eval=replace(run.eval, interval=-1),
        pictures=PicturesConfig(interval=-1),
        checkpoint=replace(run.checkpoint, keep_last=1),
    )


def _run_trial(
    context: RunContext, splits: Splits, candidate: Candidate, steps: int, num_steps: int, name: str
) -> Record:
    """Run one trial, or resume it. Collective."""
    run = trial_run(context.run, candidate, steps, num_steps, Path(context.run.output_dir) / TRIALS / name)
    line: Record = {"steps": steps, **{rate: getattr(run.train, rate) for rate in RATES}}
    failed: Record = {"value": None, STANDARD_ERROR: 0.0}
    try:
        result = train_prepared(
            replace(context, run=run), resume=True, quiet=True, splits=splits, evaluation=evaluate_with_error
        )
    except DivergedError:
        return line | failed
    except StoppedError as error:
        message = str(error).replace("continue with --resume", "the same command resumes it")
        raise StoppedError(f"trial {name}: {message}") from None
    finally:
        free_released()
    value, spread = result["metrics"][run.metric], result["metrics"][STANDARD_ERROR]
    measured = {"value": value, STANDARD_ERROR: spread} if math.isfinite(value) and math.isfinite(spread) else failed
    return line | measured | {"seconds": result["seconds"]}


def evaluate_with_error(engine: Engine, examples: ExampleSet, context: RunContext) -> dict[str, float]:
    """Compute the metrics, and the standard error of the run's metric. Collective."""
    engine.eval()
    task, run = context.task, context.run
    outcomes = predict(engine, context, examples)
    metrics = task.metrics(outcomes, examples)
    return {**metrics, STANDARD_ERROR: standard_error(task, outcomes, examples, run.metric)}


def standard_error(task: Task, outcomes: np.ndarray, examples: ExampleSet, metric: str) -> float:
    """Return the bootstrap standard error of a metric over the examples. Deterministic."""
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(outcomes), size=len(outcomes)) for _ in range(_DRAWS))
    return float(np.std([task.resampled_metrics(outcomes, examples, draw)[metric] for draw in draws], ddof=1))
