"""Faster decoding of transformers models on a CPU: attention of one new token per sequence (one_query.cpp).

torch's attention takes several times as long for bf16, because it converts keys and values head by head. Here they are
read once, in place, for all heads that share them.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64
from functools import cache, partial

import torch
from torch import Tensor, nn

from pst_ds.core.kernels import FLAGS, POINTER, NativeSource, load
from pst_ds.inference.runtime.dense import quicken_output_layer

SOURCE = NativeSource(
    "attention/one_query.cpp",
    {"pst_one_query": ([*([POINTER] * 5), c_float, c_int, c_int, POINTER], None)},
    "attention of single tokens",
    flags=(*FLAGS, "-Wno-psabi"),
    may_flags=("-fopenmp",),
)
DTYPES = (torch.bfloat16, torch.float32)
LANES = 16
"""The size of a head must be a multiple of this."""
NAME = "pst_ds_one_query"
"""Name under which our attention is registered with transformers."""
_OTHERS_HAVE = ("softcap", "position_bias", "s_aux")
"""Arguments by which some models change the scores in addition to a mask."""
library = cache(partial(load, SOURCE))
"""The function of one_query.cpp, or None if it is not available."""


def one_query(query: Tensor, key: Tensor, value: Tensor, starts: list[int], scale: float) -> Tensor:
    """Return softmax(scale q K') V for one query per head, (B, H, D), in its dtype.

    ``query`` (B, H, 1, D), ``key`` and ``value`` (B, G, L, D), supported by :func:`takes`. ``starts``: first position
    that each sample sees. Sums are fp32, and a sample's result is bit-identical in every batch.
    """
    native = library()
    assert native is not None
    (samples, heads, _, size), (_, groups, length, _) = query.shape, key.shape
    sizes = (samples, groups, heads, size, length, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    arrays = (c_int64 * len(sizes))(*sizes), (c_int64 * samples)(*starts)
    pointers, threads = (tensor.data_ptr() for tensor in (query, key, value)), torch.get_num_threads()
    out = query.new_empty(samples, heads, size)
    native.pst_one_query(*pointers, *arrays, scale, query.element_size(), threads, out.data_ptr())
    return out


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether :func:`one_query` supports these inputs, and no gradient is needed."""
    size = query.shape[3]
    if query.shape[2] != 1 or size % LANES or query.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    for tensor in (query, key, value):
        if tensor.device.type != "cpu" or tensor.dtype != query.dtype or tensor.stride(3) != 1:
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    dense = all(of.stride(2) == size and of.shape == key.shape and of.shape[2] for of in (key, value))
    return dense and key.shape[3] == size and query.shape[1] % key.shape[1] == 0 and library() is not None


def first_seen(mask: Tensor | None, samples: int, length: int) -> list[int] | None:
    """Return the first position that each sample sees under a bool ``mask`` (B or 1, 1, 1, L); 0 without a mask.

    Return None for masks that differ between heads or hide positions after the first visible one.
    """
    if mask is None:
        return [0] * samples
    if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[1:]) != (1, 1, length):
        return None
    seen = mask[:, 0, 0].numpy()
    if not seen[:, -1].all() or (seen[:, 1:] < seen[:, :-1]).any():
        return None
    found: list[int] = (length - seen.sum(1)).tolist()
    return found * samples if len(found) == 1 else found


def quicken_decoding(model: nn.Module) -> None:
    """Let ``model`` compute a dense output layer and "sdpa" attention of single tokens in compiled code, on a CPU.

    Prompts and everything with a gradient stay unchanged. Logits are equal up to the rounding of sums. Call it before
    attaching anything to layers of the model: the output layer becomes another module.
    """
    quicken_output_layer(model)
    quicken_attention(model)


def quicken_attention(model: nn.Module) -> bool:
    """Let a transformers model on the CPU compute the attention of single tokens here. Return whether it changed.

    Everything else, such as prompts and training, keeps torch's attention.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or library() is None:
        return False
    if any(param.device.type != "cpu" for param in model.parameters()):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return bool(getattr(config, "_attn_implementation", None) == NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: object,
) -> tuple[Tensor, Tensor | None]:
    """Compute what transformers' "sdpa" computes, (B, tokens, H, D)."""
    plain = dropout == 0.0 and all(more.get(name) is None for name in _OTHERS_HAVE)
    if plain and takes(query, key, value):
        starts = first_seen(attention_mask, query.shape[0], key.shape[2])
        if starts is not None:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return one_query(query, key, value, starts, scale).unsqueeze(1), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
    )
    return found
