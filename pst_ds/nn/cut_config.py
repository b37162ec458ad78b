"""The config of a model that lost channels, heads or blocks. Widths and heads are equal in all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pst_ds.config.one_shot import OneShotConfig
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim",
)  # fmt: skip
"""Names of the width of feed-forward layers in the configs of transformers."""
_MULTIPLES = {512: 64, 64: 8}
"""Widths above these stay multiples of these, where kernels are fast."""


def cut_config(config: PretrainedConfig, asked: OneShotConfig, layers: Sequence[int] = ()) -> dict[str, object]:
    """Change a ``config`` as ``asked``; return the settings that changed, apart from lists.

    ``layers``: those that stay; by default the first. Raises InputError for widths that do not divide, and for what the
    config cannot express.
    """
    text: Any = config.get_text_config()
    changes: dict[str, object] = {}
    if asked.ffn is not None:
        changes |= _widths(text, asked.ffn)
    if asked.heads is not None or asked.kv_groups is not None:
        changes |= _heads(text, asked)
    if asked.layers is not None:
        changes |= _layers(text, asked.layers, layers or range(asked.layers))
    for key, value in changes.items():
        try:
            setattr(text, key, value)
        except AttributeError:  # a property of other settings
            raise InputError(f"{text.model_type}: its config cannot have {key} = {value}. Cut ffn instead") from None
    return changes


def _widths(text: Any, share: float) -> dict[str, object]:
    changes: dict[str, object] = {}
    for key in _WIDTHS:
        width = getattr(text, key, 0)
        if width is None:  # GPT-2's n_inner
            width = 4 * text.hidden_size
        if not isinstance(width, int) or not width:
            continue
        multiple = next((m for above, m in _MULTIPLES.items() if width > above and width % m == 0), 1)
        wanted = width * share / multiple
        if wanted < 1 or wanted != int(wanted):
            near = [multiple * n / width for n in (math.floor(wanted), math.floor(wanted) + 1) if n]
            raise InputError(
                f"ffn = {share} leaves {width * share:.6g} of {width} channels ({key}); widths are multiples of "
                f"{multiple}. Choose {' or '.join(f'{value:.6g}' for value in near)}"
            )
        changes[key] = int(wanted) * multiple
    if not changes:
        raise InputError(
            f"ffn = {share}: no setting of the config of {text.model_type} is the width of its feed-forward layers. "
            "Remove heads or layers instead"
        )
    return changes


def _heads(text: Any, asked: OneShotConfig) -> dict[str, object]:
    heads = getattr(text, "num_attention_heads", 0)
    groups = getattr(text, "num_key_value_heads", None) or heads
    given = f"heads = {asked.heads}" if asked.kv_groups is None else f"kv_groups = {asked.kv_groups}"
    if not isinstance(heads, int) or groups < 2:
        raise InputError(f"{given}: {text.model_type} has {groups} groups of heads in its config. Cut ffn instead")
    ratio = heads // groups
    left, rest = (asked.kv_groups, 0) if asked.heads is None else divmod(asked.heads, ratio)
    assert left is not None
    if rest:
        raise InputError(f"{given}: {ratio} heads share keys and values. Choose a multiple of {ratio}")
    if not 1 <= left < groups:
        raise InputError(
            f"{given}: the model has {heads} heads in {groups} groups. Choose fewer, and at least one group"
        )
    changes: dict[str, object] = {"num_attention_heads": left * ratio}
    changes["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    if hasattr(text, "num_key_value_heads"):
        changes["num_key_value_heads"] = left
    return changes


def _layers(text: Any, number: int, kept: Sequence[int]) -> dict[str, object]:
    before = text.num_hidden_layers
    if not 1 <= number < before:
        raise InputError(f"layers = {number}: the model has {before}. Choose fewer, and at least 1")
    for key, value in list(vars(text).items()):
        of_layers = "layer" in key or "pattern" in key
        if of_layers and isinstance(value, list) and len(value) == before:
            setattr(text, key, [value[index] for index in kept])
    return {"num_hidden_layers": number}
