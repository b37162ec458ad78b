"""Load a checkpoint into a model and its optimizer, and fingerprint the base model that it belongs to."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import SCALE_BYTES, Checkpoint, CheckpointError
from pst_ds.core.quantization import StoredGrid, require_scales, scales_of_bytes
from pst_ds.errors import shortened
from pst_ds.nn.flat_factors import parameters_by_layer
from pst_ds.nn.inject import pst_layers, round_weights
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.router import follow_masks
from pst_ds.nn.tables.coded import coded_tables
from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.engine import Engine

_HUB = "hub:"
_FIX = "; use the method and the [pst] settings that it was trained with"
_READ_WHOLE = 256 << 20
"""Bytes up to which a weight file is hashed completely."""
_STRIDE = 4 << 20
"""Bytes from the start of one hashed piece of a weight file to the next."""
_SAMPLE = 64 << 10
"""Bytes that are hashed in every stride of a larger weight file."""


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, Parameter) of everything that is trained, in the model's order."""
    return [(name, param) for name, param in parameters_by_layer(model) if param.requires_grad]


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's values into an injected ``model`` that has no engine yet. Collective if experts are removed.

    Under ZeRO-3 each rank reads its shards only. Raises CheckpointError, before anything is changed, if names or shapes
    differ from the model's.
    """
    _require_fit(model, checkpoint)
    with torch.no_grad():
        for name, param in trainable(model):
            own_shard = sharding.shard_of(param)
            stop = own_shard.start + own_shard.values.numel()
            sharding.write_shard(param, checkpoint.values(name, optimizer_state.MASTER, own_shard.start, stop))
    for name, layer in pst_layers(model).items():
        _load_layer(layer, name, checkpoint)
    # After the masks: routers must not choose experts whose weights are all pruned.
    follow_masks(model)
    round_weights(model, rounds=checkpoint.state.rounds)


def _load_layer(layer: PSTLayer, name: str, checkpoint: Checkpoint) -> None:
    """Load the magnitude scales, the mask and the quantisation scales of a layer; of the latter two, what it holds."""
    layer.set_magnitude_scales(tuple(checkpoint.state.magnitude_scales[name]))
    mask = layer.pst_mask
    num_shards, own_index, num_parts = layer.place
    # A mask that is not partitioned still has its bits shard after shard, as the model was injected.
    held_shards = [own_index] if sharding.is_partitioned(mask) else range(num_shards)
    shards: list[Tensor] = []
    for index in held_shards:
        shards.append(checkpoint.mask_shard(name, num_shards, index, num_parts))
    bits = torch.cat(shards)
    sharding.write_shard(mask, bits.to(mask.device))
    if layer.pst_scales is not None:
        own_shard = sharding.shard_of(layer.pst_scales)
        stop = own_shard.start + own_shard.values.numel()
        data = _scale_bytes(layer, name, checkpoint, start=own_shard.start, stop=stop)
        sharding.write_shard(layer.pst_scales, data.to(own_shard.values.device))


def _scale_bytes(layer: PSTLayer, name: str, checkpoint: Checkpoint, *, start: int, stop: int) -> Tensor:
    """Return bytes [start, stop) of a layer's scales. Raises CheckpointError for invalid scales, such as 0."""
    assert layer.stored_grid is not None
    # A shard may start or end inside a scale: whole ones are read to check them, and the bytes around are dropped.
    first = start // SCALE_BYTES * SCALE_BYTES
    last = -(-stop // SCALE_BYTES) * SCALE_BYTES
    data = checkpoint.scale_bytes(name, first, last)
    try:
        require_scales(scales_of_bytes(data, (1, data.numel() // SCALE_BYTES)), layer.stored_grid.grid)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {name}: {error}; resume from another checkpoint") from None
    return data[start - first : stop - first]


def load_optimizer(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load the fp32 masters and Adam's moments into the optimizer of an engine whose model has the values already."""
    fragments = optimizer_state.local_fragments(engine, trainable(engine.module))
    # The optimizer makes its moments in the first step; here they must exist before values can be copied into them.
    optimizer_state.prepare_moments(engine, fragments, checkpoint.contents.steps)
    with torch.no_grad():
        for kind in optimizer_state.KINDS:
            for fragment, values in zip(fragments, optimizer_state.values(engine, fragments, kind), strict=True):
                values.copy_(checkpoint.values(fragment.name, kind, fragment.start, fragment.stop))


def magnitude_scales(model: nn.Module) -> dict[str, list[float]]:
    """Return the magnitude scales of each PST layer, by name."""
    return {name: list(layer.all_magnitude_scales) for name, layer in pst_layers(model).items()}


def model_grids(model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """Return (bits, inputs per scale or 0 for a per-row scale) of everything that ``model`` quantises; None without.

    "grid" is for pruned layers, "base_grid" for their frozen weights, "embedding_grid" for the frozen embedding.
    """
    pruned: list[StoredGrid] = []
    frozen: list[StoredGrid] = []
    for layer in pst_layers(model).values():
        if layer.stored_grid is not None:
            pruned.append(layer.stored_grid)
        if layer.base_codes is not None:
            frozen.append(layer.base_codes.layout.stored)
    embeddings = [table.layout.stored for table in coded_tables(model).values()]
    return {
        "grid": _bits_and_group(pruned),
        "base_grid": _bits_and_group(frozen),
        "embedding_grid": _bits_and_group(embeddings),
    }


def _bits_and_group(quantised: Sequence[StoredGrid]) -> tuple[int, int] | None:
    """Return (bits, inputs per scale or 0 for a per-row scale) of the first of ``quantised``; None if there is none."""
    if not quantised:
        return None
    grid = quantised[0].grid  # one setting quantises all of a kind
    return grid.bits, grid.group or 0


def scale_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of all layers' scales, by name; empty without quantisation."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in pst_layers(model).items():
        if layer.stored_grid is not None:
            # of the whole layer: a rank of expert parallelism has the scales of its experts only
            shapes[name] = StoredGrid(layer.whole_layout, layer.stored_grid.grid).shape
    return shapes


def base_fingerprint(path: str | Path) -> str:
    """Return a SHA-256 over the names, sizes and bytes of a model folder's weight files; "" without any.

    From files above 256 MiB it reads 64 KiB in every 4 MiB, so a model of any size takes seconds. For a model on the
    hub it is the revision of its config, as "hub:…", because the weights may not be downloaded yet.
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
    """Return whether two fingerprints may belong to one base model; a folder and a hub revision always may."""
    return one == other or is_of_hub(one) != is_of_hub(other)


def is_of_hub(fingerprint: str) -> bool:
    """Return whether ``fingerprint`` is a revision on the hub, which does not depend on the weights."""
    return fingerprint.startswith(_HUB)


def _hub_revision(name: str) -> str:
    """Return the revision of a model in the hub's cache, as "hub:…"; "" if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a name on the hub, such as the path of a folder that is gone
        return ""
    if not isinstance(config, str):  # not in the cache, or known to be missing on the hub
        return ""
    return f"{_HUB}{Path(config).parent.name}"  # the cache has a folder per revision


def _require_fit(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the model has the names, shapes and quantisation of the checkpoint."""
    params = dict(trainable(model))
    layers = pst_layers(model)
    contents = checkpoint.contents
    misfit = f"{checkpoint.folder} does not fit the model"
    for kind, own_names, saved_names in (
        ("trained parameters", set(params), set(contents.trained)),
        ("masks", set(layers), set(contents.masks)),
    ):
        differing = sorted(own_names ^ saved_names)
        if differing:
            raise CheckpointError(f"{misfit}: {kind} differ in {shortened(differing)}{_FIX}")
    for name, param in params.items():
        _require_shape(checkpoint, name, contents.trained[name], tuple(sharding.full_shape(param)))
    for name, layer in layers.items():
        _require_shape(checkpoint, f"the mask of {name}", (contents.masks[name],), (layer.whole_layout.numel,))
    if contents.grid != model_grids(model)["grid"] or contents.scales != scale_shapes(model):
        raise CheckpointError(
            f"{misfit}: its weights are quantised differently, or not at all; use the [quantization] settings that it "
            "was trained with"
        )
    if set(checkpoint.state.magnitude_scales) != set(layers):
        raise CheckpointError(f"{misfit}: weight_scales belong to other layers{_FIX}")


def _require_shape(checkpoint: Checkpoint, what: str, saved: tuple[int, ...], own: tuple[int, ...]) -> None:
    if saved != own:
        raise CheckpointError(f"{checkpoint.folder}: {what} has shape {saved}, the model's is {own}{_FIX}")
