"""A checkpoint's values into a model and its optimizer; and the fingerprint of the base model it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pst_ds.checkpoint.format import Checkpoint, CheckpointError
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import optimizer_state, zero3
from pst_ds.parallel.engine import Engine

_HUB = "hub:"
_FIX = "; take the method and the [pst] settings that it was trained with"
_READ_WHOLE, _STRIDE, _SAMPLE = 256 << 20, 4 << 20, 64 << 10
"""Bytes of a weight file that is hashed whole; of a larger one, how often and how much of it is."""


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, Parameter) of all that is trained, in model order."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's values into an injected ``model``, before an engine is made of it.

    Each rank reads what it holds: under ZeRO-3 its shards. Raises CheckpointError when the names or shapes are not the
    model's, before anything is changed.
    """
    _require_fit(model, checkpoint)
    with torch.no_grad():
        for name, param in trainable(model):
            shard = zero3.shard_of(param)
            stop = shard.start + shard.values.numel()
            zero3.write_shard(param, checkpoint.values(name, optimizer_state.MASTER, shard.start, stop))
    for name, layer in pst_layers(model).items():
        layer.weight_scales = tuple(checkpoint.state.weight_scales[name])
        partitioned = zero3.is_partitioned(layer.pst_mask)
        index = zero3.shard_index(layer.pst_mask)
        held = [index] if partitioned else range(layer.num_shards)
        bits = torch.cat([checkpoint.mask_shard(name, layer.num_shards, i) for i in held])
        zero3.write_shard(layer.pst_mask, bits.to(layer.pst_mask.device))


def load_optimizer(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the fp32 masters and Adam's moments into the optimizer of an engine whose model has the values already."""
    pieces = optimizer_state.local_pieces(engine, trainable(engine.module))
    optimizer_state.prepare_moments(engine, pieces, checkpoint.contents.steps)
    with torch.no_grad():
        for kind in optimizer_state.KINDS:
            for piece, values in zip(pieces, optimizer_state.values(engine, pieces, kind), strict=True):
                values.copy_(checkpoint.values(piece.name, kind, piece.start, piece.stop))


def weight_scales(model: nn.Module) -> dict[str, list[float]]:
    """The scales of |W| that a checkpoint of ``model`` must keep."""
    return {name: list(layer.weight_scales) for name, layer in pst_layers(model).items()}


def base_fingerprint(path: str | Path) -> str:
    """A SHA-256 over the names, sizes and bytes of a model folder's weight files; "" when there are none.

    Of a file above 256 MiB 64 KiB out of every 4 MiB are read, so that a model of any size takes seconds. Of a model by
    its name on the hub, the revision that its config came from, as "hub:…": its weights may not be here yet.
    """
    if not Path(path).is_dir():
        return _hub_revision(str(path))
    digest = hashlib.sha256()
    files = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("pytorch_model*.bin")])
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        piece = _STRIDE if size <= _READ_WHOLE else _SAMPLE
        with file.open("rb") as stream:
            for offset in range(0, size, _STRIDE):
                stream.seek(offset)
                digest.update(stream.read(piece))
    return digest.hexdigest() if files else ""


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one base model; a folder and a revision on the hub cannot be compared."""
    return one == other or one.startswith(_HUB) != other.startswith(_HUB)


def is_of_hub(fingerprint: str) -> bool:
    """Whether it is that of a name on the hub, which knows a revision and not the weights."""
    return fingerprint.startswith(_HUB)


def _hub_revision(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return ""
    return f"{_HUB}{Path(config).parent.name}" if isinstance(config, str) else ""


def _require_fit(model: nn.Module, checkpoint: Checkpoint) -> None:
    params, layers, contents = dict(trainable(model)), pst_layers(model), checkpoint.contents
    of_trained: tuple[str, Mapping, Mapping] = ("trained parameters", params, contents.trained)
    for kind, ours, theirs in (of_trained, ("masks", layers, contents.masks)):
        if set(ours) != set(theirs):
            extra = sorted(set(ours) ^ set(theirs))
            raise CheckpointError(
                f"{checkpoint.folder} does not fit the model: {kind} differ in {', '.join(extra[:4])}"
                + (f" and {len(extra) - 4} more" if len(extra) > 4 else "")
                + _FIX
            )
    shapes = {name: (contents.trained[name], tuple(zero3.full_shape(param))) for name, param in params.items()}
    shapes |= {f"the mask of {n}": ((contents.masks[n],), (layer.layout.numel,)) for n, layer in layers.items()}
    for name, (saved, own) in shapes.items():
        if saved != own:
            raise CheckpointError(f"{checkpoint.folder}: {name} has shape {saved}, the model's is {own}{_FIX}")
    if set(checkpoint.state.weight_scales) != set(layers):
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the model: weight_scales are those of other layers{_FIX}"
        )
