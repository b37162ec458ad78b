"""The base model after a solve: a model folder in the run folder, to which checkpoints after the solve belong."""

import shutil
from collections.abc import Iterator, Mapping
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
    run, out, layers = context.run, solved_folder(context.run, solve), pst_layers(model)
    slots = of_main(lambda: planned(context, layers))
    weights = _whole_weights(layers, slots)
    problem: Exception | None = None
    if is_main():
        try:
            _write(BaseWeights(run.model.path, ""), slots, weights, out)
        except (InputError, OSError) as error:
            problem = error
    for _ in weights:  # ranks that do not write, and rank 0 after an error
        pass

    raise_together(problem)
    return out


def remove_unused(run: RunConfig, schedules: Schedules) -> None:
    """Remove the folders of solves that no checkpoint belongs to. No process may be writing one."""
    folder = Path(run.output_dir)
    needed = {step_name(schedules.last_solve(int(path.name[5:]))) for path in step_folders(folder / CHECKPOINTS)}
    for path in (folder / SOLVED).glob("step-*"):
        if STEP_FOLDER.fullmatch(path.name) and path.name not in needed:
            shutil.rmtree(path)


_Planned = dict[str, tuple[torch.dtype, tuple[int, ...], str]]
"""(dtype, shape, pruned layer that has the weight or "") of each tensor by its name, in the order of the file."""


def planned(context: RunContext, layers: Mapping[str, PSTLayer]) -> _Planned:
    """Plan the file of a solved base. Raises InputError."""
    run = context.run
    shapes = context.resolved.shapes.model
    base = BaseWeights(run.model.path, getattr(shapes, "base_model_prefix", ""))
    is_text_part(shapes, base.folder)
    tensors = plain_tensors(shapes)
    saved = {name: in_files for in_files, name in names_in_files(shapes, tensors).items()}
    owners = {}
    for name, layer in layers.items():
        own = plain_name(name, layer)
        in_base = own if own in base.names else base.find(saved.get(own, "")) or base.find(own)
        if in_base is None:
            raise ConfigError(
                f"schedule.solves = {run.schedule.solves}: {own} is stored under other names in {base.folder}. Set "
                "schedule.solves = 0"
            )
        owners[in_base] = name
    found = {name: base.size(name) for name in base.names}
    for in_base, name in owners.items():
        dtype, shape = found[in_base]
        found[in_base] = torch.promote_types(dtype, layers[name].dtype), shape
    order = header_and_slots(found)[1]
    return {name: (slot.dtype, slot.shape, owners.get(name, "")) for name, slot in order.items()}


def _whole_weights(layers: Mapping[str, PSTLayer], slots: _Planned) -> Iterator[Tensor]:
    """Yield the weights of the pruned layers in the order of the file, on the CPU. Collective."""
    for _, shape, name in slots.values():
        if name:
            weight = layers[name].weight
            assert weight is not None
            with sharding.gathered([weight]):
                whole = weight.detach().to("cpu", copy=True)
            yield whole.view(shape)


def _write(base: BaseWeights, slots: _Planned, weights: Iterator[Tensor], out: Path) -> None:
    header, _, size = header_and_slots({name: (dtype, shape) for name, (dtype, shape, _) in slots.items()})
    require_space(out, size)
    tensors = (
        next(weights).to(dtype) if owner else base.read(name).contiguous() for name, (dtype, _, owner) in slots.items()
    )
    out.parent.mkdir(exist_ok=True)
    with atomic_folder(out) as folder:
        write_pieces(folder / "model.safetensors", chain([header], map(tensor_bytes, tensors)))
        copy_small_files(base.folder, folder)
