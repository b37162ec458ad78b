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
        # A linear layer stores (O, I), a Conv1D (I, O): inputs are dimension 1 of one and 0 of the other.
        selections = {f"{self.layer}.weight": (int(not is_conv1d(module)), kept)}
        for name, rows in self.rows.items():
            source = block.get_submodule(name)
            outputs = _merged(rows, kept)
            selections[f"{name}.weight"] = (int(is_conv1d(source)), outputs)
            if source.bias is not None:
                selections[f"{name}.bias"] = (0, outputs)
        return selections

    def _of_stacks(self, experts: ExpertsModule, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Return :meth:`selections` of a module of experts; ``kept`` is (E, kept)."""
        first, last = stack_names(experts)
        # (E, outputs): the experts keep different channels
        outputs = torch.stack([_merged(self.rows[first], kept_of_expert) for kept_of_expert in kept])
        selections = {
            f"{self.layer}.{first}": (int(experts.is_transposed), outputs),
            f"{self.layer}.{last}": (int(not experts.is_transposed), kept),
        }
        if experts.has_bias:
            selections[f"{self.layer}.{first}_bias"] = (0, outputs)
        return selections


def _merged(indices: Tensor, kept: Tensor) -> Tensor:
    """Return the outputs that make the ``kept`` inputs, ascending; ``indices``: (inputs, outputs per input)."""
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
    targets: dict[str, Target] = {}
    linear_layers: list[str] = []
    for target in resolve_targets(files.model, PSTConfig(exclude_modules=excluded)):
        targets[target.name] = target
        if not target.is_stack:
            linear_layers.append(target.name)
    stack, blocks = find_blocks(files.model, list(targets))
    changed = copy.deepcopy(files.model.config)
    assert config.ffn is not None
    settings = cut_config(changed, config.ffn)
    rows = _rows_of_blocks(files.unpruned(), stack, linear_layers, batch)
    smaller = files.skeleton(changed)
    asked = " and ".join(f"{key} = {value}" for key, value in settings.items())
    cuts: list[list[Cut]] = []
    for index, block in enumerate(blocks):
        cuts.append(_cuts_of(block, smaller.get_submodule(f"{stack}.{index}"), rows[index]))
    if not any(cuts):
        raise InputError(
            f"with {asked}, a {type(files.model).__name__} has the same shapes as before, so its config cannot express "
            "this. Prune weights with another method"
        )
    _require_explained(files.model, smaller, stack, cuts, asked)
    return CutPlan(stack=stack, cuts=cuts, targets=targets, smaller=smaller, settings=settings)


def _rows_of_blocks(files: ModelFiles, stack: str, names: Sequence[str], batch: Batch) -> list[dict[str, Rows]]:
    """Return the rows of the linear layers ``names`` and of experts, by block. Blocks with equal layers are alike."""
    blocks = files.model.get_submodule(stack)
    assert isinstance(blocks, nn.ModuleList)
    probed = probe_batch(batch)
    data = Calibration([probed], torch.device("cpu"), torch.float32)
    replay = BlockReplay(files.model, files.source(stack, blocks), data)
    replay.take([(0, probed)])
    known: dict[object, dict[str, Rows]] = {}
    rows: list[dict[str, Rows]] = []
    with replay.in_place():
        for index, block in enumerate(blocks):
            prefix = f"{stack}.{index}."
            layers: dict[str, nn.Module] = {}
            for name in names:
                if name.startswith(prefix):
                    layers[name.removeprefix(prefix)] = block.get_submodule(name.removeprefix(prefix))
            shapes = tuple((name, *linear_shape(layer)) for name, layer in layers.items())
            kind = (shapes, type(block))
            if kind not in known:
                known[kind] = {}
                with replay.resident(index):
                    # Later blocks get the output of the first: which inputs become NaN does not depend on values.
                    probe = partial(_probe, layers, known[kind])
                    replay.run(index, keep_output=index == 0, compute=probe)
            rows.append(known[kind] | _rows_of_experts(block))
    return rows


def _probe(layers: Mapping[str, nn.Module], rows: dict[str, Rows], forward: Forward) -> Output:
    """Add to ``rows`` what makes the inputs of the ``layers`` of a block, and return the block's output."""
    rows |= find_rows(forward, layers)
    return forward()


def _rows_of_experts(block: nn.Module) -> dict[str, Rows]:
    """Return the rows of the experts in a block, by the name of their module."""
    rows_of: dict[str, Rows] = {}
    for name, module in block.named_modules():
        if not is_experts(module):
            continue
        first, last = stack_names(module)
        channels = torch.arange(stack_layouts(module)[last].in_features).view(-1, 1)  # (channels, 1)
        if not module.has_gate:
            rows = channels
        elif module.is_concatenated:  # all gates, then all values
            rows = torch.cat([channels, channels + len(channels)], 1)
        else:  # gate and value of a channel are neighbours
            rows = torch.cat([2 * channels, 2 * channels + 1], 1)
        rows_of[name] = {first: rows}
    return rows_of


def _cuts_of(block: nn.Module, smaller: nn.Module, rows: Mapping[str, Rows]) -> list[Cut]:
    """Return the cuts of the layers that have fewer inputs in the ``smaller`` block."""
    cuts: list[Cut] = []
    for name, rows_of_layer in rows.items():
        module = block.get_submodule(name)
        before = _inputs_of(module)
        after = _inputs_of(smaller.get_submodule(name))
        if after < before:
            cuts.append(Cut(layer=name, rows=rows_of_layer, channels=before, kept=after, of_experts=is_experts(module)))
    return cuts


def _inputs_of(module: nn.Module) -> int:
    """Return the inputs of a linear layer, or of the last matrix of each expert."""
    if is_experts(module):
        return stack_layouts(module)[stack_names(module)[1]].in_features
    return linear_shape(module)[1]


def _require_explained(
    model: nn.Module, smaller: nn.Module, stack: str, cuts: Sequence[Sequence[Cut]], asked: str
) -> None:
    """Raise InputError unless the ``cuts`` give every parameter its shape in the ``smaller`` model."""
    wanted = _shapes(smaller)
    shapes = _shapes(model)
    for index, cuts_of_block in enumerate(cuts):
        block = model.get_submodule(f"{stack}.{index}")
        # Shapes do not depend on which channels stay: the first ones are as good as any.
        chosen = [(cut, _first_channels(block, cut)) for cut in cuts_of_block]
        for name, (dimension, indices) in block_selections(block, chosen).items():
            key = f"{stack}.{index}.{name}"
            # The indices of experts are (E, kept), and their tensors have a dimension of experts before the others.
            position = dimension + indices.dim() - 1
            shapes[key] = (*shapes[key][:position], indices.shape[-1], *shapes[key][position + 1 :])
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise InputError(
                f"with {asked}, {name} has the shape {shape}, and removing inputs and outputs gives "
                f"{shapes.get(name)}. A {type(model).__name__} cannot be cut. Prune weights with another method"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, by name."""
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def _first_channels(block: nn.Module, cut: Cut) -> Tensor:
    """Return the indices of the first channels, as many as a cut keeps: (kept,), or (E, kept) of experts."""
    channels = torch.arange(cut.kept)
    if not cut.of_experts:
        return channels
    experts: ExpertsModule = block.get_submodule(cut.layer)
    return channels.expand(experts.num_experts, -1)


def block_selections(block: nn.Module, chosen: Sequence[tuple[Cut, Tensor]]) -> dict[str, tuple[int, Tensor]]:
    """Return :meth:`Cut.selections` of all ``chosen`` (cut, kept) of a block.

    Raises InputError if two cuts remove outputs of the same layer.
    """
    selections: dict[str, tuple[int, Tensor]] = {}
    for cut, kept in chosen:
        for name, selection in cut.selections(block, kept).items():
            if name in selections:
                raise InputError(
                    f"{cut.layer}: {name} makes inputs of other layers too. Prune weights with another method"
                )
            selections[name] = selection
    return selections
