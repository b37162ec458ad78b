"""The config of a model that lost feed-forward channels, or experts. Their number is equal in all layers."""

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from pst_ds.errors import InputError
from pst_ds.nn.model_structure import experts_modules, experts_per_token, stack_layouts, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim",
)  # fmt: skip
"""Names of the width of feed-forward layers in the configs of transformers."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts, in configs and in modules."""
_MULTIPLES = {512: 64, 64: 8}
"""Widths above a key stay multiples of its value, for which kernels are fast; in falling order of the keys."""


def cut_config(config: "PretrainedConfig", share: float) -> dict[str, object]:
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
        multiple = _multiple_of(width)
        wanted = width * share / multiple
        if wanted < 1 or wanted != int(wanted):
            lower = math.floor(wanted)
            near = [f"{multiple * number / width:.6g}" for number in (lower, lower + 1) if number > 0]
            raise InputError(
                f"ffn = {share} leaves {width * share:.6g} of {width} channels ({key}); widths are multiples of "
                f"{multiple}. Choose {' or '.join(near)}"
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


def _multiple_of(width: int) -> int:
    """Return the number of which a smaller width must be a multiple; 1 if ``width`` itself is not one."""
    for above, multiple in _MULTIPLES.items():
        if width > above and width % multiple == 0:
            return multiple
    return 1


def number_of_experts(model: nn.Module, lead: str) -> tuple[str, int]:
    """Return the config key of the number of experts in each experts module of a plain ``model``, and the number.

    Raises InputError, starting with ``lead``, for a model without stacks of experts, if its config does not determine
    their number, and for routers that choose among groups of experts.
    """
    modules = experts_modules(model)
    if not modules:
        raise InputError(f"{lead}: the model has no stacks of experts. Choose another method")
    for name, module in modules.items():
        try:
            stack_layouts(module)
        except ValueError as error:
            raise InputError(f"{lead}: {name} is not a supported stack of experts: {error}") from None
    config = text_config(model)
    numbers = {int(module.num_experts) for module in modules.values()}
    key = None
    for name in NUM_EXPERTS:
        if getattr(config, name, None) in numbers:
            key = name
            break
    if key is None or len(numbers) > 1:
        raise InputError(
            f"{lead}: the modules have {sorted(numbers)} experts, and no setting of the model's config says so. "
            'Prune the weights of all experts with method = "wanda"'
        )
    if (getattr(config, "n_group", None) or 1) > 1:
        raise InputError(
            f"n_group = {config.n_group}: the router chooses among {config.n_group} groups of experts of equal size, "
            'which dropping experts would change. Prune the weights of all experts with method = "wanda"'
        )
    return key, numbers.pop()


def set_num_experts(config: "PretrainedConfig", number: int) -> None:
    """Set the number of experts in the ``config`` of a model that :func:`number_of_experts` supports."""
    text: Any = config.get_text_config()
    key = next(key for key in NUM_EXPERTS if getattr(text, key, None))
    setattr(text, key, number)


def experts_left(number: int, share: float, config: Any, setting: str) -> int:
    """Return how many of ``number`` experts are left without a ``share``: floor(share * number) are removed.

    Raises InputError, naming ``setting``, if these are fewer than the ``config`` routes a token to.
    """
    left = number - math.floor(share * number)
    per_token = experts_per_token(config)
    if left < per_token:
        raise InputError(
            f"{setting} {share} leaves {left} experts, and the router gives a token to {per_token}. Choose a lower "
            "sparsity"
        )
    return left
