"""The stack of blocks that a model's layers are in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pst_ds.errors import InputError
from pst_ds.nn.model_structure import outermost_list


def find_blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """(name, the ModuleList whose items are the blocks) of a model; all that is named is in one of the items.

    Raises InputError when the modules are in two such lists, or outside, and when blocks are used more than once or
    depend on each other's keys and values.
    """
    found = {name: outermost_list(name, model) for name in names}
    outside = next((name for name, stack in found.items() if not stack), None)
    if outside is not None:
        raise InputError(
            f"{outside} is in no block, and calibration goes block by block; leave it out with pst.exclude_modules, or "
            "use --method magnitude"
        )
    stacks = list(dict.fromkeys(found.values()))
    if len(stacks) > 1:
        raise InputError(
            f"the layers are in {len(stacks)} stacks of blocks ({', '.join(stacks)}), and calibration goes through "
            "one; name the layers of one with pst.target_modules, or use --method magnitude"
        )
    blocks = model.get_submodule(stacks[0])
    assert isinstance(blocks, nn.ModuleList)
    config: object = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if shared := getattr(text, "num_kv_shared_layers", 0):
        raise InputError(
            f"num_kv_shared_layers = {shared}: the last blocks of {stacks[0]} use keys and values of earlier ones, and "
            "calibration runs each block alone; use --method magnitude"
        )
    layers, num_own = getattr(config, "num_hidden_layers", None), len(set(blocks))
    if num_own < len(blocks) or (isinstance(layers, int) and layers > len(blocks)):
        raise InputError(
            f"{stacks[0]} has {num_own} blocks of its own for {max(len(blocks), layers or 0)} layers: a block that "
            "runs more than once cannot be pruned between two runs; use --method magnitude"
        )
    return stacks[0], blocks


def block_of(name: str, stack: str) -> int:
    """Return the index of the item of ``stack`` that what is named is in."""
    return int(name.removeprefix(stack + ".").partition(".")[0])
