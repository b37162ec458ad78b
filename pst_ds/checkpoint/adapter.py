"""The adapter state of a trained model in a folder, in PEFT's manner: what is to be put onto the base model.

    pst_config.json               the PSTConfig, the base model and its fingerprint, where in its schedule training was
    pst_model.safetensors         fp32 values of all that is trained, the bits of every mask, and the buffers
    model.safetensors.index.json  names the file above, for Trainer.train(resume_from_checkpoint=...)

``from_pretrained`` of such a folder is an error, and not a model with random weights: there is no config.json, and the
"metadata" of the index is no table, which the Trainer does not look at.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds import __version__
from pst_ds.atomic_files import file_sha256, write_bytes_atomic, write_text_atomic
from pst_ds.checkpoint.restore import base_fingerprint, is_of_hub, same_base, weight_scales
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.bits import count_bits, relayout
from pst_ds.errors import InputError
from pst_ds.nn.adapter_checkpoints import MASK_BITS, write_mask
from pst_ds.nn.inject import (
    adapter_parameters,
    configured_parameters,
    freeze_scores,
    inject_pst,
    injected_config,
    persistent_buffers,
    pst_layers,
)
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import all_gather_objects, is_main
from pst_ds.parallel.steps import unwrapped

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "pst_config.json", "pst_model.safetensors", "model.safetensors.index.json"
FORMAT = 1
_FORMULA = (
    "alpha1", "alpha2", "beta", "magnitude", "frozen_magnitude", "relative_magnitude", "detach_magnitude",
    "multiplicative_update",
)  # fmt: skip
"""Settings that no shape shows, and that the loaded values mean something else under."""
_WHAT_IT_IS = "not a model, but what training changed of one: load it with pst_ds.load_pretrained"


class PretrainedError(InputError):
    """A folder of a adapter state that is not there, is damaged, or belongs to another model."""


def save_pretrained(
    model: nn.Module, folder: str | Path, *, step: int | None = None, writes: bool | None = None
) -> None:
    """Write the adapter state of ``model`` (or of the engine around it) into ``folder``; other files there stay.

    Rank 0 writes, or each rank whose ``writes`` says so (one on each node, say): each file whole or not at all; one
    parameter is gathered at a time. ``step`` is how many optimizer steps were applied, for the record. Collective.
    Raises InputError for a model that was not injected as a whole; OSError on every rank for what cannot be written;
    for whatever else a rank raises there, RuntimeError on the others.
    """
    model = unwrapped(model)
    injected_config(model)
    writes = is_main() if writes is None else writes
    tensors, failure = adapter_state(model, keep=writes), None
    if writes:
        try:
            write_adapter_state(model, folder, tensors, step=step)
        except Exception as error:  # whatever it is, the other ranks wait
            failure = error
    told = "" if failure is None else str(failure) if isinstance(failure, OSError) else repr(failure)
    problems = all_gather_objects((told, isinstance(failure, OSError)))
    problem, is_os_error = next((entry for entry in problems if entry[0]), ("", False))
    if failure is not None and not is_os_error:
        raise failure
    if problem:
        kind = OSError if is_os_error else RuntimeError
        raise kind(f"{folder} could not be written: {problem}") from failure


def load_pretrained(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter state in ``folder`` onto the base ``model``, in place, and return it.

    A model without PST modules gets those of the saved config; one that has them must compute as the saved config says.
    What was trained beside what the config trains has a gradient afterwards. Under ``zero.Init`` each rank keeps what
    it holds; call it before ``deepspeed.initialize``. Raises PretrainedError, naming the file, before a value is
    changed; and InjectionError.
    """
    folder = Path(folder)
    saved = _read_config(folder)
    is_other_revision = _require_base(model, saved, folder)
    config = _pst_config(saved["pst_config"], folder)
    if pst_layers(model):
        _require_formula(injected_config(model), config, folder)
    else:
        inject_pst(model, config)
    also_trained = set(saved.get("also_trained", ()))
    for name, param in model.named_parameters():
        if name in also_trained:
            param.requires_grad_(True)
    tensors = _read_tensors(folder, saved["sha256"])
    _require_fit(model, tensors, saved, folder)
    if is_other_revision:
        _require_weights(model, saved, folder)
    with torch.no_grad():
        for name, param in adapter_parameters(model):
            shard = zero3.shard_of(param)
            zero3.write_shard(param, tensors[name].flatten()[shard.start : shard.start + shard.values.numel()])
        for name, buffer in persistent_buffers(model).items():
            buffer.copy_(tensors.get(name, buffer))
        for name, layer in pst_layers(model).items():
            write_mask(layer, tensors[f"{name}.{MASK_BITS}"])
            layer.weight_scales = tuple(saved["weight_scales"][name])
    if saved["masks_frozen"]:
        freeze_scores(model)
    return model


@torch.no_grad()
def adapter_state(
    model: nn.Module, gathered: Mapping[str, Tensor] | None = None, *, keep: bool | None = None
) -> dict[str, Tensor]:
    """The tensors of pst_model.safetensors: fp32 values of :func:`adapter_parameters`, one-shard masks, buffers.

    Values are the optimizer's masters where there are any; with ``gathered``, a state dict of the whole model, they are
    taken from it. Where ``keep`` is false, by default on all ranks but 0, the dict is empty. Collective without
    ``gathered`` under DeepSpeed.
    """
    keep = is_main() if keep is None else keep
    tensors: dict[str, Tensor] = {}
    for name, param in adapter_parameters(model):
        value = zero3.fp32_masters([param])[0] if gathered is None else gathered[name].float()
        if keep:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    for name, buffer in persistent_buffers(model).items() if keep else ():
        tensors[name] = (buffer if gathered is None else gathered[name]).detach().to("cpu", copy=True).contiguous()
    for name, layer in pst_layers(model).items():
        key = f"{name}.{MASK_BITS}"
        if gathered is not None and key in gathered:  # a state dict with adapter_checkpoints
            bits = gathered[key].cpu()
        else:
            with zero3.gathered([layer.pst_mask] if gathered is None else []):
                whole = layer.pst_mask if gathered is None else gathered[f"{name}.pst_mask"]
                bits = relayout(whole.detach().cpu(), layer.layout.numel, layer.num_shards, 1) if keep else whole
        if keep:
            tensors[key] = bits
    return tensors


def write_adapter_state(
    model: nn.Module, folder: str | Path, tensors: dict[str, Tensor], *, step: int | None = None
) -> None:
    """Write the three files of ``tensors``, from :func:`adapter_state`. For one rank alone. Raises OSError."""
    from safetensors.torch import save

    folder, config = Path(folder), injected_config(model)
    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors, metadata={"format": "pt"})
    layers, base = pst_layers(model), getattr(model, "name_or_path", "")
    configured = configured_parameters(model, config)
    kept = sum(count_bits(bits, bits)[1] for name, bits in tensors.items() if name.endswith(MASK_BITS))
    table = {
        "format": FORMAT,
        "pst_ds_version": __version__,
        "pst_config": asdict(config),
        "also_trained": [name for name, param in adapter_parameters(model) if param not in configured],
        "base_model_name_or_path": base,
        "base_fingerprint": _fingerprint(base),
        "dtype": _dtype(model),
        "step": step,
        "sparsity": 1.0 - kept / sum(layer.layout.numel for layer in layers.values()),
        "masks_frozen": not any(layer.scores_train for layer in layers.values()),
        "weight_scales": weight_scales(model),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    index = {"metadata": _WHAT_IT_IS, "weight_map": dict.fromkeys(tensors, WEIGHTS_FILE)}
    write_bytes_atomic(folder / WEIGHTS_FILE, data)
    write_text_atomic(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    write_text_atomic(folder / CONFIG_FILE, json.dumps(table, indent=1) + "\n")


@functools.cache
def _fingerprint(base: str) -> str:
    """Once a process: files of hundreds of MB are read for it."""
    return base_fingerprint(base) if base else ""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PretrainedError(
            f"{path.absolute()} does not exist; name a folder that save_pretrained, or the Trainer, has written"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is damaged: {error}") from None
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise PretrainedError(f"{path} has format {found!r}; this version reads {FORMAT}")
    wanted = ("pst_config", "base_model_name_or_path", "base_fingerprint", "masks_frozen", "weight_scales", "sha256")
    for key in wanted:
        if key not in table:
            raise PretrainedError(f"{path} is damaged: it has no {key!r}")
    return table


def _pst_config(table: dict[str, Any], folder: Path) -> PSTConfig:
    try:
        values = _with_tuples(table)
        values["overrides"] = tuple(Override(**_with_tuples(override)) for override in values.get("overrides", ()))
        return PSTConfig(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise PretrainedError(f"{folder / CONFIG_FILE}: pst_config cannot be read: {error}") from None


def _require_formula(own: PSTConfig, saved: PSTConfig, folder: Path) -> None:
    for name in _FORMULA:
        if getattr(own, name) != getattr(saved, name):
            raise PretrainedError(
                f"{folder / CONFIG_FILE} has {name} = {getattr(saved, name)!r}, and the model was injected with {name} "
                f"= {getattr(own, name)!r}: it would compute something else. Load onto the base model, or inject "
                f"PSTConfig({name}={getattr(saved, name)!r})"
            )


def _with_tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _require_base(model: nn.Module, saved: dict[str, Any], folder: Path) -> bool:
    """Raise PretrainedError for the weights of another folder. Whether the base is another revision on the hub, as far
    as the cache tells, which knows the newest alone: see :func:`_require_weights`."""
    base, known = _fingerprint(getattr(model, "name_or_path", "")), saved["base_fingerprint"]
    if not base or not known or same_base(base, known):
        return False
    if not is_of_hub(base):
        raise PretrainedError(_other_weights(model, saved, folder))
    return True


def _require_weights(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    """Of an injected ``model`` from another revision on the hub: the mean |W0| of each matrix tells weights apart.

    Raises PretrainedError where they differ; warns where there are none, or only those of another dtype.
    """
    scales = weight_scales(model)
    is_comparable = _dtype(model) == saved.get("dtype") and any(scale != 1.0 for of in scales.values() for scale in of)
    if is_comparable and scales != saved["weight_scales"]:
        raise PretrainedError(f"{_other_weights(model, saved, folder)}, by from_pretrained(..., revision=)")
    if not is_comparable:
        warnings.warn(
            f"{folder} was trained on {saved['base_model_name_or_path']!r} when its revision was "
            f"{saved['base_fingerprint']}, and now it is {_fingerprint(model.name_or_path)}: whether the weights are "  # type: ignore[arg-type]
            "the same cannot be told. If they are not, load the base with revision=",
            stacklevel=3,
        )


def _other_weights(model: nn.Module, saved: dict[str, Any], folder: Path) -> str:
    return (
        f"{folder} was trained on {saved['base_model_name_or_path']!r}, and the model from {model.name_or_path!r} has "
        "other weights; load the base that it was trained on"
    )


def _dtype(model: nn.Module) -> str:
    return str(next(iter(pst_layers(model).values())).weight.dtype).removeprefix("torch.")


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


def _require_fit(model: nn.Module, tensors: dict[str, Tensor], saved: dict[str, Any], folder: Path) -> None:
    wanted = {name: tuple(zero3.full_shape(param)) for name, param in adapter_parameters(model)}
    for name, layer in pst_layers(model).items():
        wanted[f"{name}.{MASK_BITS}"] = (-(-layer.layout.numel // 8),)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items() if name in found}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise PretrainedError(
                f"{folder / WEIGHTS_FILE} does not fit the model: {name} has shape {found.get(name)} there, and "
                f"{wanted.get(name)} in the model (None: it is not there)"
            )
    if set(saved["weight_scales"]) != set(pst_layers(model)):
        raise PretrainedError(f"{folder / CONFIG_FILE} does not fit the model: weight_scales are those of other layers")
