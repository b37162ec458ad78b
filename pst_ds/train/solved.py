"""The base model after a solve: a model folder in the run folder, to which checkpoints after the solve belong."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.atomic_files import atomic_folder, write_pieces
from pst_ds.checkpoint.retention import step_name
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.core.schedule import Schedules
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, SOLVED, STEP_FOLDER, step_folders
from pst_ds.formats.base_weights import BaseWeights, is_text_part, names_in_files
from pst_ds.formats.safetensors_file import header_and_slots, tensor_bytes
from pst_ds.nn.inject import plain_name, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import plain_tensors
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import is_main, of_main, raise_together
from pst_ds.train.run_context import RunContext
from pst_ds.writing.from_folder import copy_small_files
from pst_ds.writing.plan import require_space


def solved_folder(run: RunConfig, solve: int) -> Path:
    """Return the folder of the weights after the solve at step ``solve``."""
    return Path(run.output_dir) / SOLVED / step_name(solve)


def write_base(context: RunContext, model: nn.Module, solve: int) -> Path:
    """Write the weights of the pruned layers and the other tensors of model.path as a model folder, atomically.

    Collective; gathers one weight at a time. Raises InputError and OSError on every rank.
    """
    run = context.run
    out = solved_folder(run, solve)
    layers = pst_layers(model)
    tensors = of_main(lambda: planned(context, layers))
    weights = _whole_weights(layers, tensors)
    problem: Exception | None = None
    if is_main():
        try:
            _write(BaseWeights(run.model.path, ""), tensors, weights, out)
        except (InputError, OSError) as error:
            problem = error
    # Gathering a weight is collective: ranks that do not write, and rank 0 after an error, still join in the rest.
    for _ in weights:
        pass
    raise_together(problem)
    return out


def remove_unused(run: RunConfig, schedules: Schedules) -> None:
    """Remove the folders of solves that no checkpoint belongs to. No process may be writing one."""
    folder = Path(run.output_dir)
    needed = set()
    for checkpoint in step_folders(folder / CHECKPOINTS):
        step = int(checkpoint.name.removeprefix("step-"))
        needed.add(step_name(schedules.last_solve(step)))
    for path in (folder / SOLVED).glob("step-*"):
        if STEP_FOLDER.fullmatch(path.name) and path.name not in needed:
            shutil.rmtree(path)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the file of a solved base."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layer: str
    """Name of the pruned layer that has the weight; "" for a tensor that is copied from model.path."""


def planned(context: RunContext, layers: Mapping[str, PSTLayer]) -> dict[str, PlannedTensor]:
    """Return the tensors of a solved base by name, in the order of the file. Raises InputError."""
    run = context.run
    shapes = context.resolved.shapes.model
    base = BaseWeights(run.model.path, getattr(shapes, "base_model_prefix", ""))
    is_text_part(shapes, base.folder)
    tensors = plain_tensors(shapes)
    saved = {name: in_files for in_files, name in names_in_files(shapes, tensors).items()}
    layer_of_tensor: dict[str, str] = {}
    for layer_name, layer in layers.items():
        weight_name = plain_name(layer_name, layer)
        name_in_base: str | None = weight_name
        if weight_name not in base.names:
            # transformers renames some tensors on loading, and a base without a head lacks its prefix
            name_in_base = base.find(saved.get(weight_name, "")) or base.find(weight_name)
        if name_in_base is None:
            raise ConfigError(
                f"schedule.solves = {run.schedule.solves}: {weight_name} is stored under other names in {base.folder}. "
                "Set schedule.solves = 0"
            )
        layer_of_tensor[name_in_base] = layer_name
    sizes = {name: base.size(name) for name in base.names}
    for name, layer_name in layer_of_tensor.items():
        dtype, shape = sizes[name]
        # a solve changes weights in the run's precision, which the file must not round
        sizes[name] = (torch.promote_types(dtype, layers[layer_name].dtype), shape)
    _, slots, _ = header_and_slots(sizes)
    tensors_of_file = {}
    for name, slot in slots.items():
        tensors_of_file[name] = PlannedTensor(slot.dtype, slot.shape, layer_of_tensor.get(name, ""))
    return tensors_of_file


def _whole_weights(layers: Mapping[str, PSTLayer], tensors: Mapping[str, PlannedTensor]) -> Iterator[Tensor]:
    """Yield the weights of the pruned layers in the order of the file, on the CPU. Collective."""
    for tensor in tensors.values():
        if tensor.layer:
            weight = layers[tensor.layer].weight
            assert weight is not None
            with sharding.gathered([weight]):
                # a copy also on a CPU, where the gathered weight is released after the block
                whole = weight.detach().to("cpu", copy=True)
            yield whole.view(tensor.shape)


def _write(base: BaseWeights, tensors: Mapping[str, PlannedTensor], weights: Iterator[Tensor], out: Path) -> None:
    header, _, size = header_and_slots({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    require_space(out, size)
    out.parent.mkdir(exist_ok=True)
    with atomic_folder(out) as folder:
        values = map(tensor_bytes, _values(base, tensors, weights))
        write_pieces(folder / "model.safetensors", chain([header], values))
        copy_small_files(base.folder, folder)


def _values(base: BaseWeights, tensors: Mapping[str, PlannedTensor], weights: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors of the file one by one, so that only one is in memory: those of layers from ``weights``."""
    for name, tensor in tensors.items():
        if tensor.layer:
            yield next(weights).to(tensor.dtype)
        else:
            yield base.read(name).contiguous()
