"""Run files, run folders and checkpoints for ``pst-ds inspect``."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError, open_checkpoint, read_checkpoint
from pst_ds.cli.inspect.layers import Facts, Inspection, Layer, add_experts, sparsity_of
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import load_run, load_run_folder, run_from_table
from pst_ds.config.update_forms import update_form
from pst_ds.core.bits import count_bits, shard_bytes, unpack_range
from pst_ds.core.factors import SCORE_FACTORS
from pst_ds.core.forms.form import UpdateForm
from pst_ds.file_names import CHECKPOINTS, RESULT_FILE, links_to, step_folders
from pst_ds.writing.manifest import read_table

_OUTPUTS = "ARU"
"""Factors with a row per output of their layer."""
_INPUTS = "BCV"
"""Factors with a column per input of their layer."""
_BYTES_TRAINED = 12
"""Bytes of a trained parameter in a checkpoint: its fp32 master and two moments."""
_WHOLE = "with intact files: every SHA-256 matches"
_FACTS_OF_RESULT = ("steps", "skipped_steps", "seconds", "world_size", "metrics")
"""Values of result.json that are shown unchanged."""


@dataclass(frozen=True, slots=True)
class _ChosenCheckpoint:
    """The checkpoint of a run whose layers are shown, and those that were damaged."""

    checkpoint: Checkpoint | None
    """None if the run has no intact one."""
    name: str
    """Why it was chosen: "best", "final", "latest", "the newest", or the name of its folder."""
    problems: dict[str, str]
    """Problems of the damaged checkpoints that were tried before it, by folder name."""


def run_file(path: Path) -> Inspection:
    """Describe a run file by its main settings. Raises ConfigError for an invalid one."""
    run = load_run(path)
    facts = {**_settings(run), "output_dir": run.output_dir}
    return Inspection(f"{path}: a run file", facts, [], f"pst-ds plan {path} shows what the run would do")


def run_folder(path: Path) -> Inspection:
    """Describe a run by its settings, result, checkpoints and layers. Raises InputError for damaged files.

    The layers are from the best or newest checkpoint. A damaged one is reported, and the next one is used.
    """
    run = load_run_folder(path)
    folder = path / CHECKPOINTS
    result = _table_if_written(path / RESULT_FILE)
    deepspeed = _table_if_written(path / "deepspeed.json")
    chosen = _first_intact(folder)
    layers: list[Layer] = []
    facts = _settings(run)
    if chosen.checkpoint is not None:
        layers = _layers(chosen.checkpoint, run)
        _add_experts(layers, chosen.checkpoint, result.get("expert_tokens") or {})
        facts |= _held(chosen.checkpoint, layers)
    # the run writes its result last
    facts["finished"] = bool(result)
    facts |= {key: result.get(key) for key in _FACTS_OF_RESULT}
    zero = deepspeed.get("zero_optimization") or {}
    facts["zero_stage"] = zero.get("stage")
    facts["checkpoints"] = _checkpoints(folder, chosen.problems)
    facts["tensorboard"] = (path / "tensorboard").is_dir()
    note = "\n".join([_source_of_layers(chosen), *chosen.problems.values()])
    return Inspection(f"{path}: a run folder", facts, layers, note)


def _source_of_layers(chosen: _ChosenCheckpoint) -> str:
    """Say from which checkpoint the layers of a run are, or why there are no layers."""
    if chosen.checkpoint is not None:
        return f"layers are from {chosen.checkpoint.folder} ({chosen.name}), {_WHOLE}"
    if chosen.problems:
        return "none of its checkpoints is intact"
    return "it has no checkpoint yet"


def _table_if_written(path: Path) -> dict[str, Any]:
    """Return the table of a JSON file; {} before the run has written it. Raises InputError for a damaged one."""
    if not path.is_file():
        return {}
    return read_table(path, "")


def _first_intact(folder: Path) -> _ChosenCheckpoint:
    """Read the first intact checkpoint of best, final, latest and the rest from new to old."""
    problems: dict[str, str] = {}
    for name in checkpoints.known_names(folder):
        # several names may be links to one folder, and reading it takes long
        place = (folder / name).resolve().name
        if place in problems:
            continue
        try:
            checkpoint = checkpoints.read(folder, name)
        except (CheckpointError, OSError) as error:
            # an older checkpoint still shows more than an error message
            problems[place] = str(error)
            continue
        # a folder that is read by its name, although none is damaged: the links were lost, so it is the newest
        is_newest = name == place and not problems
        return _ChosenCheckpoint(checkpoint, "the newest" if is_newest else name, problems)
    return _ChosenCheckpoint(None, "", problems)


def checkpoint_folder(path: Path) -> Inspection:
    """Describe a checkpoint by its state, contents and masks. Raises CheckpointError for a damaged one."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    run = _run_of(checkpoint)
    layers = _layers(checkpoint, run)
    # a run rounds from a certain step on, and has a scheme before it, too
    rounded_to = str(checkpoint.contents.value_grid) if state.rounds else None
    facts: Facts = {}
    if run is not None:
        facts |= _settings(run)
    facts["step"] = state.step
    # of this step, in place of the final sparsity of the run
    facts["sparsity_requested"] = state.sparsity
    facts |= _held(checkpoint, layers)
    facts |= {
        "masks_frozen": state.masks_frozen,
        "rounded_to": rounded_to,
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


def _run_of(checkpoint: Checkpoint) -> RunConfig | None:
    """Return the settings in a checkpoint; None if they are missing, or of another version of pst-ds."""
    try:
        return run_from_table(checkpoint.state.progress["run"])
    except (KeyError, ConfigError):
        # the rest of the checkpoint can be described without them
        return None


def _settings(run: RunConfig) -> Facts:
    """Return the main settings of a run."""
    sparsity = run.schedule.final_sparsity
    if run.mask_method.masks == "none":
        # such a method prunes nothing, and ignores the schedule
        sparsity = 0.0
    facts: Facts = {
        "task": run.task,
        "method": run.method,
        "base_model": run.model.path,
        "pattern": run.pst.pattern,
        "sparsity_requested": sparsity,
        "precision": run.train.precision,
        "batch_size": run.train.batch_size,
    }
    # one of the two is set, and the other is 0
    if run.train.num_steps:
        facts["num_steps"] = run.train.num_steps
    else:
        facts["num_epochs"] = run.train.num_epochs
    facts["train"] = run.data.train or [source.path for source in run.data.sources]
    facts["deepspeed_config"] = run.deepspeed_config or None
    # their settings depend on their kind, so they are shown under the names of the run file
    facts["additions"] = asdict(run).get("additions") or None
    return facts


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
            # more exact, because its sums were compared and not only its state read
            about["problem"] = problems[path.name]
        try:
            about["size_bytes"] = sum(file.stat().st_size for file in path.iterdir())
        except FileNotFoundError:
            # the run has removed it meanwhile
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
    """Describe every module that has a mask or trained parameters; patterns and updates only with its ``run``."""
    contents = checkpoint.contents
    trained = _trained_by_module(contents.trained)
    layers: list[Layer] = []
    for name in {**trained, **contents.masks}:
        count = trained.get(name, 0)
        layer: Layer = {
            "name": name,
            "shape": _matrix_shape(name, contents.trained),
            # a checkpoint does not contain the frozen weights, which have one
            "dtype": "",
            "pattern": "",
            "weights": count,
            "zeros": None,
            "bytes": _BYTES_TRAINED * count,
            "trained": count,
        }
        if name in contents.masks:
            _add_mask(layer, checkpoint)
            if run is not None:
                _add_rule(layer, checkpoint, run.injected_pst)
        layers.append(layer)
    return layers


def _trained_by_module(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of trained parameters of each module. ``shapes``: of the parameters, by name."""
    trained: dict[str, int] = {}
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        trained[module] = trained.get(module, 0) + math.prod(shape)
    return trained


def _add_mask(layer: Layer, checkpoint: Checkpoint) -> None:
    """Add the weights, zeros and bytes of a layer's mask."""
    name = layer["name"]
    contents = checkpoint.contents
    weights = contents.masks[name]
    bits = checkpoint.masks[name]
    _, kept = count_bits(bits, bits)
    layer["weights"] = weights
    layer["zeros"] = weights - int(kept)
    # every rank pads its shard to whole bytes; ranks may divide a stack of experts into parts first
    parts = contents.parts.get(name, 1)
    bytes_of_rank = shard_bytes(weights // parts, contents.num_shards // parts)
    layer["bytes"] += contents.num_shards * bytes_of_rank


def _add_rule(layer: Layer, checkpoint: Checkpoint, rules: PSTConfig) -> None:
    """Add what the rules of a run tell about a layer with a mask: its pattern, and what its update has learned."""
    name = layer["name"]
    layer["pattern"] = str(rules.rule_for(name).pattern)
    described = _update(checkpoint, name, rules)
    if described:
        layer["update"] = described


def _update(checkpoint: Checkpoint, layer: str, config: PSTConfig) -> dict[str, float]:
    """Return what the update form says about the update of ``layer``; {} for forms that say nothing."""
    form = update_form(config.update_form)
    if type(form).describe is UpdateForm.describe:
        # the form has nothing to say, and reading its parameters takes long
        return {}
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
    # which factors a layer has depends on the method, so any will do
    outputs = _first_factor(name, _OUTPUTS, trained)
    inputs = _first_factor(name, _INPUTS, trained)
    if outputs is None or inputs is None:
        return None
    return [outputs[0], inputs[-1]]


def _first_factor(layer: str, factors: Iterable[str], trained: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of the first of ``factors`` that a layer has; None without any."""
    for factor in factors:
        shape = trained.get(f"{layer}.pst_{factor}")
        if shape is not None:
            return shape
    return None


def _add_experts(layers: list[Layer], checkpoint: Checkpoint, tokens: Mapping[str, list[int]]) -> None:
    """Add the pruned weights of each expert to stacks for which the run counted ``tokens``, by module."""
    for layer in layers:
        name = layer["name"]
        # tokens are counted by the module that routes them, which contains the stacks
        router = name.rpartition(".")[0]
        tokens_of_experts = tokens.get(router)
        if tokens_of_experts and name in checkpoint.masks:
            zeros = _zeros_of_experts(checkpoint.masks[name], layer["weights"], len(tokens_of_experts))
            add_experts(layer, zeros, tokens_of_experts)


def _zeros_of_experts(bits: Tensor, weights: int, experts: int) -> list[int]:
    """Return the pruned weights of each expert of a stack of ``weights``. ``bits``: the whole mask, in one shard."""
    weights_per_expert = weights // experts
    zeros: list[int] = []
    for expert in range(experts):
        start = expert * weights_per_expert
        mask = unpack_range(bits, weights, 1, start, start + weights_per_expert)
        zeros.append(weights_per_expert - int(mask.sum()))
    return zeros
