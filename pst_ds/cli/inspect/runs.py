"""Run files, run folders and checkpoints for ``pst-ds inspect``."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError, open_checkpoint, read_checkpoint
from pst_ds.cli.inspect.layers import Facts, Inspection, Layer, add_experts, sparsity_of
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import load_run, run_from_table
from pst_ds.config.update_forms import update_form
from pst_ds.core.bits import count_bits, shard_bytes, unpack_range
from pst_ds.core.factors import SCORE_FACTORS
from pst_ds.core.forms.form import UpdateForm
from pst_ds.file_names import CHECKPOINTS, RESULT_FILE, RUN_FILE, links_to, step_folders
from pst_ds.writing.manifest import read_table

_OUTPUTS = "ARU"
"""Factors with a row per output of their layer."""
_INPUTS = "BCV"
"""Factors with a column per input of their layer."""
_BYTES_TRAINED = 12
"""Bytes of a trained parameter in a checkpoint: its fp32 master and two moments."""
_WHOLE = "with intact files: every SHA-256 matches"


def run_file(path: Path) -> Inspection:
    """Describe a run file by its main settings. Raises ConfigError for an invalid one."""
    run = load_run(path)
    facts = {**_settings(run), "output_dir": run.output_dir}
    return Inspection(f"{path}: a run file", facts, [], f"pst-ds plan {path} shows what the run would do")


def run_folder(path: Path) -> Inspection:
    """Describe a run by its settings, result, checkpoints and layers. Raises InputError for damaged files.

    The layers are from the best or newest checkpoint. A damaged one is reported, and the next one is used.
    """
    run = load_run(path / RUN_FILE)
    folder = path / CHECKPOINTS
    result = _table_if_written(path / RESULT_FILE)
    deepspeed = _table_if_written(path / "deepspeed.json")
    layers: list[Layer] = []
    held: Facts = {}
    checkpoint, name, problems = _whole_checkpoint(folder)
    if checkpoint is not None:
        layers = _layers(checkpoint, run)
        _add_experts(layers, checkpoint, result.get("expert_tokens") or {})
        held = _held(checkpoint, layers)
        note = f"layers are from {checkpoint.folder} ({name}), {_WHOLE}"
    elif problems:
        note = "none of its checkpoints is intact"
    else:
        note = "it has no checkpoint yet"
    facts = {
        **_settings(run),
        **held,
        "finished": bool(result),
        **{key: result.get(key) for key in ("steps", "skipped_steps", "seconds", "world_size", "metrics")},
        "zero_stage": (deepspeed.get("zero_optimization") or {}).get("stage"),
        "checkpoints": _checkpoints(folder, problems),
        "tensorboard": (path / "tensorboard").is_dir(),
    }
    return Inspection(f"{path}: a run folder", facts, layers, "\n".join([note, *problems.values()]))


def _table_if_written(path: Path) -> dict[str, Any]:
    """Return the table of a JSON file; {} before the run has written it."""
    return read_table(path, "") if path.is_file() else {}


def _whole_checkpoint(folder: Path) -> tuple[Checkpoint | None, str, dict[str, str]]:
    """Return the first intact checkpoint of best, final, latest and the rest from new to old, and its name.

    The last value has the problems of the damaged checkpoints before it, by folder name.
    """
    problems: dict[str, str] = {}
    for name in checkpoints.known_names(folder):
        place = (folder / name).resolve().name
        if place in problems:
            continue
        try:
            checkpoint = checkpoints.read(folder, name)
        except (CheckpointError, OSError) as error:
            problems[place] = str(error)
        else:
            return checkpoint, name if problems or name != place else "the newest", problems
    return None, "", problems


def checkpoint_folder(path: Path) -> Inspection:
    """Describe a checkpoint by its state, contents and masks. Raises CheckpointError for a damaged one."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    try:
        run = run_from_table(json.loads(json.dumps(state.progress["run"])))
    except (KeyError, ConfigError):  # of another version
        run = None
    layers = _layers(checkpoint, run)
    settings = _settings(run) if run else {}
    facts = {
        **settings,
        "step": state.step,
        "sparsity_requested": state.sparsity,
        **_held(checkpoint, layers),
        "masks_frozen": state.masks_frozen,
        "rounded_to": str(checkpoint.contents.value_grid) if state.rounds else None,
        "metrics": state.metrics,
        "computed_in": state.precision,
        "device": state.device_type,
        "labels": state.labels or None,
        "base_model": state.base_path,
        "world_size": state.progress.get("world_size"),
        "zero_stage": state.progress.get("zero_stage"),
        "files": checkpoint.contents.num_shards,
    }
    return Inspection(f"{path}: a checkpoint", facts, layers, f"it is a checkpoint {_WHOLE}")


def _settings(run: RunConfig) -> Facts:
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
        "train": run.data.train or [source.path for source in run.data.sources],
        "deepspeed_config": run.deepspeed_config or None,
        "additions": asdict(run).get("additions") or None,
    }


def _checkpoints(folder: Path, problems: Mapping[str, str]) -> list[Facts]:
    """Describe every checkpoint, newest first. ``problems``: known damages, by name."""
    described = []
    for path in step_folders(folder):
        about: Facts = {"name": path.name, "links": links_to(path)}
        try:
            about["step"] = open_checkpoint(path).state.step
        except (CheckpointError, OSError) as error:
            about["problem"] = str(error)
        if path.name in problems:
            about["problem"] = problems[path.name]
        try:
            about["size_bytes"] = sum(file.stat().st_size for file in path.iterdir())
        except FileNotFoundError:  # the run has removed it meanwhile
            continue
        described.append(about)
    return described


def _held(checkpoint: Checkpoint, layers: list[Layer]) -> Facts:
    """Return facts about a checkpoint's files, and about its layers together."""
    pruned = [layer for layer in layers if layer["zeros"] is not None]
    return {
        "sparsity_measured": sparsity_of(pruned),
        "pruned_weights": sum(layer["weights"] for layer in pruned),
        "trained_parameters": sum(layer["trained"] for layer in layers),
        "base_fingerprint": checkpoint.state.base_fingerprint,
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.folder.iterdir()),
    }


def _layers(checkpoint: Checkpoint, run: RunConfig | None) -> list[Layer]:
    """Describe every module that has a mask or trained parameters."""
    contents = checkpoint.contents
    rules = run.injected_pst if run else None
    trained: dict[str, int] = {}  # parameters, by module
    for name, shape in contents.trained.items():
        owner = name.rpartition(".")[0]
        trained[owner] = trained.get(owner, 0) + math.prod(shape)
    layers: list[Layer] = []
    for name in {**trained, **contents.masks}:
        count = trained.get(name, 0)
        layer: Layer = {
            "name": name,
            "shape": _matrix_shape(name, contents.trained),
            "dtype": "",
            "pattern": "",
            "weights": count,
            "zeros": None,
            "bytes": _BYTES_TRAINED * count,
            "trained": count,
        }
        weights = contents.masks.get(name)
        if weights is not None:
            bits = checkpoint.masks[name]
            layer["weights"] = weights
            layer["zeros"] = weights - int(count_bits(bits, bits)[1])
            # every rank pads its shard to whole bytes; ranks may divide a stack of experts into parts first
            parts = contents.parts.get(name, 1)
            layer["bytes"] += contents.num_shards * shard_bytes(weights // parts, contents.num_shards // parts)
            if rules is not None:
                layer["pattern"] = str(rules.rule_for(name).pattern)
                if described := _update(checkpoint, name, rules):
                    layer["update"] = described
        layers.append(layer)
    return layers


def _update(checkpoint: Checkpoint, layer: str, config: PSTConfig) -> dict[str, float]:
    """Return what the update form says about the update of ``layer``; {} for forms that say nothing."""
    form = update_form(config.update_form)
    if type(form).describe is UpdateForm.describe:
        return {}  # without reading parameters
    prefix = f"{layer}.pst_"
    # every parameter called pst_ belongs to the scores or to the update
    parameters = {}
    for name in checkpoint.contents.trained:
        ending = name.removeprefix(prefix)
        if name.startswith(prefix) and ending not in SCORE_FACTORS:
            parameters[ending] = checkpoint.trained[name]
    return form.describe(parameters) if parameters else {}


def _matrix_shape(name: str, trained: Mapping[str, tuple[int, ...]]) -> list[int] | None:
    """Return the shape of a trained weight, or (O, I) from the factors; None without either."""
    if f"{name}.weight" in trained:
        return list(trained[f"{name}.weight"])
    outputs = next((trained[key] for factor in _OUTPUTS if (key := f"{name}.pst_{factor}") in trained), None)
    inputs = next((trained[key] for factor in _INPUTS if (key := f"{name}.pst_{factor}") in trained), None)
    if outputs is None or inputs is None:
        return None
    return [outputs[0], inputs[-1]]


def _add_experts(layers: list[Layer], checkpoint: Checkpoint, tokens: Mapping[str, list[int]]) -> None:
    """Add the pruned weights of each expert to stacks for which the run counted ``tokens``, by module."""
    for layer in layers:
        name = layer["name"]
        weights = layer["weights"]
        of_experts = tokens.get(name.rpartition(".")[0])
        if not of_experts or name not in checkpoint.masks:
            continue
        bits = checkpoint.masks[name]
        weights_per_expert = weights // len(of_experts)
        zeros = []
        for expert in range(len(of_experts)):
            start = expert * weights_per_expert
            kept = unpack_range(bits, weights, 1, start, start + weights_per_expert).sum()
            zeros.append(weights_per_expert - int(kept))
        add_experts(layer, zeros, of_experts)
