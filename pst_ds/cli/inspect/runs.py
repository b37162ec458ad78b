"""Run files, run folders and checkpoints for ``pst-ds inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError, open_checkpoint, read_checkpoint
from pst_ds.cli.inspect.text import Inspected, Layer
from pst_ds.cli.inspect.trained import Mask, counted, trained_layers
from pst_ds.config.file_names import BEST, CHECKPOINTS, FINAL, LATEST, LAYERS_FILE, RESULT_FILE, RUN_FILE
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import load_run, run_from_table
from pst_ds.core.bits import count_bits, shard_bytes
from pst_ds.export.manifest import read_table
from pst_ds.monitor.jsonl import lines_until
from pst_ds.train.model import pst_config

_WHOLE = "whose files are whole: every SHA-256 is as it should be"
_FIGURES = {"masks": "flipped", "scores": "correlation"}
"""What is shown of a layer, by the event in :data:`LAYERS_FILE` that it is from."""
_BYTES_TRAINED = 12
"""Of a trained parameter in a checkpoint: its fp32 master and two moments."""


def run_file(path: Path) -> Inspected:
    """The settings that matter most. Raises ConfigError for what is no run file."""
    run = load_run(path)
    facts = {**_settings(run), "output_dir": run.output_dir}
    return Inspected(f"{path}: a run file", facts, [], f"pst-ds plan {path} shows what the run would do")


def run_folder(path: Path) -> Inspected:
    """Settings, result, checkpoints; the layers of the best or newest. Raises InputError for damaged files.

    A damaged checkpoint is told in the note, and the next one that is whole is shown.
    """
    run, folder = load_run(path / RUN_FILE), path / CHECKPOINTS
    result = read_table(path / RESULT_FILE, "") if (path / RESULT_FILE).is_file() else {}
    deepspeed = read_table(path / "deepspeed.json", "") if (path / "deepspeed.json").is_file() else {}
    layers: list[Layer] = []
    held: dict[str, Any] = {}
    checkpoint, name, problems = _whole_checkpoint(folder)
    if checkpoint is not None:
        layers = _layers(checkpoint, run)
        held = _held(checkpoint, layers)
        note = f"layers are those of {checkpoint.folder} ({name}), {_WHOLE}"
    else:
        note = "none of its checkpoints is whole" if problems else "it has no checkpoint yet"
    damaged_figures = _add_figures(layers, path / LAYERS_FILE)
    facts = {
        **_settings(run),
        **held,
        "finished": bool(result),
        **{key: result.get(key) for key in ("steps", "skipped_steps", "seconds", "world_size", "metrics")},
        "zero_stage": (deepspeed.get("zero_optimization") or {}).get("stage"),
        "checkpoints": _checkpoints(folder, problems),
        "tensorboard": (path / "tensorboard").is_dir(),
    }
    notes = [note, *problems.values(), *([damaged_figures] if damaged_figures else [])]
    return Inspected(f"{path}: a run folder", facts, layers, "\n".join(notes))


def _whole_checkpoint(folder: Path) -> tuple[Checkpoint | None, str, dict[str, str]]:
    """The best checkpoint in ``folder``, or else the final, the latest or the newest, of those that are whole.

    With what it is called, and what is wrong with those that came first, by the names of their folders.
    """
    problems: dict[str, str] = {}
    for name in checkpoints.known_names(folder):
        place = (folder / name).resolve().name
        if place in problems:
            continue
        try:
            checkpoint = read_checkpoint(checkpoints.find(folder, name))
        except (CheckpointError, OSError) as error:
            problems[place] = str(error)
        else:
            return checkpoint, name if problems or name != place else "the newest", problems
    return None, "", problems


def checkpoint_folder(path: Path) -> Inspected:
    """State and contents; its masks are counted. Raises CheckpointError for a damaged one."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    try:
        run = run_from_table(json.loads(json.dumps(state.progress["run"])))
    except (KeyError, ConfigError):  # of another version
        run = None
    layers = _layers(checkpoint, run)
    facts = {
        **(_settings(run) if run else {}),
        "step": state.step,
        "sparsity_requested": state.sparsity,
        **_held(checkpoint, layers),
        "masks_frozen": state.masks_frozen,
        "metrics": state.metrics,
        "computed_in": state.precision,
        "device": state.device_type,
        "labels": state.labels or None,
        "base_model": state.base_path,
        "world_size": state.progress.get("world_size"),
        "zero_stage": state.progress.get("zero_stage"),
        "files": checkpoint.contents.num_shards,
    }
    return Inspected(f"{path}: a checkpoint", facts, layers, f"it is one {_WHOLE}")


def _settings(run: RunConfig) -> dict[str, Any]:
    steps = {"num_steps": run.train.num_steps} if run.train.num_steps else {"num_epochs": run.train.num_epochs}
    return {
        "task": run.task,
        "method": run.method,
        "base_model": run.model.path,
        "pattern": run.pst.pattern,
        "sparsity_requested": 0.0 if run.mask_method.masks == "none" else run.schedule.final_sparsity,
        "precision": run.train.precision,
        "batch_size": run.train.batch_size,
        **steps,
        "train": run.data.train,
        "deepspeed_config": run.deepspeed_config or None,
    }


def _checkpoints(folder: Path, problems: Mapping[str, str]) -> list[dict[str, Any]]:
    """Name, links, step and size of every checkpoint, the newest first; of a damaged one its problem.

    ``problems``: those that are known already, by name.
    """
    links = {name: (folder / name).resolve().name for name in (LATEST, BEST, FINAL)}
    found = []
    for path in checkpoints.step_folders(folder):
        about: dict[str, Any] = {"name": path.name, "links": [n for n, to in links.items() if to == path.name]}
        try:
            about["step"] = open_checkpoint(path).state.step
        except CheckpointError as error:
            about["problem"] = str(error)
        about |= {"problem": problems[path.name]} if path.name in problems else {}
        found.append(about | {"size_bytes": sum(file.stat().st_size for file in path.iterdir())})
    return found


def _held(checkpoint: Checkpoint, layers: list[Layer]) -> dict[str, Any]:
    nbytes = sum(file.stat().st_size for file in checkpoint.folder.iterdir())
    return {**counted(layers), "base_fingerprint": checkpoint.state.base_fingerprint, "checkpoint_bytes": nbytes}


def _layers(checkpoint: Checkpoint, run: RunConfig | None) -> list[Layer]:
    """Every module with a mask or trained parameters; bits of masks are counted."""
    contents, rules = checkpoint.contents, pst_config(run) if run else None
    masks = {}
    for name, weights in contents.masks.items():
        bits = checkpoint.masks[name]
        nbytes = contents.num_shards * shard_bytes(weights, contents.num_shards)
        masks[name] = Mask(weights, weights - count_bits(bits, bits)[1], nbytes)

    def pattern_of(name: str) -> str:
        return str(rules.rule_for(name).pattern) if rules else ""

    return trained_layers(contents.trained, masks, pattern_of, _BYTES_TRAINED)


def _add_figures(layers: list[Layer], file: Path) -> str:
    """Put the newest per-layer figures of the run's :data:`LAYERS_FILE` in, if there is one; what is wrong with it.

    A line that is not as it should be is passed over.
    """
    if not file.is_file():
        return ""
    by_name = {layer["name"]: layer for layer in layers}
    try:
        with file.open(encoding="utf-8") as stream:
            of_layers = [by_name.get(name, {}) for name in json.loads(stream.readline())["layers"]]
    except (ValueError, KeyError, TypeError):
        return f"{file} is damaged: its first line does not name the layers"
    for line in lines_until(file, sys.maxsize):
        key = _FIGURES.get(str(line.get("event")), "")
        values = line.get(key)
        if isinstance(values, list) and len(values) == len(of_layers) and all(map(_is_figure, values)):
            for layer, value in zip(of_layers, values, strict=True):
                layer[key] = value
    return ""


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
