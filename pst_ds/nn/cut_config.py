"""The config of a model that lost feed-forward channels. Widths are equal in all layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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


def cut_config(config: PretrainedConfig, share: float) -> dict[str, object]:
    """Change a ``config`` to a ``share`` of its feed-forward channels; return the settings that changed.

    Raises InputError for widths that do not divide, and for what the config cannot express.
    """
    text: Any = config.get_text_config()
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
            "Prune weights with another method"
        )
    for key, value in changes.items():
        try:
            setattr(text, key, value)
        except AttributeError:  # a property of other settings
            raise InputError(
                f"ffn = {share}: the config of {text.model_type} cannot have {key} = {value}. Prune weights with "
                "another method"
            ) from None
    return changes
