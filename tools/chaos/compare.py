"""Compare two runs bit by bit, and find the complete checkpoints of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import CheckpointError, read_checkpoint
from pst_ds.errors import InputError
from pst_ds.file_names import BEST, CHECKPOINTS, FINAL, LATEST, METRICS_FILE, RESULT_FILE, step_folders
from pst_ds.parallel.optimizer_state import KINDS
from tools.verbs import verb

_VARYING = (
    "seconds",
    "tokens_per_second",
    "time/",
    "data_wait",
    "peak_memory_bytes",
    "ranks/",
    "bytes_",
    "update/bytes_",
)
"""Prefixes of values that differ between any two runs, or after a start: the first steps gather more."""
_BY_CHANCE = ("checkpoint", "checkpoint_failed", "straggler")
"""Events of metrics.jsonl about saves, whose place varies, and about times."""


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences between two finished runs. Exports each of them into its folder, once."""
    try:
        return [
            *_differing("result.json", _result(one), _result(other)),
            *_differing("link", _links(one), _links(other)),
            *_differing("final checkpoint", _checkpoint_values(one), _checkpoint_values(other)),
            *_differing("export", _exported(one), _exported(other)),
            *_differing_lines(metric_lines(one / METRICS_FILE), metric_lines(other / METRICS_FILE)),
        ]
    except (InputError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]


def whole_checkpoints(run: Path) -> tuple[list[int], list[str]]:
    """Return the steps of the undamaged checkpoints, the newest first, and what is wrong with others."""
    steps, problems = [], []
    for folder in step_folders(run / CHECKPOINTS):
        try:
            steps.append(read_checkpoint(folder).state.step)
        except CheckpointError as error:
            problems.append(str(error))
    return steps, problems


def set_aside(run: Path) -> list[str]:
    """Return the checkpoints that a resume found damaged."""
    return sorted(str(path) for path in (run / CHECKPOINTS).glob(f"*{checkpoints.BROKEN}"))


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file without times, and without events whose place varies."""
    lines = [line for line in _lines(path) if line["event"] not in _BY_CHANCE]
    return [{k: v for k, v in line.items() if not k.startswith(_VARYING)} for line in lines]


def false_failures(run: Path) -> list[int]:
    """Return the steps whose checkpoint a finished run wrongly reports as failed.

    After a real failure the run resumes from an earlier checkpoint, and the line is removed.
    """
    return [line["step"] for line in _lines(run / METRICS_FILE) if line["event"] == "checkpoint_failed"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two values are equal; tensors in dtype, shape and every bit, so that NaN equals itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _differing(what: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = sorted(one.keys() | other.keys())
    return [f"{what}: {n}" for n in names if n not in one or n not in other or not same_bits(one[n], other[n])]


def _differing_lines(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    found = [f"{METRICS_FILE}: {a} and {b}" for a, b in zip(one, other, strict=False) if a != b]
    if len(one) != len(other):
        found.append(f"{METRICS_FILE}: {len(one)} and {len(other)} lines")
    return found


def _result(run: Path) -> dict[str, Any]:
    result = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    return {key: value for key, value in result.items() if key != "seconds"}


def _links(run: Path) -> dict[str, str]:
    names = (LATEST, BEST, FINAL)
    links = {name: run / CHECKPOINTS / name for name in names}
    return {name: str(path.readlink()) for name, path in links.items() if path.is_symlink()}


def _checkpoint_values(run: Path) -> dict[str, Any]:
    """Return every tensor of the last checkpoint, and Adam's step counts."""
    checkpoint = read_checkpoint(checkpoints.find(run / CHECKPOINTS, FINAL))
    found: dict[str, Any] = {f"mask of {name}": bits for name, bits in checkpoint.masks.items()}
    for name, shape in checkpoint.contents.trained.items():
        for kind in KINDS:
            found[f"{kind} of {name}"] = checkpoint.values(name, kind, 0, torch.Size(shape).numel())
        found[f"steps of {name}"] = checkpoint.contents.steps[name]
    return found


def _exported(run: Path) -> dict[str, Tensor]:
    """Return every tensor of the export."""
    from safetensors.torch import load_file

    folder = run / "export"
    if not folder.is_dir():
        verb("export", str(run), "--out", str(folder))
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
