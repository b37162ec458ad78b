"""Pretrained weights under ZeRO-3 that every rank reads its own part of; by itself transformers has rank 0 read them
all and send them to the others. Weights that are to become codes can stay in their files until they do, so that never
more than one of them is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pst_ds.nn.model_structure import is_linear
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import all_gather_objects, world_size
from pst_ds.third_party import Code, patched

_UNREAD = "pst_unread"
"""Attribute of a parameter whose values are still in a file: (file, name there)."""


@contextmanager
def read_by_every_rank(*, later: bool = False) -> Iterator[None]:
    """Inside, ``from_pretrained`` of several ranks under ZeRO-3 reads in shards what safetensors files have as the
    model has it; the rest, such as experts that are to be stacked, comes from rank 0 as ever. Collective.

    ``later``: weights of linear layers take no memory before :func:`read_now`, as far as files have them so.
    """
    from transformers import modeling_utils
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled() or not (later or world_size() > 1):
        yield
        return
    files: list[str] = []

    def noting(read: Code) -> Code:
        def noted(file: str, *args: object, **kwargs: object) -> object:
            files.append(str(file))
            return read(file, *args, **kwargs)

        return noted

    def sharing(load: Code) -> Code:
        def loaded(model: nn.Module, state: dict[str, Tensor], load_config: object = None) -> object:
            new_name = _renaming(model, getattr(load_config, "weight_mapping", None))
            names = _agreed(lambda: _read_shards(model, state, files, new_name))
            for param in model.parameters():
                if zero3.is_unfilled(param) and not hasattr(param, _UNREAD):
                    zero3.make_shard(param)
            rest = {key: value for key, value in state.items() if key not in names}
            problems, missing = cast(tuple[list[str], set[str]], load(model, rest, load_config))
            return problems, missing - set(names.values())

        return loaded

    with (
        patched(modeling_utils, "load_state_dict", noting),
        patched(modeling_utils, "_load_state_dict_into_zero3_model", sharing),
        zero3.unfilled(_is_linear_weight) if later else nullcontext(),
    ):
        yield


def read_now(params: Iterable[nn.Parameter]) -> None:
    """Read this rank's part of those of ``params`` that were left in their files."""
    for param in params:
        if hasattr(param, _UNREAD):
            file, key = getattr(param, _UNREAD)
            zero3.make_shard(param)
            with safe_open(file, framework="pt") as opened:
                _read_shard(param, opened, key)
            delattr(param, _UNREAD)


def _is_linear_weight(module: nn.Module, name: str) -> bool:
    return name == "weight" and is_linear(module)


def _renaming(model: nn.Module, mapping: Sequence[object] | None) -> Callable[[str], str]:
    """Return what tells the name in the model of a tensor in a file; "" for one that is changed, and not only renamed,
    by the ``mapping`` of transformers."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    prefix = getattr(model, "base_model_prefix", "")
    own = {name: torch.empty(0, device="meta") for name in model.state_dict()}
    renamings = [entry for entry in mapping or () if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping or () if isinstance(entry, WeightConverter)]

    def new_name(key: str) -> str:
        if not mapping:
            return f"{prefix}.{key}" if f"{prefix}.{key}" in own else key
        name, changed_by = rename_source_key(key, renamings, converters, base_model_prefix=prefix, meta_state_dict=own)
        if changed_by is not None:
            return ""
        return f"{prefix}.{name}" if f"{prefix}.{name}" in own else name

    return new_name


def _agreed(action: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return what ``action`` returns. Raises OSError on every rank if it raises on one. Collective."""
    names, problem = {}, None
    try:
        names = action()
    except Exception as error:  # of files: the other ranks must not wait for this one
        problem = f"{type(error).__name__}: {error}"
    for number, other in enumerate(all_gather_objects(problem)):
        if other is not None:
            raise OSError(f"rank {number}: {other}")
    return names


@torch.no_grad()
def _read_shards(
    model: nn.Module, state: Mapping[str, Tensor], files: Sequence[str], new_name: Callable[[str], str]
) -> dict[str, str]:
    """Read this rank's part of all parameters that a file has in their shape, or note where those are that are to be
    read later; return their names by those in the files, the same on every rank."""
    params, found = dict(model.named_parameters(remove_duplicate=False)), {}
    for file in dict.fromkeys(name for name in files if name.endswith(".safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                param = params.get(new_name(key)) if key in state else None
                shape = tuple(opened.get_slice(key).get_shape())
                if param is None or not zero3.is_partitioned(param) or shape != tuple(zero3.full_shape(param)):
                    continue
                if zero3.is_unfilled(param):
                    setattr(param, _UNREAD, (file, key))
                else:
                    _read_shard(param, opened, key)
                param._is_hf_initialized = True  # type: ignore[attr-defined]  # by which transformers knows it
                found[key] = new_name(key)
    return found


@torch.no_grad()
def _read_shard(param: nn.Parameter, opened: safe_open, key: str) -> None:
    """Read this rank's part of a tensor in a file."""
    own, shape = zero3.shard_of(param), zero3.full_shape(param)
    start, stop = own.start, own.start + own.values.numel()
    if shape and start < stop:
        zero3.write_shard(param, _flat_range(opened.get_slice(key), shape, start, stop))
    elif start < stop:
        zero3.write_shard(param, opened.get_tensor(key).view(-1))


def _flat_range(stored: Any, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Return values [start, stop) of a tensor in a file, of which only the rows that have them are read."""
    row = prod(shape[1:])
    first, last = start // row, -(-stop // row)
    return stored[first:last].reshape(-1)[start - first * row : stop - first * row]
