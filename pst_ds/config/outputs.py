"""Settings of what a run writes: ``[checkpoint]``, ``[pictures]`` and ``[tracking]``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from pst_ds.config.settings import ConfigError, Interval, MayDiffer, NotNegative, Positive, Section, Strings, settings

TRACKERS = ("wandb", "mlflow", "trackio")


@settings
class CheckpointConfig(Section):
    """Checkpoints to resume from, with ``pst-ds train RUN --resume``."""

    interval: MayDiffer[NotNegative] = 100
    """Optimizer steps between checkpoints; 0 saves only the best, the last, and on a signal."""
    keep_last: MayDiffer[Positive] = 2
    """Number of newest checkpoints to keep, in addition to the best and the last."""


@settings
class PicturesConfig(Section):
    """Statistics of all layers and pictures of some, for TensorBoard and layers.jsonl (docs/how-to/monitor.md)."""

    interval: MayDiffer[Interval] = 0
    """Optimizer steps between pictures; 0 is about 20 times per run, -1 never. The last step always has one."""
    layers: MayDiffer[Strings] = ()
    """Layers with a histogram of scores and a picture of the mask, by name or dotted ending; empty is the first, the
    middle and the last pruned layer."""

    def last_before(self, step: int, num_steps: int) -> int:
        """Return the last step before ``step`` that has pictures; -1 for none."""
        return (step - 1) // self._interval(num_steps) * self._interval(num_steps) if step else -1

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether a run of ``num_steps`` draws pictures after ``step`` (0 is before the first)."""
        return self.interval >= 0 and (step % self._interval(num_steps) == 0 or step == num_steps)

    def _interval(self, num_steps: int) -> int:
        return self.interval or max(1, num_steps // 20)


@settings
class TrackingConfig(Section):
    """Experiment trackers, in addition to TensorBoard and metrics.jsonl (docs/how-to/monitor.md)."""

    to: MayDiffer[Strings] = ()
    """Any of "wandb", "mlflow" and "trackio". Each reads its address and offline mode from the environment."""
    project: MayDiffer[str] = "pst-ds"
    """Project in W&B and trackio, experiment in MLflow."""
    name: MayDiffer[str] = ""
    """Name of the run in the trackers; empty is the last part of output_dir."""

    def problems(self) -> Iterator[str]:
        unknown = sorted(set(self.to) - set(TRACKERS))
        if unknown or len(set(self.to)) != len(self.to):
            yield f"tracking.to = {list(self.to)} must be different names among {', '.join(map(repr, TRACKERS))}"
        if self.to and not self.project:
            yield 'tracking.project = "" must be a name'

    def require_installed(self) -> None:
        """Raise ConfigError for a tracker whose package is not installed."""
        missing = [name for name in self.to if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"tracking.to names {' and '.join(missing)}, which is not installed. Run pip install 'pst-ds[trackers]'"
            )
