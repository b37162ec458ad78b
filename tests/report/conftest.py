"""Run folders made up from numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run(name, metrics=[…], layers=[…], result={…}, run_file="…")``: a run folder with these files."""

    def write(
        name: str = "mine",
        *,
        metrics: list[dict[str, Any]] | None = None,
        layers: list[dict[str, Any]] | None = None,
        result: dict[str, Any] | None = None,
        run_file: str = 'method = "pst"\n[schedule]\nfinal_sparsity = 0.9\n',
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.toml").write_text(run_file, encoding="utf-8")
        for file, lines in (("metrics.jsonl", metrics), ("layers.jsonl", layers)):
            if lines is not None:
                _lines(folder / file, lines)
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def a_run(write_run: Callable[..., Path]) -> Callable[..., Path]:
    """``a_run(name, steps, layers)``: a run with everything a report shows, of so many steps and layers."""

    def make(name: str = "mine", steps: int = 40, layers: int = 6) -> Path:
        updates = range(4, steps, 4)
        metrics: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            line = {"loss": 1.0 / step, "lr/head": 1e-3 * (steps - step), "lr/scores": 1e-2 * max(0, steps // 2 - step)}
            sparsity = {"sparsity/target": 0.9 * step / steps, "sparsity/actual": 0.9 * step / steps}
            common = {"seconds": 1.0, "flip_rate": 0.01, "tokens_per_second": 500.0, "peak_memory_bytes": 1 << 30}
            if step in updates:
                metrics.append({"step": step, "event": "mask_update", "flip_rate": 0.5 / step, **sparsity})
            metrics.append({"step": step, "event": "step", **line, **sparsity, **common})
        metrics.append({"step": steps, "event": "scores", "correlation": 0.7})
        metrics.append({"step": steps, "event": "evaluation", "eval/accuracy": 0.8})
        names = [f"model.layers.{i}.proj" for i in range(layers)]
        about: list[dict[str, Any]] = [{"layers": names, "weights": [1000] * layers}]
        for step in updates:
            kept = [1000 - 900 * step // steps - i for i in range(layers)]
            about.append({"step": step, "event": "masks", "kept": kept, "flipped": [step + i for i in range(layers)]})
        figures = {key: [0.1 * (i + 1) for i in range(layers)] for key in ("score_norm", "update_norm", "weight_norm")}
        correlation = [None, *(0.9 - 0.01 * i for i in range(1, layers))]
        about.append({"step": steps, "event": "scores", "correlation": correlation, **figures})
        result = {"steps": steps, "metrics": {"accuracy": 0.8}, "sparsity_in_masks": 0.9, "seconds": 3723.0}
        return write_run(name, metrics=metrics, layers=about, result=result)

    return make
