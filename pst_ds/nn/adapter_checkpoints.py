"""A ``state_dict`` with only the parameters that training changes, for checkpoints that other code writes."""

from torch import Tensor, nn, no_grad
from torch.nn.modules.module import _IncompatibleKeys

from pst_ds.core.bits import relayout, shard_bytes
from pst_ds.nn.inject import adapter_parameters, pst_layers, settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import keep_frozen, omit_frozen

MASK_BITS = "pst_mask_bits"
"""Name of a full mask in a state dict, in place of ``pst_mask``, in the canonical form with one shard."""
MASK_SHARD = "pst_mask_shard"
"""Name of this rank's shard of a mask in a state dict under ZeRO-3."""
SCALES = "pst_scales"
"""Name of the bytes of all scales of a layer, in a state dict as in the layer."""
SCALES_SHARD = "pst_scales_shard"
"""Name of this rank's shard of them in a state dict under ZeRO-3."""
_PARTS = {"pst_mask": (MASK_BITS, MASK_SHARD), SCALES: (SCALES, SCALES_SHARD)}
"""Names of a full parameter and of a shard of it in a state dict, by the parameter's name."""
_HANDLES = "pst_adapter_checkpoints"
"""Attribute of a model with the hooks that :func:`whole_checkpoints` removes."""
_PREFIX = "pst_loading_prefix"
"""Attribute of a model while it loads: what wrappers put before its names. torch tells it to the first hook only."""
State = dict[str, Tensor]


def adapter_checkpoints(model: nn.Module) -> None:
    """Omit the frozen base from every checkpoint of ``model`` from now on.

    ``model.state_dict()`` then has the parameters that the config trains or that have a gradient, each once, the masks
    as ``NAME.pst_mask_bits``, scales of quantised weights, and buffers. ``load_state_dict`` accepts such a dict, also
    with ``strict``, and leaves the rest of the model unchanged. Under FSDP2 masks and scales are DTensors with their
    usual names, which any number of ranks can load. ``save_checkpoint`` of a DeepSpeed engine omits frozen parameters;
    under ZeRO-3 every rank then saves its shards of masks (``NAME.pst_mask_shard``) and scales, so that only the same
    number of ranks can load the checkpoint. Checkpoints saved without this call can still be loaded.

    Call it after ``inject_pst``, and after ``import deepspeed`` where that is used.
    """
    if hasattr(model, _HANDLES):
        return
    sharding.require_weights_everywhere()  # accelerate would send a state dict without the base
    handles = (
        model.register_state_dict_post_hook(_leave_out),
        model.register_load_state_dict_pre_hook(_load),
        model.register_load_state_dict_post_hook(_forgive),
    )
    setattr(model, _HANDLES, handles)
    omit_frozen(model)


def whole_checkpoints(model: nn.Module) -> None:
    """Undo :func:`adapter_checkpoints`."""
    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()
    keep_frozen(model)


def _leave_out(model: nn.Module, state: State, prefix: str, _metadata: object) -> None:
    """Remove the frozen base from ``state``, and rename its masks and scales."""
    for name in _names_left_out(model):
        state.pop(prefix + name, None)
    for name, layer in pst_layers(model).items():
        for part, (full_key, shard_key) in _PARTS.items():
            param = getattr(layer, part)
            if param is None or sharding.reshards_state_dicts(param):  # torch saves and loads FSDP2's on any ranks
                continue
            del state[f"{prefix}{name}.{part}"]
            own = sharding.shard_of(param).values
            # A clone: the next mask update writes into the parameter, and a state dict may be saved after it.
            if sharding.is_partitioned(param):
                state[f"{prefix}{name}.{shard_key}"] = own.clone()
            elif part == SCALES:
                state[f"{prefix}{name}.{full_key}"] = own.clone()
            else:
                state[f"{prefix}{name}.{full_key}"] = relayout(own, layer.layout.numel, layer.num_shards, 1)


def write_mask(layer: PSTLayer, bits: Tensor) -> None:
    """Write a full mask in the canonical form, or under ZeRO-3 this rank's shard of it."""
    sharding.write_whole(layer.pst_mask, relayout(bits, layer.layout.numel, 1, layer.num_shards))


@no_grad()
def _load(
    model: nn.Module,
    state: State,
    prefix: str,
    _metadata: object,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Load masks and scales from ``state``, which torch cannot find under these names."""
    setattr(model, _PREFIX, prefix)
    for name, layer in settled_layers(model).items():
        for part in _PARTS:
            problem = _load_part(layer, part, state=state, place=f"{prefix}{name}")
            if problem:
                errors.append(problem)


def _load_part(layer: PSTLayer, part: str, *, state: State, place: str) -> str:
    """Load the mask or the scales of a layer, called ``place`` in ``state``. Return a message if they do not fit."""
    param = getattr(layer, part)
    saved = state.get(f"{place}.{part}")
    if saved is not None and sharding.reshards_state_dicts(saved):
        return ""
    full_key, shard_key = _PARTS[part]
    full = state.pop(f"{place}.{full_key}", None)
    shard = state.pop(f"{place}.{shard_key}", None)
    if param is None or (full is None and shard is None):
        return ""
    # torch copies the parameter to itself then, and does not report it as missing.
    state[f"{place}.{part}"] = param.detach()
    if full is not None:
        num_bytes = shard_bytes(layer.layout.numel, 1)
        if part == SCALES:
            num_bytes = sharding.full_numel(param)
        if full.numel() != num_bytes:
            problem = f"has {full.numel()} bytes, not {num_bytes}. Load it into the model that saved it"
            return f"{place}.{full_key} {problem}"
        if part == SCALES:
            sharding.write_whole(param, full)
        else:
            write_mask(layer, full)
    elif shard is not None:
        own = layer.own_bits()
        if part == SCALES:
            own = sharding.shard_of(param).values
        if shard.shape != own.shape:
            problem = f"has {shard.numel()} bytes, not {own.numel()}. Load it on as many ranks as saved it"
            return f"{place}.{shard_key} {problem}"
        if part == SCALES:
            sharding.write_shard(param, shard)
        else:
            layer.write_own_bits(shard)
    return ""


def _forgive(model: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Drop the missing keys that were omitted on purpose; they have the prefix of the wrappers."""
    prefix = vars(model).pop(_PREFIX, "")
    left_out = {prefix + name for name in _names_left_out(model)}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in left_out]


def _names_left_out(model: nn.Module) -> set[str]:
    """Return the names of all parameters except an adapter state's and masks; tied parameters with every name."""
    kept = set(dict(adapter_parameters(model)))
    for name in pst_layers(model):
        for part in _PARTS:
            kept.add(f"{name}.{part}")
    # duplicates too, because a state dict has a tied parameter under every name
    return set(dict(model.named_parameters(remove_duplicate=False))) - kept
