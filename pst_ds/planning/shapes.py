"""Sizes of a model for the cost formulas, read from names and shapes, also on the meta device."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from pst_ds.core.coded_weight import slice_numel
from pst_ds.core.experts.grouped import experts_at_once, merges
from pst_ds.core.kernels.triton.merge import supports
from pst_ds.core.layout import row_tiles
from pst_ds.core.tiles import plan_tiles
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import experts_per_token, is_linear, linear_shape, model_width, text_config
from pst_ds.nn.tables.coded import CodedOutput, coded_tables
from pst_ds.parallel import sharding
from pst_ds.planning.memory import layer_work_bytes
from pst_ds.planning.model_numbers import MatrixGroup, ModelNumbers, ModuleNumbers, TensorGroup
from pst_ds.planning.start import BlockSizes, InputGroup
from pst_ds.prune.blocks import block_of, find_blocks

FORM_BYTES = 4 * 6
"""Bytes per weight of a matrix that an update form without kernels needs at most, in fp32: W0, the updated weight, its
gradient, and the products that autograd keeps."""
Group = TypeVar("Group", TensorGroup, ModuleNumbers, MatrixGroup)


def model_numbers(model: nn.Module, *, device: str = "cpu") -> ModelNumbers:
    """Count an injected model, gathered or partitioned, with or without values, for training on "cpu" or "cuda"."""
    layers = pst_layers(model)
    tables = coded_tables(model).values()
    sliced = sum(math.prod(table.shape) for table in tables if isinstance(table, CodedOutput))
    return ModelNumbers(
        tensors=_tensors(model),
        modules=_counted(_module_numbers(module, device) for module in model.modules() if module._parameters),
        matrices=_counted(
            MatrixGroup(
                layer.layout.matrix_numel,
                share=_share_of_tokens(model, name, layer),
                per_layer=layer.layout.num_matrices if layer.layout.num_experts > 1 else 1,
                by_kernels=_by_kernels(layer),
                kind=layer.rule.pattern.kind,
            )
            for name, layer in layers.items()
            for _ in layer.layout.matrices()
        ),
        score_rank=max((_rank(layer, "B") for layer in layers.values()), default=0),
        update_rank=max((_rank(layer, "V") for layer in layers.values() if _has_kernels(layer)), default=0),
        updated_weights=sum(layer.layout.numel for layer in layers.values() if not _has_kernels(layer)),
        dense_weights=sliced + sum(math.prod(linear_shape(m)) for m in model.modules() if is_linear(m)),
        sliced_weights=sliced,
        attention_width=_attention_width(model),
        dispatch_width=_dispatch_width(model, layers),
        products=sum(layer.layout.in_features**2 for layer in layers.values()),
    )


def block_sizes(model: nn.Module, numbers: ModelNumbers) -> BlockSizes:
    """Count the largest block of an injected model with ``numbers``. Raises InputError for layers outside of blocks."""
    layers = pst_layers(model)
    outputs = Counter[tuple[str, int, int]]()
    stack, blocks = find_blocks(model, list(layers))
    sizes: Counter[int] = Counter()
    for name, layer in layers.items():
        sizes[block_of(name, stack)] += layer.layout.numel
    index, numel = sizes.most_common(1)[0]
    own = {name: layer for name, layer in layers.items() if block_of(name, stack) == index}
    for name, layer in own.items():  # the inputs of q, k and v are the same, and those of gate and up
        one = layer.layout.expert
        number = layer.layout.num_experts
        outputs[name if number > 1 else name.rpartition(".")[0], one.in_features, number] += one.out_features
    others = (module for module in blocks[index].modules() if not isinstance(module, PSTLayer))
    numel += sum(sharding.full_numel(param) for module in others for param in module.parameters(recurse=False))
    return BlockSizes(
        blocks=len(blocks),
        numel=numel,
        active_share=numbers.multiplied_weights / numbers.pruned_weights,
        groups=tuple(InputGroup(number, inputs, experts) for (_, inputs, experts), number in outputs.items()),
        largest_layer=max(layer.layout.numel for layer in own.values()),
        outside=max(0, numbers.parameters - numbers.factor_parameters - len(blocks) * numel),
        width=model_width(model),
        vocabulary=getattr(text_config(model), "vocab_size", 0),
    )


def _tensors(model: nn.Module) -> tuple[TensorGroup, ...]:
    layers = pst_layers(model).values()
    tables = coded_tables(model).values()
    factors = {id(param) for layer in layers for _, param in layer.factor_parameters()}
    masks, scales = ({id(getattr(layer, part)) for layer in layers} for part in ("pst_mask", "pst_scales"))
    coded = [(layer.layout.numel, layer.base_codes) for layer in layers if layer.base_codes is not None]
    stands_for = {id(base.codes): numel for numel, base in coded} | {id(base.scales): 0 for _, base in coded}
    stands_for |= {id(table.codes): math.prod(table.shape) for table in tables} | {id(t.scales): 0 for t in tables}
    in_stacks = {id(p) for layer in layers if isinstance(layer, PSTExpertStack) for p in layer.parameters()}
    groups = []
    for param in model.parameters():
        key = id(param)
        group = TensorGroup(sharding.full_numel(param), param.element_size(), 1, param.requires_grad)
        if key in factors:
            group = replace(group, kind="factor")
        elif key in masks:
            group = replace(group, kind="mask")
        elif key in scales:
            group = replace(group, kind="scales")
        groups.append(replace(group, stands_for=stands_for.get(key), in_stack=key in in_stacks))
    return _counted(groups)


def _share_of_tokens(model: nn.Module, name: str, layer: PSTLayer) -> float:
    """Return the share of all tokens that an expert gets according to the model's config; 1 for other layers."""
    if not isinstance(layer, PSTExpertStack):
        return 1.0
    config = model.get_submodule(name.rpartition(".")[0]).config
    chosen = experts_per_token(config)
    return min(1.0, chosen / layer.layout.num_experts)


def _dispatch_width(model: nn.Module, layers: dict[str, PSTLayer]) -> int:
    stacks = {name.rpartition(".")[0] for name, layer in layers.items() if isinstance(layer, PSTExpertStack)}
    chosen = sum(experts_per_token(model.get_submodule(name).config) for name in stacks)
    return chosen * model_width(model) if stacks else 0


def _rank(layer: PSTLayer, factor: str) -> int:
    """Return the rank of the pair that ends in ``factor``; 0 without it."""
    param = dict(layer.factor_parameters()).get(factor)
    return 0 if param is None else sharding.full_shape(param)[0] // layer.layout.num_matrices


def _attention_width(model: nn.Module) -> int:
    """Return heads x their width, summed over the layers, according to the config; 0 if it does not tell."""
    config = getattr(model, "config", None)
    num_layers = getattr(config, "num_hidden_layers", 0) or 0
    # Layers of Gemma 4 and others differ in size, and such a config has no answer for all of them.
    configs_of_layers = getattr(config, "per_layer_config", None) or [config] * num_layers
    total = 0
    for layer_config in configs_of_layers:
        heads = getattr(layer_config, "num_attention_heads", 0) or 0
        head_width = getattr(layer_config, "head_dim", 0) or 0
        total += heads * head_width or getattr(layer_config, "hidden_size", 0) or 0
    return int(total)


def _counted(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Merge equal groups into one with their count."""
    return tuple(replace(group, count=count) for group, count in Counter(groups).items())


def _module_numbers(module: nn.Module, device: str) -> ModuleNumbers:
    params = [p for p in module._parameters.values() if p is not None]
    by_dtype: Counter[object] = Counter()
    for param in params:
        by_dtype[param.dtype] += sharding.full_numel(param) * param.element_size()
    work = 0
    bands = 0
    by_kernels = True
    experts = 1
    groups = 0
    if isinstance(module, PSTLayer):
        by_kernels = _by_kernels(module)
        experts = module.layout.num_experts
        work = layer_work_bytes(module.layout.expert, module.dtype.itemsize, module.tile_bytes, device)
        if not _has_kernels(module):
            work += FORM_BYTES * module.layout.matrix_numel
        bands = _num_bands(module, device)
        if experts > 1 and merges(module.layout, module.dtype, device):
            at_once = experts_at_once(module.layout, module.dtype.itemsize, module.tile_bytes) if by_kernels else 0
            groups = -(-experts // at_once) if by_kernels else 0
            whole = module.layout.numel + 2 * at_once * module.layout.expert.numel
            work = max(work, module.dtype.itemsize * whole)
    elif isinstance(module, CodedOutput):
        work = slice_numel(*module.shape, device) * module.dtype.itemsize
    numel = sum(map(sharding.full_numel, params))
    sizes = by_dtype.values()
    gathers = sum(sizes), max(sizes, default=0)
    return ModuleNumbers(numel, *gathers, work, bands=bands, experts=experts, groups=groups, by_kernels=by_kernels)


def _has_kernels(layer: PSTLayer) -> bool:
    """Return whether kernels compute the layer's update, or there is none."""
    return layer.constants.form.has_kernels or not layer.update_specs


def _by_kernels(layer: PSTLayer) -> bool:
    weight = layer.weight  # None if it is stored quantised
    if weight is not None and weight.requires_grad:
        return False
    if not _has_kernels(layer):
        return False
    return supports(None if weight is None else weight.dtype, layer.layout.numel, layer.num_shards)


def _num_bands(layer: PSTLayer, device: str) -> int:
    """Count the bands of a backward pass, all experts included: rows that a tile and a fused matrix have in common."""
    one = layer.layout.expert
    tiles = plan_tiles(one, layer.dtype.itemsize, layer.tile_bytes, device_type=device)
    shared = (tile.meet(matrix.rect) for tile in tiles.rects for matrix in one.matrices())
    return layer.layout.num_experts * sum(
        len(list(row_tiles(part, tiles.band_elements))) for part in shared if part is not None
    )
