"""Find the list of transformer blocks that contains the layers to prune."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pst_ds.errors import InputError
from pst_ds.nn.model_structure import outermost_list


def find_blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """Return (name, ModuleList of the blocks) of the list that contains all modules in ``names``.

    Raises InputError if they are in two lists or outside of lists, and if blocks run more than once or share keys and
    values.
    """
    found = {name: outermost_list(name, model) for name in names}
    outside = next((name for name, stack in found.items() if not stack), None)
    if outside is not None:
        raise InputError(
            f"{outside} is not in a block, and calibration goes block by block. Exclude it with pst.exclude_modules, "
            "or use --method magnitude"
        )
    stacks = list(dict.fromkeys(found.values()))
    if len(stacks) > 1:
        raise InputError(
            f"the layers are in {len(stacks)} stacks of blocks ({', '.join(stacks)}), and calibration supports "
            "one. Select the layers of one with pst.target_modules, or use --method magnitude"
        )
    blocks = model.get_submodule(stacks[0])
    assert isinstance(blocks, nn.ModuleList)
    config: object = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if shared := getattr(text, "num_kv_shared_layers", 0):
        raise InputError(
            f"num_kv_shared_layers = {shared}: the last blocks of {stacks[0]} use keys and values of earlier ones, but "
            "calibration runs each block separately. Use --method magnitude"
        )
    layers, num_own = getattr(config, "num_hidden_layers", None), len(set(blocks))
    if num_own < len(blocks) or (isinstance(layers, int) and layers > len(blocks)):
        raise InputError(
            f"{stacks[0]} has {num_own} distinct blocks for {max(len(blocks), layers or 0)} layers: a block that "
            "runs more than once cannot be pruned in between. Use --method magnitude"
        )
    return stacks[0], blocks


def block_of(name: str, stack: str) -> int:
    """Return the index of the block of ``stack`` that contains the module ``name``."""
    return int(name.removeprefix(stack + ".").partition(".")[0])
