"""Profile steps of a run with torch's profiler, and write a trace per rank for Perfetto or chrome://tracing."""

import gzip
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.profiler import ProfilerActivity, profile, record_function

from pst_ds.atomic_files import atomic_file
from pst_ds.config.run import RunConfig
from pst_ds.file_names import PROFILE, trace_name
from pst_ds.parallel.ranks import rank
from pst_ds.parallel.watchdog import heartbeat


class StepProfile:
    """Profiles the steps of ``train.profile`` on this rank, each in a region "step N". Not collective.

    Close it in any case: what it has of a run that ends earlier is written, too.
    """

    def __init__(self, run: RunConfig, device: str):
        self._steps = range(0)
        if run.train.profile:
            first, last = run.train.profile
            self._steps = range(first, last + 1)
        self._folder = Path(run.output_dir) / PROFILE
        self._activities = [ProfilerActivity.CPU]
        if device.startswith("cuda"):
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._first = self._last = 0
        self._region: record_function | None = None

    def begin(self, step: int) -> None:
        """Start the region of a step, unless it has started: the engine may skip a batch, and take the next one."""
        if step not in self._steps or self._region is not None:
            return
        if self._profiler is None:
            self._profiler = profile(activities=self._activities)
            self._profiler.start()
            self._first = step
        self._last = step
        self._region = record_function(f"step {step}")
        self._region.__enter__()

    def end(self, step: int) -> None:
        """End the region of a step; write the trace after the last one."""
        self._end_region()
        if self._profiler is not None and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace, unless it was written. If it cannot be written, the run continues."""
        self._end_region()
        profiler = self._profiler
        self._profiler = None
        if profiler is None:
            return
        path = self._folder / trace_name(self._first, self._last, rank())
        heartbeat("writing the profile")
        profiler.stop()
        try:
            self._folder.mkdir(exist_ok=True)
            with TemporaryDirectory() as folder:
                plain = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(plain))
                with atomic_file(path) as partial, plain.open("rb") as trace, gzip.open(partial, "wb") as packed:
                    shutil.copyfileobj(trace, packed)
        except (OSError, RuntimeError) as error:
            print(f"WARNING: {path} was not written: {error}", file=sys.stderr, flush=True)

    def _end_region(self) -> None:
        if self._region is not None:
            self._region.__exit__(None, None, None)
            self._region = None
