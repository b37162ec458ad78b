"""Replace layers of a model by PST modules, and look those up."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig, name_matches
from pst_ds.config.update_forms import BESIDE, LOW_RANK
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.quantization import Grid, StoredGrid
from pst_ds.core.tiles import TileBudgetError, least_tile_bytes, plan_tiles
from pst_ds.errors import InputError
from pst_ds.nn import experts
from pst_ds.nn.addition import AddedModule, added_modules
from pst_ds.nn.base_codes import BaseCodes, encode_base, mean_magnitudes
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.layer import CONSTANT_PARTS, PSTLayer
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.model_structure import modules_of
from pst_ds.nn.router import replace_routers, require_removable
from pst_ds.nn.sharded_weights import read_now
from pst_ds.nn.tables.coded import TableTarget, encode_tables, find_tables
from pst_ds.nn.tables.embedding import UpdatedTable, replace_embeddings, updated_tables
from pst_ds.nn.targets import (
    InjectionError,
    Target,
    find_embeddings,
    modules_named_to_save,
    put,
    resolve_targets,
    suggestion,
)
from pst_ds.parallel import sharding
from pst_ds.parallel.expert_parallel import ExpertGroup
from pst_ds.parallel.steps import unwrapped
from pst_ds.third_party import require

ModelT = TypeVar("ModelT", bound=nn.Module)
_OFF: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # fused for 1 and 2; the activation is another field
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused layer supports nested tensors
)
"""Switches of torch's fused encoder layer, which reads the weights of its layers instead of calling them."""
_BEFORE = "pst_fast_path"
"""Attribute in which a module keeps the value of its switch until :func:`restore_fused_layers`."""
_SPLIT_IS_SUPPORTED = "pst_split_is_supported"
"""Attribute of a model that FSDP2 has split, once :func:`settled_layers` has checked how."""


def inject_pst(
    model: ModelT,
    config: PSTConfig,
    *,
    num_shards: int | None = None,
    grid: Grid | None = None,
    base_grid: Grid | None = None,
    embedding_grid: Grid | None = None,
    expert_parallel: int = 1,
) -> ModelT:
    """Replace layers of ``model`` by PST modules, in place, and freeze the rest; return ``model``.

    Call it before ``deepspeed.initialize`` or ``fully_shard``. Collective under ``zero.Init``, where it gathers one
    layer at a time.

    Args:
        model: a model with its pretrained weights. On the meta device magnitude scales are 1.
        config: the layers to prune, the factors, and what else is trained; kept as ``model.pst_config``.
        num_shards: number of ranks over which ZeRO-3 will partition the weights. None: as ``zero.Init`` did, else masks
            are for FSDP2 or whole weights.
        grid: quantisation scheme of the pruned weights once :func:`round_weights` is called; None for never.
        base_grid: quantisation scheme of W0, stored as int8 or int4 values with scales from now on; None for none.
        embedding_grid: the same for the frozen token embedding of a transformers model, and for its output layer.
        expert_parallel: number of neighbouring ranks that divide the experts of every stack among them. Needs
            ``zero.Init``; only checkpoints of `pst-ds train` can hold them.

    Raises:
        InjectionError: a layer cannot be pruned, or a name matches none; see :func:`pst_ds.nn.targets.resolve_targets`.
        InputError: FSDP2 or tensor parallelism has split the model already.
    """
    if pst_layers(model):
        raise InjectionError("the model already has PST modules; inject into the base model, once")
    sharding.require_weights_everywhere()
    sharding.refuse_dtensors(model.named_parameters(), "Call inject_pst first, on whole weights, and then fully_shard")
    # Names and settings are checked first, so that an error leaves the model unchanged.
    targets = resolve_targets(model, config)
    embeddings = find_embeddings(model, config)
    removes_experts = parse_pattern(config.pattern).kind == "experts"
    if removes_experts:
        require_removable(model)
    _require_settings_fit(targets, config, grid, base_grid)
    tables: list[TableTarget] = []
    if embedding_grid:
        pruned = {target.module for target in targets}
        tables = find_tables(model=model, config=config, grid=embedding_grid, pruned=pruned)
    if expert_parallel > 1:
        targets = _divided(targets, expert_parallel)
    shards = {target.name: _shards_of(target, num_shards) for target in targets}
    bases: dict[str, BaseCodes] = {}
    if base_grid:
        # Each weight is freed once it is encoded, so that the model is never held twice.
        from_zeros = config.initial_mask == "zeros"
        for target in targets:
            bases[target.name] = encode_base(target, base_grid, shards[target.name], from_zeros=from_zeros)
    # Encoding has read its weights from the files; the others are read now, since scales need their values.
    read_now(model.parameters())
    scales = _magnitude_scales(targets, bases, config)
    encode_tables(tables)
    model.requires_grad_(False)
    if removes_experts:
        replace_routers(model, targets, config)
    for target in targets:
        _replace(
            target=target,
            config=config,
            num_shards=shards[target.name],
            scales=scales[target.name],
            grid=grid,
            base=bases.get(target.name),
        )
    # An experts module holds two stacks, and is switched once.
    stacks = [target.module for target in targets if target.is_stack]
    experts.switch_on(dict.fromkeys(stacks))
    _switch_fused_layers_off(model)
    replace_embeddings(model, embeddings, config)
    # After the replacement, since the factors belong to the new layers.
    for param in configured_parameters(model, config):
        param.requires_grad_(True)
    model.pst_config = config  # type: ignore[assignment]
    return model


def _divided(targets: Sequence[Target], degree: int) -> list[Target]:
    """Leave each of ``degree`` neighbouring ranks its share of the experts of every stack. Collective, not on the meta
    device. Raises InjectionError for stacks that cannot be divided.
    """
    pruned = Counter(target.module for target in targets if target.is_stack)
    lead = f"expert_parallel = {degree}"
    if not pruned:
        raise InjectionError(f"{lead}: no stack of experts is pruned. Set it to 1, or prune the experts")
    for target in targets:
        num_stacks = pruned[target.module]  # 0 for a linear layer
        # An expert is computed on the rank that owns it, which needs its part of both stacks.
        if num_stacks == 1:
            raise InjectionError(
                f"{lead}: {target.name} is pruned, and the other stack is not. Prune both, or set it to 1"
            )
        num_experts = target.layout.num_experts
        if num_stacks and num_experts % degree:
            raise InjectionError(
                f"{lead} does not divide the {num_experts} experts of {target.name}. Set it to a divisor"
            )
    # On the meta device, as for a plan, layers keep the shapes of the whole model.
    if targets[0].weight.is_meta:
        return list(targets)
    if not sharding.divides_experts(targets[0].weight):
        raise InjectionError(
            f"{lead}: the model was not loaded under deepspeed.zero.Init. Load it there, or set it to 1"
        )
    group = ExpertGroup.of_neighbours(degree)
    divided = []
    for target in targets:
        if target.is_stack:
            setattr(target.module, target.parameter, group.own_experts(target.weight))
            target = replace(target, group=group)
        divided.append(target)
    return divided


def _replace(
    target: Target,
    config: PSTConfig,
    num_shards: int | None,
    scales: tuple[float, ...],
    grid: Grid | None,
    base: BaseCodes | None,
) -> None:
    """Replace a target by a PST layer. ``scales``: magnitude scales, one for each matrix."""
    weight = None if base else target.weight  # the codes replace it
    stored = base.codes if base else target.weight
    bias = None
    kind: type[PSTLayer] = PSTExpertStack
    if target.is_stack:
        del target.module._parameters[target.parameter]  # the layer takes its place; biases of experts stay
        config = config.of_experts
    else:
        bias = target.module.bias
        kind = PSTLinear
    layer = kind(
        name=target.name,
        weight=weight,
        bias=bias,
        layout=target.layout,
        rule=target.rule,
        config=config,
        num_shards=num_shards,
        magnitude_scales=scales,
        grid=grid,
        base=base,
        group=target.group,
    )
    # Under ZeRO-3 the mask and the factors become partitioned as the weight is.
    sharding.split_as(stored, layer.parameters(recurse=False))
    layer.train(target.module.training)
    put(layer, target.places)


def _magnitude_scales(
    targets: Sequence[Target], bases: dict[str, BaseCodes], config: PSTConfig
) -> dict[str, tuple[float, ...]]:
    """Return the divisors of |W| in the scores, one per matrix of each target; 1 where |W| is the only term."""
    pools = any(target.rule.pattern.pools_matrices for target in targets)
    if config.relative_magnitude and (config.has_scores or pools) and not targets[0].weight.is_meta:
        return mean_magnitudes(targets, bases)
    return {target.name: (1.0,) * target.layout.num_matrices for target in targets}


def configured_parameters(model: nn.Module, config: PSTConfig) -> set[nn.Parameter]:
    """Return the parameters of an injected ``model`` that ``config`` trains, whether or not they have a gradient now.

    They are the factors, modules trained in full, those of additions, and trained pruned weights.
    """
    params: set[nn.Parameter] = set()
    for name, param in model.named_parameters():
        part = name.rpartition(".")[2]
        if part.startswith("pst_") and part not in CONSTANT_PARTS:
            params.add(param)
    for module in modules_named_to_save(model, config).values():
        params.update(module.parameters())
    for added in added_modules(model).values():
        params.update(added.parameters())
    if config.train_weights:
        for layer in pst_layers(model).values():
            if layer.weight is not None:
                params.add(layer.weight)
    return params


def injected_config(model: nn.Module) -> PSTConfig:
    """Return the config that ``model`` was injected with. Raises InputError if it was not injected, or only in part."""
    config = vars(model).get("pst_config")
    if isinstance(config, PSTConfig):
        return config
    if pst_layers(model):
        raise InputError(
            f"inject_pst was called on a part of this {type(model).__name__}, and only a whole model with its config "
            "can be saved or loaded. Inject the whole model, and name the part by target_modules and modules_to_save"
        )
    raise InputError(f"this {type(model).__name__} has no PST layers; call inject_pst(model, PSTConfig(...)) first")


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, Parameter) of everything in an adapter state besides masks, in model order.

    These are the parameters that the config trains, even if they were frozen since, and all others with a gradient.
    """
    inner = unwrapped(model)
    settled_layers(inner)
    config = vars(inner).get("pst_config")
    configured: set[nn.Parameter] = set()
    if isinstance(config, PSTConfig):  # a model of which only a part was injected has no config
        configured = configured_parameters(inner, config)
    trained: list[tuple[str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        if param.requires_grad or param in configured:
            trained.append((name, param))
    return trained


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a state dict, by name: constants and running statistics, which are not trained."""
    buffers: dict[str, Tensor] = {}
    for owner, module in model.named_modules():
        for name, buffer in module._buffers.items():
            # torch has no public list of the persistent buffers of one module.
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers[f"{owner}.{name}" if owner else name] = buffer
    return buffers


def pst_layers(model: nn.Module) -> dict[str, PSTLayer]:
    """Return the PST layers of ``model`` by name, in model order; a shared layer once."""
    return modules_of(model, PSTLayer)


def settled_layers(model: nn.Module) -> dict[str, PSTLayer]:
    """Return :func:`pst_layers` after releasing what FSDP2 keeps gathered of ``model`` after a pass.

    Functions call this first if they read or write the values of a model that ``fully_shard`` may have split: those
    that make optimizer groups, update masks or scales, save, load and merge. What they wrote to a gathered parameter
    would be lost. Not collective.

    Raises InputError for layers that are split in a way that PST does not support.
    """
    sharding.release(model)
    layers = pst_layers(model)
    if not vars(model).get(_SPLIT_IS_SUPPORTED, False):
        sharding.require_supported(model.named_parameters())
        # fully_shard can still be called on a model that is not split, and can never be undone on one that is
        if _is_split_alike(layers):
            setattr(model, _SPLIT_IS_SUPPORTED, True)
    return layers


def _is_split_alike(layers: dict[str, PSTLayer]) -> bool:
    """Return whether FSDP2 splits the layers. Raises InputError unless it splits all parameters of all layers over the
    same ranks, or none.
    """
    params: list[tuple[str, nn.Parameter]] = []
    flat: list[str] = []
    for name, layer in layers.items():
        params += layer.named_parameters(prefix=name, recurse=False)
        if not layer.mask_rows:
            flat.append(name)
    sharding.require_alike(params)
    split_by_rows = any(sharding.splits_rows(param) for _, param in params)
    if split_by_rows and flat:
        raise InputError(
            f"FSDP2 has split {flat[0]}, whose mask or quantised base is laid out for other shards. Call inject_pst "
            "without num_shards and base_grid, or train under DeepSpeed ZeRO-3"
        )
    return split_by_rows


def has_update_beside(model: nn.Module) -> bool:
    """Return whether U V of a layer of ``model`` is added to its output: ``update_form = "beside"``."""
    return any(layer.constants.form.is_beside and layer.update_specs for layer in pst_layers(model).values())


def plain_name(name: str, layer: PSTLayer) -> str:
    """Return the name of the PST layer's weight in the original model, where it has the layer's ``weight_shape``."""
    if isinstance(layer, PSTExpertStack):
        # a stack is a Parameter there, not a module with a weight
        return name
    return f"{name}.weight"


def layers_never_called(model: nn.Module) -> list[str]:
    """Return the names of the PST layers that no forward pass of this process has called so far, in model order.

    An expert without tokens, or a layer skipped by layerdrop, may be called later. Others are unused, or surrounding
    code reads their weights directly, so that mask and update have no effect.
    """
    never_called: list[str] = []
    for name, layer in pst_layers(model).items():
        if not layer.was_called:
            never_called.append(name)
    return never_called


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Make ``model`` compute like its dense base inside the context: without masks, updates and additions."""
    modules: list[PSTLayer | UpdatedTable | AddedModule] = [*pst_layers(model).values()]
    modules += updated_tables(model).values()
    modules += added_modules(model).values()
    for module in modules:
        module.bypassed = True
    try:
        yield
    finally:
        for module in modules:
            module.bypassed = False


def freeze_scores(model: nn.Module, *, frozen: bool = True) -> None:
    """Stop the gradient of the scores, and of |W| through them, once the masks are fixed.

    ``frozen=False`` undoes this for models that were injected with trained scores.
    """
    config: PSTConfig | None = getattr(model, "pst_config", None)
    can_train = config is not None and config.has_scores
    for layer in pst_layers(model).values():
        layer.scores_train = can_train and not frozen


def round_weights(model: nn.Module, *, rounds: bool = True) -> None:
    """Start or stop quantising M . W, of every layer with a grid."""
    for layer in pst_layers(model).values():
        layer.rounds = rounds and layer.stored_grid is not None


def _switch_fused_layers_off(model: nn.Module) -> None:
    """Make every nn.TransformerEncoder and its layers call the PST layers inside them, in evaluation too."""
    for module in model.modules():
        for kind, switch, off in _OFF:
            if isinstance(module, kind) and modules_of(module, PSTLinear):
                setattr(module, _BEFORE, require(module, switch))
                setattr(module, switch, off)


def restore_fused_layers(model: nn.Module) -> None:
    """Undo the switches of torch's fused encoder layers, once ``model`` has no PST layers."""
    for module in model.modules():
        for kind, switch, _ in _OFF:
            if isinstance(module, kind) and _BEFORE in vars(module):
                setattr(module, switch, vars(module).pop(_BEFORE))


def _shards_of(target: Target, num_shards: int | None) -> int | None:
    if not sharding.is_partitioned(target.weight):
        return num_shards
    shards = sharding.num_shards(target.weight)
    if num_shards not in (None, shards):
        raise InjectionError(f"{target.weight_name} is split over {shards} ranks, not num_shards = {num_shards}")
    return shards


def _require_fit(target: Target, config: PSTConfig, grid: Grid | None, base_grid: Grid | None) -> None:
    """Raise InjectionError for a pattern, quantisation scheme or rank that does not fit a target."""
    leave_dense = f'exclude_modules = ["{target.name}"]'
    try:
        target.rule.pattern.require_fit(target.layout)
    except ValueError as error:
        raise InjectionError(
            f"{target.name}: {error}. Leave it out with {leave_dense}, or give it another pattern: "
            f'overrides = [{{modules = ["{target.name}"], pattern = "matrix", final_sparsity = …}}]'
        ) from None
    for scheme, subject in ((grid, ""), (base_grid, "the base: ")):
        if scheme is None:
            continue
        try:
            StoredGrid(target.layout, scheme)
        except ValueError as error:
            message = f"{target.name}: {subject}{error}; or leave the layer out with {leave_dense}"
            raise InjectionError(message) from None
    if target.is_stack:
        _require_rank_fits(target, config)
        if config.update_form == BESIDE and config.of_experts.update_rank > 0:
            raise InjectionError(
                f'update_form = "{BESIDE}" is for linear layers, and {target.name} is a stack of experts. Set '
                f'expert_rank = 0, or update_form = "{LOW_RANK}"'
            )


def _require_rank_fits(target: Target, config: PSTConfig) -> None:
    """Raise InjectionError if the factors of a stack have a higher rank than its matrices can have."""
    expert = target.layout.expert
    rows = expert.out_features // expert.num_matrices
    most = min(rows, expert.in_features)
    if max(config.of_experts.score_rank, config.of_experts.update_rank) > most:
        raise InjectionError(
            f"{target.name} has matrices of {rows} x {expert.in_features}, and the rank of their factors, expert_rank "
            f"= {config.expert_rank}, is higher; set it to at most {most}"
        )


def _require_settings_fit(
    targets: Sequence[Target], config: PSTConfig, grid: Grid | None, base_grid: Grid | None
) -> None:
    for target in targets:
        _require_fit(target=target, config=config, grid=grid, base_grid=base_grid)
    _require_overrides_match(targets, config)
    if base_grid is not None and config.train_weights:
        raise InjectionError(
            f"train_weights = True trains the weights, and base_grid ({base_grid}) keeps them frozen in few bits; "
            "leave one of them out"
        )
    # If the layer that needs most memory can be cut into tiles, all can.
    largest = max(targets, key=_least_tile_bytes)
    itemsize = largest.weight.element_size()
    try:
        plan_tiles(largest.layout.expert, itemsize, config.tile_bytes, name=largest.name)
    except TileBudgetError as error:
        raise InjectionError(str(error)) from None


def _least_tile_bytes(target: Target) -> int:
    return least_tile_bytes(target.layout.expert, target.weight.element_size())


def _require_overrides_match(targets: Sequence[Target], config: PSTConfig) -> None:
    for override in config.overrides:
        if any(name_matches(target.name, override.modules) for target in targets):
            continue
        asked = override.modules if isinstance(override.modules, str) else list(override.modules)
        endings = {target.name.rpartition(".")[2] for target in targets}
        shown = ", ".join(sorted(endings)[:12])
        raise InjectionError(
            f"overrides for {asked!r} match none of the pruned layers.{suggestion(override.modules, endings)} "
            f"Names seen: {shown}"
        )
