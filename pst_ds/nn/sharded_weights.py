"""Read pretrained weights under ZeRO-3 shard by shard on every rank; transformers alone reads on rank 0 and broadcasts.

Weights to be quantised can stay in their files until then, so that at most one of them is in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pst_ds.nn.model_structure import is_linear
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import raise_on_all_ranks, world_size
from pst_ds.third_party import Code, patched

_UNREAD = "pst_unread"
"""Attribute of a parameter that is not read yet: (file, name in it)."""


@contextmanager
def read_by_every_rank(*, later: bool = False) -> Iterator[None]:
    """Make ``from_pretrained`` under ZeRO-3 read tensors of safetensors files in shards, in the context. Collective.

    Tensors that the model stores in another form, such as experts to be stacked, come from rank 0 as usual. With
    ``later``, weights of linear layers that can be read in shards take no memory before :func:`read_now`.
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
            names = raise_on_all_ranks(lambda: _read_shards(model, state, files, new_name), (Exception,))
            for param in model.parameters():
                if sharding.is_unfilled(param) and not hasattr(param, _UNREAD):
                    sharding.make_shard(param)
            unread = {key: value for key, value in state.items() if key not in names}
            problems, missing = cast(tuple[list[str], set[str]], load(model, unread, load_config))
            return problems, missing - set(names.values())

        return loaded

    with (
        patched(modeling_utils, "load_state_dict", noting),
        patched(modeling_utils, "_load_state_dict_into_zero3_model", sharing),
        sharding.unfilled(lambda module, name: name == "weight" and is_linear(module)) if later else nullcontext(),
    ):
        yield


def read_now(params: Iterable[nn.Parameter]) -> None:
    """Read this rank's shards of the ``params`` that are still in their files."""
    for param in params:
        if hasattr(param, _UNREAD):
            file, key = getattr(param, _UNREAD)
            sharding.make_shard(param)
            with safe_open(file, framework="pt") as opened:
                _read_shard(param, opened, key)
            delattr(param, _UNREAD)


def _renaming(model: nn.Module, mapping: Sequence[object] | None) -> Callable[[str], str]:
    """Return a function from a tensor's name in a file to that in the model; "" if ``mapping`` changes its values."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    prefix = getattr(model, "base_model_prefix", "")
    tensors = {name: torch.empty(0, device="meta") for name in model.state_dict()}  # only the names matter
    renamings: list[WeightRenaming] = []
    converters: list[WeightConverter] = []
    for entry in mapping or ():
        if isinstance(entry, WeightRenaming):
            renamings.append(entry)
        elif isinstance(entry, WeightConverter):
            converters.append(entry)

    def new_name(key: str) -> str:
        name = key
        if mapping:
            name, changed_by = rename_source_key(
                key, renamings, converters, base_model_prefix=prefix, meta_state_dict=tensors
            )
            if changed_by is not None:
                return ""
        # Files of a model without a head name its tensors without the prefix of the model with one.
        prefixed = f"{prefix}.{name}"
        return prefixed if prefixed in tensors else name

    return new_name


@torch.no_grad()
def _read_shards(
    model: nn.Module, state: Mapping[str, Tensor], files: Sequence[str], new_name: Callable[[str], str]
) -> dict[str, str]:
    """Read this rank's shards of all parameters with a tensor of their shape, or note its place if it is read later.

    Return their names by those in the files, the same on every rank.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    new_names: dict[str, str] = {}
    for file in dict.fromkeys(files):
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                param = params.get(new_name(key)) if key in state else None
                shape = tuple(opened.get_slice(key).get_shape())
                if param is None or not sharding.is_partitioned(param) or shape != tuple(sharding.full_shape(param)):
                    continue
                if sharding.is_unfilled(param):
                    setattr(param, _UNREAD, (file, key))
                else:
                    _read_shard(param, opened, key)
                param._is_hf_initialized = True  # type: ignore[attr-defined]  # for transformers
                new_names[key] = new_name(key)
    return new_names


@torch.no_grad()
def _read_shard(param: nn.Parameter, opened: safe_open, key: str) -> None:
    """Read this rank's shard of ``param`` from the tensor ``key`` of a file."""
    shard = sharding.shard_of(param)
    shape = sharding.full_shape(param)
    start = shard.start
    stop = shard.start + shard.values.numel()
    if start == stop:  # more ranks than values
        return
    if not shape:
        sharding.write_shard(param, opened.get_tensor(key).view(-1))
        return
    # safetensors slices whole rows: only those around the shard are read.
    row_length = prod(shape[1:])
    first_row = start // row_length
    last_row = -(-stop // row_length)  # rounded up; excluded
    rows = opened.get_slice(key)[first_row:last_row].reshape(-1)
    offset = first_row * row_length
    sharding.write_shard(param, rows[start - offset : stop - offset])
