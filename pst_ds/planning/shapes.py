"""Sizes of a model for the cost formulas, read from names and shapes, also on the meta device."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import TypeVar

from torch import nn

from pst_ds.core.coded_weight import slice_numel
from pst_ds.core.experts.grouped import experts_at_once, merges
from pst_ds.core.kernels.triton.merge import supports
from pst_ds.core.layout import row_tiles
from pst_ds.core.tiles import plan_tiles
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.flat_factors import owners_of_factors
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import experts_per_token, is_linear, linear_shape, model_width, text_config
from pst_ds.nn.tables.coded import CodedOutput, coded_tables
from pst_ds.parallel import sharding
from pst_ds.planning.memory import layer_work_bytes
from pst_ds.planning.model_numbers import Kind, MatrixGroup, ModelNumbers, ModuleNumbers, TensorGroup
from pst_ds.planning.start import BlockSizes, InputGroup
from pst_ds.prune.blocks import block_of, find_blocks

FORM_BYTES = 4 * 6
"""Bytes per weight of a matrix that an update form without kernels needs at most, in fp32: W0, the updated weight, its
gradient, and the products that autograd keeps."""
Group = TypeVar("Group", TensorGroup, ModuleNumbers, MatrixGroup)


def model_numbers(model: nn.Module, *, device: str = "cpu", flats: Sequence[int] = ()) -> ModelNumbers:
    """Count an injected model, gathered or partitioned, with or without values, for training on "cpu" or "cuda".

    ``flats``: sizes of the flat parameters that will hold the factors, :func:`pst_ds.nn.flat_factors.flat_sizes`; empty
    if each factor stays a parameter.
    """
    layers = pst_layers(model)
    flattened: Set[nn.Parameter] = owners_of_factors(model).keys() if flats else set()
    sliced_weights = 0
    for table in coded_tables(model).values():
        if isinstance(table, CodedOutput):
            sliced_weights += math.prod(table.shape)
    dense_weights = sliced_weights
    modules: list[ModuleNumbers] = []
    for module in model.modules():
        # modules without parameters gather nothing
        if module._parameters:
            modules.append(_module_numbers(module, device, flattened))
        if is_linear(module):
            dense_weights += math.prod(linear_shape(module))
    flat_tensors: list[TensorGroup] = []
    if flats:
        # all factors have the precision of the run
        itemsize = next(iter(flattened)).element_size()
        flat_tensors = [TensorGroup(size, itemsize, trainable=True, kind="factor") for size in flats]
        flat_bytes = sum(flats) * itemsize
        modules.append(ModuleNumbers(sum(flats), flat_bytes, flat_bytes))
    matrices: list[MatrixGroup] = []
    score_rank = 0
    update_rank = 0
    updated_weights = 0
    products = 0
    for name, layer in layers.items():
        group = _matrix_group(model, name, layer)
        matrices.extend([group] * layer.layout.num_matrices)
        score_rank = max(score_rank, _rank(layer, "B"))
        if _has_kernels(layer):
            update_rank = max(update_rank, _rank(layer, "V"))
        else:
            # without kernels, a mask update makes a copy of the updated weight
            updated_weights += layer.layout.numel
        products += layer.layout.in_features**2
    return ModelNumbers(
        tensors=_counted([*_tensors(model, flattened), *flat_tensors]),
        modules=_counted(modules),
        matrices=_counted(matrices),
        score_rank=score_rank,
        update_rank=update_rank,
        updated_weights=updated_weights,
        dense_weights=dense_weights,
        sliced_weights=sliced_weights,
        attention_width=_attention_width(model),
        dispatch_width=_dispatch_width(model, layers),
        products=products,
        flattened_factors=len(flattened),
        flat_parameters=len(flats),
    )


def _matrix_group(model: nn.Module, name: str, layer: PSTLayer) -> MatrixGroup:
    """Return one matrix of ``layer``; the layer has ``num_matrices`` of them."""
    per_layer = 1
    if layer.layout.num_experts > 1:
        # most experts lie within one shard, so that a rank selects them alone
        per_layer = layer.layout.num_matrices
    return MatrixGroup(
        layer.layout.matrix_numel,
        share=_share_of_tokens(model, name, layer),
        per_layer=per_layer,
        by_kernels=_by_kernels(layer),
        kind=layer.rule.pattern.kind,
    )


def block_sizes(model: nn.Module, numbers: ModelNumbers) -> BlockSizes:
    """Count the largest block of an injected model with ``numbers``. Raises InputError for layers outside of blocks."""
    layers = pst_layers(model)
    stack, blocks = find_blocks(model, list(layers))
    layers_of_blocks: dict[int, dict[str, PSTLayer]] = {}
    sizes: Counter[int] = Counter()
    for name, layer in layers.items():
        number = block_of(name, stack)
        layers_of_blocks.setdefault(number, {})[name] = layer
        sizes[number] += layer.layout.numel
    index, numel = sizes.most_common(1)[0]
    own = layers_of_blocks[index]
    outputs = Counter[tuple[str, int, int]]()  # outputs by what their inputs are: module, width, experts
    for name, layer in own.items():
        one = layer.layout.expert
        experts = layer.layout.num_experts
        # layers of one parent have the same inputs: q, k and v, or gate and up; stacks are counted separately
        place = name
        if experts == 1:
            place = name.rpartition(".")[0]
        outputs[place, one.in_features, experts] += one.out_features
    for module in blocks[index].modules():
        if not isinstance(module, PSTLayer):
            numel += sum(map(sharding.full_numel, module.parameters(recurse=False)))
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


def _tensors(model: nn.Module, flattened: Set[nn.Parameter]) -> list[TensorGroup]:
    """Return the parameters of ``model`` without the ``flattened`` factors, each as a group of one."""
    kinds: dict[nn.Parameter, Kind] = {}
    stands_for: dict[nn.Parameter, int] = {}
    in_stacks: set[nn.Parameter] = set()
    for layer in pst_layers(model).values():
        kinds[layer.pst_mask] = "mask"
        if layer.pst_scales is not None:
            kinds[layer.pst_scales] = "scales"
        for _, factor in layer.factor_parameters():
            kinds[factor] = "factor"
        if layer.base_codes is not None:
            stands_for[layer.base_codes.codes] = layer.layout.numel
            stands_for[layer.base_codes.scales] = 0
        if isinstance(layer, PSTExpertStack):
            in_stacks.update(layer.parameters())
    for table in coded_tables(model).values():
        stands_for[table.codes] = math.prod(table.shape)
        stands_for[table.scales] = 0
    groups: list[TensorGroup] = []
    for param in model.parameters():
        if param in flattened:
            continue
        group = TensorGroup(
            sharding.full_numel(param),
            param.element_size(),
            trainable=param.requires_grad,
            kind=kinds.get(param, "weight"),
            stands_for=stands_for.get(param),
            in_stack=param in in_stacks,
        )
        groups.append(group)
    return groups


def _share_of_tokens(model: nn.Module, name: str, layer: PSTLayer) -> float:
    """Return the share of all tokens that an expert gets according to the model's config; 1 for other layers."""
    if not isinstance(layer, PSTExpertStack):
        return 1.0
    config = model.get_submodule(name.rpartition(".")[0]).config
    chosen = experts_per_token(config)
    return min(1.0, chosen / layer.layout.num_experts)


def _dispatch_width(model: nn.Module, layers: dict[str, PSTLayer]) -> int:
    """Return values that a token sends to its experts, summed over the blocks with experts."""
    experts_modules = {name.rpartition(".")[0] for name, layer in layers.items() if isinstance(layer, PSTExpertStack)}
    if not experts_modules:
        return 0
    chosen = sum(experts_per_token(model.get_submodule(name).config) for name in experts_modules)
    return chosen * model_width(model)


def _rank(layer: PSTLayer, factor: str) -> int:
    """Return the rank of the pair that ends in ``factor``; 0 without it."""
    param = dict(layer.factor_parameters()).get(factor)
    if param is None:
        return 0
    return sharding.full_shape(param)[0] // layer.layout.num_matrices


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


def _module_numbers(module: nn.Module, device: str, flattened: Set[nn.Parameter]) -> ModuleNumbers:
    """Return what ZeRO-3 gathers for a module, and the memory of its product."""
    params = [p for p in module._parameters.values() if p is not None and p not in flattened]
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
            at_once = 0
            if by_kernels:
                at_once = experts_at_once(module.layout, module.dtype.itemsize, module.tile_bytes)
                groups = -(-experts // at_once)
            # M . W of the whole stack, and gradients of the experts at once
            whole = module.layout.numel + 2 * at_once * module.layout.expert.numel
            work = max(work, module.dtype.itemsize * whole)
    elif isinstance(module, CodedOutput):
        work = slice_numel(*module.shape, device) * module.dtype.itemsize
    numel = sum(map(sharding.full_numel, params))
    sizes = by_dtype.values()
    gathers = sum(sizes), max(sizes, default=0)
    return ModuleNumbers(numel, *gathers, work, bands=bands, experts=experts, groups=groups, by_kernels=by_kernels)


def _has_kernels(layer: PSTLayer) -> bool:
    """Return whether kernels compute the layer's weight: with the update U V, or without an update of the weight."""
    return layer.constants.form.is_product or not layer.update_specs


def _by_kernels(layer: PSTLayer) -> bool:
    """Return whether a GPU's kernels merge the layer's weight."""
    if not _has_kernels(layer):
        return False
    dtype = None  # of a weight that is stored quantised
    if layer.weight is not None:
        dtype = layer.weight.dtype
        if layer.weight.requires_grad:
            return False
    return supports(dtype, layer.layout.numel, layer.num_shards)


def _num_bands(layer: PSTLayer, device: str) -> int:
    """Count the bands of a backward pass, all experts included: rows that a tile and a fused matrix have in common."""
    one = layer.layout.expert
    tiles = plan_tiles(one, layer.dtype.itemsize, layer.tile_bytes, device_type=device)
    bands = 0
    for tile in tiles.rects:
        for matrix in one.matrices():
            shared = tile.meet(matrix.rect)
            if shared is not None:
                bands += len(list(row_tiles(shared, tiles.band_elements)))
    return layer.layout.num_experts * bands
