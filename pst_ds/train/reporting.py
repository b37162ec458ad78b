"""Open the metrics and trackers of a run."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.core.kernels.host import multiplies_bf16
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.ranks import is_main, raise_on_all_ranks
from pst_ds.train.monitor.dense_run import DenseRun
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.monitor.trackers import Trackers
from pst_ds.train.run_context import RunContext
from pst_ds.train.run_folder import flat_table

_EMULATED_BF16 = (
    "this processor has no instructions for bf16, which is several times slower here than fp32: set train.precision = "
    '"fp32" if the run stays on CPUs like it'
)


def open_metrics(
    context: RunContext,
    module: nn.Module,
    num_steps: int,
    step: int,
    seconds: float,
    *,
    quiet: bool,
    dense: DenseRun | None,
) -> MetricsWriter:
    """Open the metrics of a run. Collective.

    Args:
        step: Step that the run resumes after; 0 for a new run.
        seconds: Seconds of training up to ``step``.
        dense: Dense run whose losses are shown next to this run's.

    Raises ConfigError, on every rank, for a tracker that does not start.
    """
    run = context.run
    trackers = raise_on_all_ranks(lambda: _trackers(run, goes_on=step > 0))
    sizes = {name: layer.layout.numel for name, layer in pst_layers(module).items()}
    metrics = MetricsWriter(
        Path(run.output_dir),
        num_steps=num_steps,
        is_main=is_main(),
        quiet=quiet,
        step=step,
        seconds=seconds,
        layers=sizes,
        dense=dense,
        trackers=trackers,
    )
    if context.device == "cpu" and run.train.precision == "bf16" and not multiplies_bf16():
        metrics.say(_EMULATED_BF16)
    return metrics


def _trackers(run: RunConfig, *, goes_on: bool) -> Trackers | None:
    if not run.tracking.to or not is_main():
        return None
    complain = partial(print, file=sys.stderr, flush=True)
    return Trackers(run.tracking, Path(run.output_dir), flat_table(run), goes_on=goes_on, complain=complain)
