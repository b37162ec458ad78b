"""Plan a cut of channels: the config of the smaller model, and what each block loses.

The config decides which tensors become smaller, and the rows that :mod:`pst_ds.prune.channel_rows` finds decide how.
What the two do not agree on is rejected before pruning starts.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.errors import InputError
from pst_ds.nn.cut_config import cut_config
from pst_ds.nn.model_structure import ExpertsModule, is_conv1d, is_experts, linear_shape, stack_layouts, stack_names
from pst_ds.nn.targets import Target, resolve_targets
from pst_ds.prune.blocks import Batch, BlockReplay, Calibration, Forward, Output, find_blocks
from pst_ds.prune.channel_rows import Rows, find_rows, probe_batch
from pst_ds.prune.model_files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Cut:
    """A layer of a block that loses inputs, with the outputs of other layers that make them."""

    layer: str
    """Name, in its block, of a linear layer or a module of experts."""
    rows: Rows
    channels: int
    """Inputs before the cut."""
    kept: int
    of_experts: bool

    def selections(self, block: nn.Module, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Return the dimension and the indices that stay, of the block's tensors by name.

        ``kept``: (kept,) int64; (E, kept) of experts, as the indices are then: the dimension is that of each expert's
        tensor.
        """
        module = block.get_submodule(self.layer)
        if self.of_experts:
            return self._of_stacks(module, kept)
        found = {f"{self.layer}.weight": (int(not is_conv1d(module)), kept)}
        for name, rows in self.rows.items():
            source, chosen = block.get_submodule(name), _merged(rows, kept)
            found[f"{name}.weight"] = int(is_conv1d(source)), chosen
            if source.bias is not None:
                found[f"{name}.bias"] = 0, chosen
        return found

    def _of_stacks(self, experts: ExpertsModule, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        first, last = stack_names(experts)
        rows = torch.stack([_merged(self.rows[first], own) for own in kept])
        found = {first: (int(experts.is_transposed), rows), last: (int(not experts.is_transposed), kept)}
        if experts.has_bias:
            found[f"{first}_bias"] = 0, rows
        return {f"{self.layer}.{name}": value for name, value in found.items()}


def _merged(indices: Tensor, kept: Tensor) -> Tensor:
    return indices[kept].flatten().sort().values


@dataclass(frozen=True, slots=True)
class CutPlan:
    """A planned cut of a model."""

    stack: str
    cuts: Sequence[Sequence[Cut]]
    """The cuts of each block."""
    targets: Mapping[str, Target]
    """The linear layers and stacks of the model, by name."""
    smaller: "PreTrainedModel"
    """The model after the cut, on the meta device."""
    settings: Mapping[str, object]
    """Settings of its config that change."""

    def target(self, index: int, cut: Cut) -> Target:
        """Return the linear layer or stack of block ``index`` that loses inputs."""
        name = f"{self.stack}.{index}.{cut.layer}"
        if cut.of_experts:
            name += "." + stack_names(self.smaller.get_submodule(name))[1]
        return self.targets[name]

    def smaller_block(self, index: int) -> nn.Module:
        return self.smaller.get_submodule(f"{self.stack}.{index}")


def plan_cut(files: ModelFiles, config: PruneConfig, excluded: str | tuple[str, ...], batch: Batch) -> CutPlan:
    """Plan what ``config`` asks to cut from the model in ``files``.

    ``excluded``: modules that are not cut, as in ``pst.exclude_modules``. ``batch``: any calibration data.

    Raises InputError for widths that do not divide, and for what the model or its config cannot express.
    """
    every = resolve_targets(files.model, PSTConfig(exclude_modules=excluded))
    targets = {target.name: target for target in every}
    stack, blocks = find_blocks(files.model, list(targets))
    changed = copy.deepcopy(files.model.config)
    assert config.ffn is not None
    settings = cut_config(changed, config.ffn)
    rows = _rows_of_blocks(files.unpruned(), stack, [t.name for t in every if not t.is_stack], batch)
    smaller, asked = files.skeleton(changed), " and ".join(f"{key} = {value}" for key, value in settings.items())
    cuts = [_cuts_of(block, smaller.get_submodule(f"{stack}.{i}"), rows[i]) for i, block in enumerate(blocks)]
    if not any(cuts):
        raise InputError(
            f"with {asked}, a {type(files.model).__name__} has the same shapes as before, so its config cannot express "
            "this. Prune weights with another method"
        )
    _require_explained(files.model, smaller, stack, cuts, asked)
    return CutPlan(stack, cuts, targets, smaller, settings)


def _rows_of_blocks(files: ModelFiles, stack: str, names: Sequence[str], batch: Batch) -> list[dict[str, Rows]]:
    """Return the rows of the linear layers ``names`` and of experts, by block. Blocks with equal layers are alike."""
    blocks = files.model.get_submodule(stack)
    assert isinstance(blocks, nn.ModuleList)
    probed = probe_batch(batch)
    data = Calibration([probed], torch.device("cpu"), torch.float32)
    replay = BlockReplay(files.model, files.source(stack, blocks), data)
    replay.take([(0, probed)])
    known: dict[object, dict[str, Rows]] = {}
    found = []
    with replay.in_place():
        for index, block in enumerate(blocks):
            prefix = f"{stack}.{index}."
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            layers = {name: block.get_submodule(name) for name in own}
            alike = tuple((name, *linear_shape(layer)) for name, layer in layers.items()), type(block)
            if alike not in known:
                with replay.resident(index):
                    probe = partial(_probe, layers, known.setdefault(alike, {}))
                    replay.run(index, keep_output=not index, compute=probe)
            found.append(known[alike] | _rows_of_experts(block))
    return found


def _probe(layers: Mapping[str, nn.Module], found: dict[str, Rows], forward: Forward) -> Output:
    found |= find_rows(forward, layers)
    return forward()


def _rows_of_experts(block: nn.Module) -> dict[str, Rows]:
    """Return the rows of the experts in a block, by the name of their module."""
    found: dict[str, Rows] = {}
    for name, module in block.named_modules():
        if is_experts(module):
            first, last = stack_names(module)
            channels = torch.arange(stack_layouts(module)[last].in_features).view(-1, 1)
            rows = channels
            if module.has_gate:
                gates = channels + len(channels) if module.is_concatenated else 2 * channels + 1
                rows = torch.cat([channels if module.is_concatenated else 2 * channels, gates], 1)
            found[name] = {first: rows}
    return found


def _cuts_of(block: nn.Module, smaller: nn.Module, rows: Mapping[str, Rows]) -> list[Cut]:
    """Return the cuts of the layers that have fewer inputs in the ``smaller`` block."""
    found = []
    for name, of_layer in rows.items():
        before, after = (_inputs_of(b.get_submodule(name)) for b in (block, smaller))
        if after < before:
            found.append(Cut(name, of_layer, before, after, is_experts(block.get_submodule(name))))
    return found


def _inputs_of(module: nn.Module) -> int:
    if is_experts(module):
        return stack_layouts(module)[stack_names(module)[1]].in_features
    return linear_shape(module)[1]


def _require_explained(
    model: nn.Module, smaller: nn.Module, stack: str, cuts: Sequence[Sequence[Cut]], asked: str
) -> None:
    """Raise InputError unless the ``cuts`` give every parameter its shape in the ``smaller`` model."""
    wanted = {name: tuple(param.shape) for name, param in smaller.named_parameters()}
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    for index, of_block in enumerate(cuts):
        block = model.get_submodule(f"{stack}.{index}")
        firsts = [(cut, _first(block, cut)) for cut in of_block]
        for name, (dim, stay) in block_selections(block, firsts).items():
            key, dim = f"{stack}.{index}.{name}", dim + stay.dim() - 1
            shapes[key] = (*shapes[key][:dim], stay.shape[-1], *shapes[key][dim + 1 :])
    wrong = next((name for name, shape in wanted.items() if shapes.get(name) != shape), None)
    if wrong is not None:
        raise InputError(
            f"with {asked}, {wrong} has the shape {wanted[wrong]}, and removing inputs and outputs gives "
            f"{shapes.get(wrong)}. A {type(model).__name__} cannot be cut. Prune weights with another method"
        )


def _first(block: nn.Module, cut: Cut) -> Tensor:
    module: ExpertsModule = block.get_submodule(cut.layer)
    first = torch.arange(cut.kept)
    return first.expand(module.num_experts, -1) if cut.of_experts else first


def block_selections(block: nn.Module, chosen: Sequence[tuple[Cut, Tensor]]) -> dict[str, tuple[int, Tensor]]:
    """Return :meth:`Cut.selections` of all ``chosen`` (cut, kept) of a block.

    Raises InputError if two cuts remove outputs of the same layer.
    """
    found: dict[str, tuple[int, Tensor]] = {}
    for cut, kept in chosen:
        for name, value in cut.selections(block, kept).items():
            if name in found:
                raise InputError(
                    f"{cut.layer}: {name} makes inputs of other layers too. Prune weights with another method"
                )
            found[name] = value
    return found
