"""The adapter state of a trained model in a folder, as in PEFT: what training changed of the base model.

    pst_config.json               the PSTConfig, the base model and its fingerprint, and the progress of the schedule
    pst_model.safetensors         fp32 values of everything trained, the bits of every mask, the scales of quantised
                                  layers, and the buffers
    model.safetensors.index.json  names the file above, for Trainer.train(resume_from_checkpoint=...)

``from_pretrained`` of such a folder is an error instead of a model with random weights: it has no config.json, and the
"metadata" of the index is a string, which the Trainer does not read.
"""

import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from torch import Tensor, nn

from pst_ds import __version__
from pst_ds.atomic_files import file_sha256, write_bytes_atomic, write_text_atomic
from pst_ds.checkpoint.restore import base_fingerprint, is_of_hub, magnitude_scales, model_grids, same_base
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import ConfigError
from pst_ds.config.toml import without_removed
from pst_ds.core.bits import count_bits, relayout
from pst_ds.core.quantization import Grid, bytes_of_scales, scales_of_bytes
from pst_ds.errors import InputError, first_problem
from pst_ds.nn import inject
from pst_ds.nn.adapter_checkpoints import MASK_BITS, SCALES, write_mask
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import is_main, raise_on_all_ranks
from pst_ds.parallel.steps import unwrapped

CONFIG_FILE = "pst_config.json"
WEIGHTS_FILE = "pst_model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = 1
_NOTE = "not a model, but what training changed of one: load it with pst_ds.load_pretrained"


def _as_grid(pair: Any) -> Any:
    """Return the quantisation that :func:`model_grids` describes as (bits, inputs per scale or 0); None without."""
    if not pair:
        return pair  # an empty value other than None is rejected by the type of the field
    return Grid(pair[0], pair[1] or None)


_StoredGrid = Annotated[Grid | None, BeforeValidator(_as_grid)]


class PretrainedError(InputError):
    """An adapter folder that is missing or damaged, or belongs to another model."""


class _Saved(BaseModel):
    """The values in pst_config.json that loading relies on. Older folders lack those with a default."""

    model_config = ConfigDict(strict=True)

    pst_config: PSTConfig
    base_model_name_or_path: str
    base_fingerprint: str
    masks_frozen: bool
    weight_scales: dict[str, list[float]]
    sha256: str
    also_trained: set[str] = set()
    dtype: str | None = None
    grid: _StoredGrid = None
    base_grid: _StoredGrid = None
    embedding_grid: _StoredGrid = None
    rounds: bool = False


def save_pretrained(
    model: nn.Module, folder: str | Path, *, step: int | None = None, writes: bool | None = None
) -> None:
    """Write what training changed of ``model``, a few percent of its size, into ``folder``. Collective.

    Each file is written atomically, and other files in the folder stay. Under ZeRO-3 parameters are gathered one by
    one.

    Args:
        model: an injected model, or the DeepSpeed engine around it.
        folder: where to write; created if it is missing.
        step: optimizer steps applied so far, for the record.
        writes: whether this rank writes; by default only rank 0. Without a shared file system, pass True on one rank
            per node.

    Raises InputError unless the complete model was injected, and on every rank what a rank raises, such as OSError.
    """
    model = unwrapped(model)
    inject.injected_config(model)
    if writes is None:
        writes = is_main()
    # Every rank takes part, also one that does not write: the values are gathered from all ranks.
    tensors = adapter_state(model, keep=writes)

    def write() -> None:
        if not writes:
            return
        try:
            write_adapter_state(model, folder, tensors, step=step)
        except OSError as error:
            raise OSError(f"{folder} could not be written: {error}") from error

    raise_on_all_ranks(write, (Exception,))


def load_pretrained(model: inject.ModelT, folder: str | Path) -> inject.ModelT:
    """Load what :func:`save_pretrained` wrote into the base ``model``, in place, and return it.

    Parameters trained in addition to the config's then require gradients. Under ``zero.Init`` each rank loads its
    shards; call it before ``deepspeed.initialize``.

    Args:
        model: the base model, with PST modules that compute as the saved config says, or without PST modules.
        folder: a folder that ``save_pretrained`` or the Trainer has written.

    Raises PretrainedError, naming the file, if the folder is missing or damaged or does not fit; the model is unchanged
    then. Raises InjectionError if the saved config cannot be injected into the model.
    """
    folder = Path(folder)
    saved = _read_config(folder)
    is_other_revision = _require_base(model, saved, folder)
    if inject.settled_layers(model):
        _require_same_computation(model, saved, folder)
    else:
        inject.inject_pst(
            model, saved.pst_config, grid=saved.grid, base_grid=saved.base_grid, embedding_grid=saved.embedding_grid
        )
    for name, param in model.named_parameters():
        if name in saved.also_trained:
            param.requires_grad_(True)
    tensors = _read_tensors(folder, saved.sha256)
    _require_fit(model, tensors, saved, folder)
    if is_other_revision:
        _require_weights(model, saved, folder)
    _load_tensors(model, tensors, saved)
    if saved.masks_frozen:
        inject.freeze_scores(model)
    inject.round_weights(model, rounds=saved.rounds)
    return model


@torch.no_grad()
def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], saved: _Saved) -> None:
    """Write the values, buffers, masks and scales of a folder into an injected ``model`` that they fit."""
    for name, param in inject.adapter_parameters(model):
        sharding.write_whole(param, tensors[name])
    for name, buffer in inject.persistent_buffers(model).items():
        if name in tensors:  # older folders lack buffers
            buffer.copy_(tensors[name])
    for name, layer in inject.pst_layers(model).items():
        write_mask(layer, tensors[f"{name}.{MASK_BITS}"])
        layer.set_magnitude_scales(tuple(saved.weight_scales[name]))
        if layer.pst_scales is not None:
            sharding.write_whole(layer.pst_scales, bytes_of_scales(tensors[f"{name}.{SCALES}"]))


@torch.no_grad()
def adapter_state(
    model: nn.Module, gathered: Mapping[str, Tensor] | None = None, *, keep: bool | None = None
) -> dict[str, Tensor]:
    """Return the tensors of pst_model.safetensors: trained parameters in fp32, masks in one shard, scales, buffers.

    The values are the optimizer's fp32 masters if it has them, or come from ``gathered``, a state dict of the complete
    model. The dict is empty where ``keep`` is false, by default on all ranks but 0. Collective under DeepSpeed, except
    with ``gathered``.
    """
    if keep is None:
        keep = is_main()
    if any(layer.group is not None for layer in inject.pst_layers(model).values()):
        raise InputError(
            "expert_parallel: an adapter state has whole stacks of experts, and ranks have parts of them. Inject with "
            "expert_parallel = 1, or train with pst-ds train, whose checkpoints have the parts of all ranks"
        )
    tensors: dict[str, Tensor] = {}
    for name, param in inject.adapter_parameters(model):
        # Gathered one by one, so that a rank never holds more than one whole parameter on its device.
        value = sharding.fp32_masters([param])[0] if gathered is None else gathered[name].float()
        if keep:
            tensors[name] = _copy_on_cpu(value)
    if keep:
        for name, buffer in inject.persistent_buffers(model).items():
            whole_buffer = buffer if gathered is None else gathered[name]
            tensors[name] = _copy_on_cpu(whole_buffer)
    for name, layer in inject.pst_layers(model).items():
        mask_key = f"{name}.{MASK_BITS}"
        if gathered is not None and mask_key in gathered:  # a state dict with adapter_checkpoints
            if keep:
                tensors[mask_key] = gathered[mask_key].cpu()
        else:
            # The gathering is collective, so it comes before the question whether this rank keeps the result.
            whole_mask = sharding.whole(layer.pst_mask) if gathered is None else gathered[f"{name}.pst_mask"]
            if keep:
                tensors[mask_key] = relayout(whole_mask.cpu(), layer.layout.numel, layer.num_shards, 1)
        if layer.stored_grid is not None and layer.pst_scales is not None:
            scales_key = f"{name}.{SCALES}"
            scale_bytes = sharding.whole(layer.pst_scales) if gathered is None else gathered[scales_key]
            if keep:
                scales = scales_of_bytes(scale_bytes.detach(), layer.stored_grid.shape)
                tensors[scales_key] = scales.to("cpu", copy=True)
    return tensors


def _copy_on_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory, which further training does not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_adapter_state(
    model: nn.Module, folder: str | Path, tensors: dict[str, Tensor], *, step: int | None = None
) -> None:
    """Write the three files for ``tensors``, from :func:`adapter_state`, on one rank. Raises OSError."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors, metadata={"format": "pt"})
    config = inject.injected_config(model)
    configured = inject.configured_parameters(model, config)
    layers = inject.pst_layers(model)
    base = getattr(model, "name_or_path", "")
    kept_weights = 0
    for name, bits in tensors.items():
        if name.endswith(MASK_BITS):
            kept_weights += int(count_bits(bits, bits)[1])
    also_trained: list[str] = []
    for name, param in inject.adapter_parameters(model):
        if param not in configured:
            also_trained.append(name)
    num_weights = 0
    scores_train = False
    rounds = False
    for layer in layers.values():
        num_weights += layer.layout.numel
        scores_train = scores_train or layer.scores_train
        rounds = rounds or layer.rounds
    table = {
        "format": FORMAT,
        "pst_ds_version": __version__,
        "pst_config": asdict(config),
        "also_trained": also_trained,
        "base_model_name_or_path": base,
        "base_fingerprint": _fingerprint(base),
        "dtype": _dtype(model),
        "step": step,
        "sparsity": 1.0 - kept_weights / num_weights,
        "masks_frozen": not scores_train,
        "weight_scales": magnitude_scales(model),
        **model_grids(model),
        "rounds": rounds,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    index = {"metadata": _NOTE, "weight_map": dict.fromkeys(tensors, WEIGHTS_FILE)}
    # The config has the digest of the weights and comes last: after an interruption the folder either loads or is
    # rejected, and never mixes two saves.
    write_bytes_atomic(folder / WEIGHTS_FILE, data)
    write_text_atomic(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    write_text_atomic(folder / CONFIG_FILE, json.dumps(table, indent=1) + "\n")


@functools.cache
def _fingerprint(base: str) -> str:
    """Return the base's fingerprint; cached, because it reads hundreds of MB."""
    return base_fingerprint(base) if base else ""


def _read_config(folder: Path) -> _Saved:
    path = folder / CONFIG_FILE
    try:
        table = json.loads(path.read_bytes())
        format_number = table.get("format") if isinstance(table, dict) else None
        saved = None
        if format_number == FORMAT:
            config = without_removed({"pst": table["pst_config"]}).get("pst", {})
            # As JSON, because a strict model takes lists for sets and tuples only there.
            saved = _Saved.model_validate_json(json.dumps({**table, "pst_config": config}))
    except FileNotFoundError:
        raise PretrainedError(
            f"{path.absolute()} does not exist; name a folder that save_pretrained, or the Trainer, has written"
        ) from None
    except ConfigError as error:
        raise PretrainedError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise PretrainedError(f"{path} is damaged: {problem}") from None
    if saved is None:
        raise PretrainedError(f"{path} has format {format_number!r}; this version reads {FORMAT}")
    return saved


def _require_same_computation(model: nn.Module, saved: _Saved, folder: Path) -> None:
    """Raise PretrainedError unless an injected model has the saved formula and quantisation."""
    config = inject.injected_config(model)
    settings: dict[str, tuple[object, object]] = {}  # (the model's value, the saved value) by name
    for name in PSTConfig.formula():
        settings[name] = (getattr(config, name), getattr(saved.pst_config, name))
    for name, pair in model_grids(model).items():
        settings[name] = (_as_grid(pair), getattr(saved, name))
    for name, (of_model, of_folder) in settings.items():
        if of_model != of_folder:
            raise PretrainedError(
                f"{folder / CONFIG_FILE} has {name} = {of_folder}, and the model was injected with {name} = "
                f"{of_model}: it would compute something else. Load onto the base model, or inject the saved config"
            )


def _require_base(model: nn.Module, saved: _Saved, folder: Path) -> bool:
    """Raise PretrainedError if ``model`` has the weights of another folder; return whether its hub revision differs.

    In that case :func:`_require_weights` decides, because the hub's cache knows only the newest revision.
    """
    fingerprint = _fingerprint(getattr(model, "name_or_path", ""))
    # A model that was built in memory has no fingerprint: then only its shapes can be checked.
    if not fingerprint or not saved.base_fingerprint or same_base(fingerprint, saved.base_fingerprint):
        return False
    if not is_of_hub(fingerprint):
        raise PretrainedError(_other_weights(model, saved, folder))
    return True


def _require_weights(model: nn.Module, saved: _Saved, folder: Path) -> None:
    """Raise PretrainedError if the mean |W0| of a matrix differs from the saved one.

    Warns if no means were saved, or only means of another dtype.
    """
    scales = magnitude_scales(model)
    # 1 is the scale of a matrix that was not measured
    are_measured = any(scale != 1.0 for scale in itertools.chain.from_iterable(scales.values()))
    if are_measured and _dtype(model) == saved.dtype:
        if scales != saved.weight_scales:
            raise PretrainedError(f"{_other_weights(model, saved, folder)}, by from_pretrained(..., revision=)")
    else:
        warnings.warn(
            f"{folder} was trained on {saved.base_model_name_or_path!r} when its revision was "
            f"{saved.base_fingerprint}, and now it is {_fingerprint(model.name_or_path)}: whether the weights are "
            "the same cannot be told. If they are not, load the base with revision=",
            stacklevel=3,
        )


def _other_weights(model: nn.Module, saved: _Saved, folder: Path) -> str:
    return (
        f"{folder} was trained on {saved.base_model_name_or_path!r}, and the model from {model.name_or_path!r} has "
        "other weights; load the base that it was trained on"
    )


def _dtype(model: nn.Module) -> str:
    return str(next(iter(inject.pst_layers(model).values())).dtype).removeprefix("torch.")


def _read_tensors(folder: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    try:
        if file_sha256(path) != digest:
            raise PretrainedError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG_FILE}; take another save")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from None


def _require_fit(model: nn.Module, tensors: dict[str, Tensor], saved: _Saved, folder: Path) -> None:
    """Raise PretrainedError unless the folder has exactly the tensors that the model needs, in the model's shapes."""
    saved_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    own_shapes = {name: tuple(sharding.full_shape(param)) for name, param in inject.adapter_parameters(model)}
    for name, layer in inject.pst_layers(model).items():
        own_shapes[f"{name}.{MASK_BITS}"] = (-(-layer.layout.numel // 8),)  # bytes of one bit per weight
        if layer.stored_grid is not None:
            own_shapes[f"{name}.{SCALES}"] = layer.stored_grid.shape
    for name, buffer in inject.persistent_buffers(model).items():
        if name in saved_shapes:  # older folders lack buffers
            own_shapes[name] = tuple(buffer.shape)
    for name in sorted(own_shapes.keys() | saved_shapes.keys()):
        if own_shapes.get(name) != saved_shapes.get(name):
            raise PretrainedError(
                f"{folder / WEIGHTS_FILE} does not fit the model: {name} has shape {saved_shapes.get(name)} there, and "
                f"{own_shapes.get(name)} in the model (None: it is not there)"
            )
    if set(saved.weight_scales) != set(inject.pst_layers(model)):
        raise PretrainedError(f"{folder / CONFIG_FILE} does not fit the model: weight_scales belong to other layers")
