"""A ``state_dict`` of what training changed and nothing else, for checkpoints that other code writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.bits import relayout, shard_bytes
from pst_ds.nn.inject import adapter_parameters, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import zero3
from pst_ds.parallel.engine import keep_frozen, omit_frozen

MASK_BITS, MASK_SHARD = "pst_mask_bits", "pst_mask_shard"
"""Names of a mask in a state dict, where ``pst_mask`` itself is left out: the whole mask in the canonical one-shard
form, and under ZeRO-3 this rank's shard."""
SCALES, SCALES_SHARD = "pst_scales", "pst_scales_shard"
"""Names of the bytes of a layer's scales in a state dict: whole, or under ZeRO-3 this rank's shard."""
_HANDLES, _PREFIX = "pst_adapter_checkpoints", "pst_loading_prefix"


def adapter_checkpoints(model: nn.Module) -> None:
    """Leave the frozen base out of every checkpoint of ``model`` from now on.

    ``model.state_dict()`` then has what the config trains and what else has a gradient, each once, the masks as
    ``NAME.pst_mask_bits``, scales of rounded weights and the buffers; ``load_state_dict`` takes such a dict, strictly
    too, and leaves the rest of the model as it is. ``save_checkpoint`` of a DeepSpeed engine leaves the frozen
    parameters out; under ZeRO-3 every rank then keeps its shard of each mask (``NAME.pst_mask_shard``) and of the
    scales, so such a checkpoint is loaded by as many ranks.
    Call it after ``inject_pst``, and after ``import deepspeed`` where that is used. What was saved
    without this call can still be loaded.
    """
    if hasattr(model, _HANDLES):
        return
    setattr(model, _HANDLES, (
        model.register_state_dict_post_hook(_leave_out),
        model.register_load_state_dict_pre_hook(_load_masks),
        model.register_load_state_dict_post_hook(_forgive),
    ))  # fmt: skip
    omit_frozen(model)


def whole_checkpoints(model: nn.Module) -> None:
    """Undo :func:`adapter_checkpoints`."""
    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()
    keep_frozen(model)


def _leave_out(model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in _names_left_out(model):
        state_dict.pop(prefix + name, None)
    for name, layer in pst_layers(model).items():
        state_dict.pop(f"{prefix}{name}.pst_mask", None)
        own = zero3.shard_of(layer.pst_mask).values
        if zero3.is_partitioned(layer.pst_mask):
            state_dict[f"{prefix}{name}.{MASK_SHARD}"] = own.clone()
        else:
            state_dict[f"{prefix}{name}.{MASK_BITS}"] = relayout(own, layer.layout.numel, layer.num_shards, 1)
        if layer.pst_scales is not None:
            state_dict.pop(f"{prefix}{name}.{SCALES}", None)
            key = SCALES_SHARD if zero3.is_partitioned(layer.pst_scales) else SCALES
            state_dict[f"{prefix}{name}.{key}"] = zero3.shard_of(layer.pst_scales).values.clone()


def write_mask(layer: PSTLayer, bits: Tensor) -> None:
    """Write a whole mask in the canonical form, or under ZeRO-3 the shard of it that this rank holds."""
    bits = relayout(bits, layer.layout.numel, 1, layer.num_shards)
    if zero3.is_partitioned(layer.pst_mask):
        bits = bits.view(layer.num_shards, -1)[zero3.shard_index(layer.pst_mask)]
    zero3.write_shard(layer.pst_mask, bits.to(layer.pst_mask.device))


def write_bytes(param: nn.Parameter, data: Tensor) -> None:
    """Write the whole bytes of a frozen parameter, or under ZeRO-3 those that this rank holds."""
    own = zero3.shard_of(param)
    zero3.write_shard(param, data[own.start : own.start + own.values.numel()].to(own.values.device))


@torch.no_grad()
def _load_masks(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, _missing: list[str],
    _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    setattr(model, _PREFIX, prefix)
    _load_scales(model, state_dict, prefix, errors)
    for name, layer in pst_layers(model).items():
        own, mask_bytes = zero3.shard_of(layer.pst_mask).values, shard_bytes(layer.layout.numel, 1)
        bits = state_dict.pop(f"{prefix}{name}.{MASK_BITS}", None)
        shard = state_dict.pop(f"{prefix}{name}.{MASK_SHARD}", None)
        if bits is not None and bits.numel() != mask_bytes:
            errors.append(
                f"{prefix}{name}.{MASK_BITS} has {bits.numel()} bytes, this model's mask {mask_bytes}: load it into "
                "the model that it was saved from"
            )
        elif bits is not None:
            write_mask(layer, bits)
        elif shard is not None and shard.shape != own.shape:
            errors.append(
                f"{prefix}{name}.{MASK_SHARD} has {shard.numel()} bytes, this rank's shard {own.numel()}: load the "
                "checkpoint on as many ranks as saved it"
            )
        elif shard is not None:
            zero3.write_shard(layer.pst_mask, shard.to(own.device))
        else:
            continue
        state_dict[f"{prefix}{name}.pst_mask"] = layer.pst_mask.detach()  # itself, so that it is not missing


def _load_scales(model: nn.Module, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    for name, layer in pst_layers(model).items():
        param = layer.pst_scales
        whole, shard = (state_dict.pop(f"{prefix}{name}.{key}", None) for key in (SCALES, SCALES_SHARD))
        if param is None or (whole is None and shard is None):
            continue
        own = zero3.shard_of(param).values
        if whole is not None and whole.numel() == zero3.full_numel(param):
            write_bytes(param, whole)
        elif shard is not None and shard.shape == own.shape:
            zero3.write_shard(param, shard.to(own.device))
        else:
            errors.append(
                f"{prefix}{name}.{SCALES} has other sizes than this model's: load it into the model that it was saved "
                "from, on as many ranks"
            )
        state_dict[f"{prefix}{name}.{SCALES}"] = param.detach()  # itself, so that it is not missing


def _forgive(model: nn.Module, incompatible: Any) -> None:
    """Drop the missing keys that are left out on purpose; they have the prefix of the wrappers."""
    prefix = vars(model).pop(_PREFIX, "")
    left_out = {prefix + name for name in _names_left_out(model)}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in left_out]


def _names_left_out(model: nn.Module) -> set[str]:
    """Return the names of all parameters but those of an adapter state and the masks; tied ones with every name."""
    parts = [f"{name}.{part}" for name in pst_layers(model) for part in ("pst_mask", SCALES)]
    kept = {name for name, _ in adapter_parameters(model)} | set(parts)
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - kept
