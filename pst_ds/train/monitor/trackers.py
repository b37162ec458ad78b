"""Report a run to Weights & Biases, MLflow and trackio."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.outputs import TrackingConfig
from pst_ds.config.run import ConfigError
from pst_ds.errors import first_line

IDS_FILE = "trackers.json"
"""File in the run folder with each tracker's id of the run."""
_PARAMETERS_AT_A_TIME = 100
"""Most parameters per call of MLflow."""


class Tracker(Protocol):
    """A run as one tracker has it, started."""

    id: str

    def log(self, values: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class Trackers:
    """The trackers of one run, all started. One that fails later is left out from then on: the run does not end for it.

    A resumed run continues the same run of each tracker, by the ids in its folder. ``settings`` belong to a new run.
    ``complain`` says a line to people. Raises ConfigError for a tracker that does not start.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        settings: Mapping[str, object],
        *,
        goes_on: bool,
        complain: Callable[[str], None],
    ):
        self._complain = complain
        self._started: dict[str, Tracker] = {}
        path, name = folder / IDS_FILE, config.name or folder.name
        known = json.loads(path.read_text("utf-8")) if goes_on and path.is_file() else {}
        ids: dict[str, str] = {}
        for kind in config.to:
            try:
                tracker = _KINDS[kind](config.project, name, known.get(kind, ""), settings)
            except Exception as error:  # each library has exceptions of its own
                self.close()
                raise ConfigError(
                    f"tracking.to names {kind}, which does not start: {first_line(error)}; log in, set its offline "
                    "mode (docs/how-to/monitor.md), or leave it out"
                ) from error
            self._started[kind] = tracker
            ids[kind] = tracker.id
        write_text_atomic(path, json.dumps(ids, indent=1) + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Give all trackers numbers of ``step``."""
        for kind, tracker in list(self._started.items()):
            try:
                tracker.log(dict(values), step)
            except Exception as error:
                del self._started[kind]
                self._complain(f"WARNING: {kind} fails ({first_line(error)}) and has nothing after step {step - 1}")

    def close(self) -> None:
        for kind, tracker in self._started.items():
            try:
                tracker.finish()
            except Exception as error:
                self._complain(f"WARNING: {kind} did not end well: {first_line(error)}")
        self._started = {}


class _WandB:
    def __init__(self, project: str, name: str, known: str, settings: Mapping[str, object]):
        import wandb

        options: Any = {} if known else {"config": dict(settings)}
        self._run = wandb.init(project=project, name=name, id=known or None, resume="allow", **options)
        self.id = str(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio(_WandB):
    """trackio, whose runs have the interface of Weights & Biases and are identified by name."""

    def __init__(self, project: str, name: str, known: str, settings: Mapping[str, object]):
        import trackio

        self.id = known or f"{name}-{secrets.token_hex(3)}"
        self._run = trackio.init(project=project, name=self.id, resume="allow", config=dict(settings))


class _MLflow:
    def __init__(self, project: str, name: str, known: str, settings: Mapping[str, object]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        self.id = str(mlflow.start_run(run_id=known or None, run_name=name).info.run_id)
        if not known:
            pairs = list(settings.items())
            for start in range(0, len(pairs), _PARAMETERS_AT_A_TIME):
                mlflow.log_params(dict(pairs[start : start + _PARAMETERS_AT_A_TIME]))

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


_KINDS: dict[str, Callable[[str, str, str, Mapping[str, object]], Tracker]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
