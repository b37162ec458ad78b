"""Trackers of runs, beside TensorBoard, in the run file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from pst_ds.config.checks import ConfigError, check_fields

TRACKERS = ("wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Trackers that a run writes its metrics to, beside TensorBoard and metrics.jsonl (docs/how-to/monitor.md)."""

    to: tuple[str, ...] = ()
    """"wandb", "mlflow", "trackio", or several of them; each takes its address and its offline mode from the
    environment."""
    project: str = "pst-ds"
    """The project of W&B and trackio, and the experiment of MLflow, that the run is in."""
    name: str = ""
    """What the run is called there; empty is the name of output_dir."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.to) - set(TRACKERS))
        if unknown or len(set(self.to)) != len(self.to):
            raise ConfigError(
                f"tracking.to = {list(self.to)} must be different names among {', '.join(map(repr, TRACKERS))}"
            )
        if self.to and not self.project:
            raise ConfigError('tracking.project = "" must be a name')
        check_fields(self)

    def require_installed(self) -> None:
        """Raise ConfigError for a tracker whose library is not there."""
        missing = [name for name in self.to if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"tracking.to names {' and '.join(missing)}, which is not installed: pip install 'pst-ds[trackers]'"
            )
