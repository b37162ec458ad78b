"""Report a run to Weights & Biases, MLflow and trackio."""

import json
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.run import ConfigError, TrackingConfig
from pst_ds.errors import first_line

IDS_FILE = "trackers.json"
"""File in the run folder with each tracker's id of the run."""
_PARAMETERS_AT_A_TIME = 100
"""Maximum parameters per call of MLflow."""


class Tracker(NamedTuple):
    """A run that was started with one tracker."""

    id: str
    log: Callable[[dict[str, float], int], object]
    """Send numbers of a step."""
    finish: Callable[[], object]


class Trackers:
    """The trackers of one run. One that fails after its start is dropped with a warning; the run continues.

    A resumed run continues the same run of each tracker, by the ids in its folder; a new one has the ``settings``.
    Raises ConfigError for a tracker that does not start.
    """

    def __init__(self, config: TrackingConfig, folder: Path, settings: Mapping[str, object], *, goes_on: bool):
        self._started: dict[str, Tracker] = {}
        path = folder / IDS_FILE
        name = config.name or folder.name
        known: dict[str, str] = {}
        if goes_on and path.is_file():
            known = json.loads(path.read_text("utf-8"))
        ids: dict[str, str] = {}
        for kind in config.to:
            try:
                tracker = _KINDS[kind](config.project, name, known.get(kind, ""), settings)
            except Exception as error:  # each library raises different exceptions
                # those that have started would otherwise show a run in progress
                self.close()
                raise ConfigError(
                    f"tracking.to names {kind}, which does not start: {first_line(error)}. Log in, set its offline "
                    "mode (docs/how-to/monitor.md), or remove it"
                ) from error
            self._started[kind] = tracker
            ids[kind] = tracker.id
        write_text_atomic(path, json.dumps(ids, indent=1) + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of ``step`` to all trackers."""
        for kind, tracker in list(self._started.items()):
            try:
                tracker.log(dict(values), step)
            except Exception as error:  # of its library, such as a lost network
                del self._started[kind]
                _warn(f"{kind} fails ({first_line(error)}) and has nothing after step {step - 1}")

    def close(self) -> None:
        for kind, tracker in self._started.items():
            try:
                tracker.finish()
            except Exception as error:
                _warn(f"{kind} did not end well: {first_line(error)}")
        self._started = {}


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _wandb(project: str, name: str, known: str, settings: Mapping[str, object]) -> Tracker:
    import wandb

    config = None
    if not known:
        config = dict(settings)  # a run that continues keeps those of its start
    run = wandb.init(project=project, name=name, id=known or None, resume="allow", config=config)
    return Tracker(str(run.id), lambda values, step: run.log(values, step=step), run.finish)


def _trackio(project: str, name: str, known: str, settings: Mapping[str, object]) -> Tracker:
    import trackio

    name = known or f"{name}-{secrets.token_hex(3)}"  # runs are identified by name
    run = trackio.init(project=project, name=name, resume="allow", config=dict(settings))
    return Tracker(name, lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(project: str, name: str, known: str, settings: Mapping[str, object]) -> Tracker:
    import mlflow

    mlflow.set_experiment(project)
    run_id = str(mlflow.start_run(run_id=known or None, run_name=name).info.run_id)
    if not known:
        # MLflow refuses a parameter that changes, so settings are written once
        pairs = list(settings.items())
        for start in range(0, len(pairs), _PARAMETERS_AT_A_TIME):
            mlflow.log_params(dict(pairs[start : start + _PARAMETERS_AT_A_TIME]))
    return Tracker(run_id, lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)


_KINDS: dict[str, Callable[[str, str, str, Mapping[str, object]], Tracker]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
