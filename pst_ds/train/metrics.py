"""What a run reports: metrics.jsonl, TensorBoard scalars and a progress line, all from rank 0."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pst_ds.durable import replace_text

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes on rank 0 and does nothing elsewhere.

    A run that is continued after ``step``, ``seconds`` into it, keeps its lines up to there; later ones are made anew.
    """

    def __init__(
        self, folder: Path, *, num_steps: int, is_main: bool, quiet: bool = False, step: int = 0, seconds: float = 0.0
    ):
        self._file = self._board = None
        self._num_steps, self._quiet = num_steps, quiet
        self._last_time = time.monotonic()
        self._started = self._last_time - seconds
        self._last_step = step
        if is_main:
            from torch.utils.tensorboard import SummaryWriter

            path = folder / METRICS_FILE
            replace_text(path, "".join(_lines_until(path, step)) if step else "")
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    @property
    def seconds(self) -> float:
        """That the run has taken, over all its processes."""
        return time.monotonic() - self._started

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and a scalar for every number."""
        if self._file is None or self._board is None:
            return
        line = {"step": step, "seconds": round(self.seconds, 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """One line on the terminal: where the run is and when it will end."""
        if self._file is None or self._quiet:
            return
        now = time.monotonic()
        per_step = (now - self._last_time) / max(1, step - self._last_step)
        self._last_time, self._last_step = now, step
        eta = _duration(per_step * (self._num_steps - step))
        parts = [f"step {step:>6}/{self._num_steps}", *(f"{k} {_short(v)}" for k, v in values.items()), f"eta {eta}"]
        print(" | ".join(parts), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self._file is not None and not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a metrics file up to ``step``; a crash may have left half a line at the end."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            of_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if of_step <= step:
            lines.append(line + "\n")
    return lines


def peak_memory_bytes(device: str) -> int:
    """Largest memory this rank has held: of the accelerator, or resident memory of the process on CPU."""
    if device != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
