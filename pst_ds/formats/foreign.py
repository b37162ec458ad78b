"""Dequantise weights of other libraries: GPTQ, AWQ, bitsandbytes, MXFP4.

Each format is described in the source of the library that writes it.

    gptq            (AutoGPTQ, GPTQModel) w = scale * (code - zero point), in groups of inputs given by ``g_idx``. Words
                    hold the codes of consecutive inputs from the lowest bits, and zero points of consecutive outputs,
                    from which files of version 1 subtract 1
    awq             (AutoAWQ, "gemm") the same in 4 bits, in groups of consecutive inputs; the eight codes of a word
                    belong to outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
    bitsandbytes    4 bits: w = table[code] * absmax, with one absmax per 64 consecutive weights or so, the first of two
                    codes in the upper half of a byte; absmax may be quantised to 8 bits. 8 bits: w = code * SCB / 127,
                    with one SCB per output
    mxfp4           (OCP Microscaling 1.0) fp4 values, 32 of which share a power of two, the first of two in the lower
                    half of a byte; weights of experts are stored transposed
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pst_ds.formats.parts import FormatError

Settings = Mapping[str, Any]
"""``quantization_config`` of config.json."""
METHODS = ("gptq", "awq", "bitsandbytes", "mxfp4")
"""Values of ``quant_method`` in a model's config."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_STATE = "quant_state.bitsandbytes__"
_BITS_AND_BYTES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4")
_PARTS = {
    "gptq": (".weight", (".qweight", ".qzeros", ".scales", ".g_idx")),
    "awq": (".weight", (".qweight", ".qzeros", ".scales")),
    "bitsandbytes": (".weight", (*(f".weight.{part}" for part in _BITS_AND_BYTES), ".SCB", ".weight_format")),
    "mxfp4": ("", ("_blocks", "_scales")),
}
"""Ending of a weight's name, and endings of its parts. The codes of bitsandbytes have the weight's name."""


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """Format of another library's weights. Raises FormatError for unsupported settings."""

    method: str
    settings: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise FormatError(f"quant_method = {self.method} is not supported; {', '.join(METHODS)} are")
        if self.method == "gptq" and self.settings.get("bits") not in (2, 4, 8):
            raise FormatError(f"gptq is supported with 2, 4 or 8 bits, not {self.settings.get('bits')!r}")
        if self.method == "gptq" and self.settings.get("checkpoint_format") not in (None, "gptq", "gptq_v2"):
            raise FormatError(f"gptq is supported as gptq or gptq_v2, not {self.settings['checkpoint_format']!r}")
        awq = self.settings.get("bits"), str(self.settings.get("version", "gemm")).lower()
        if self.method == "awq" and awq != (4, "gemm"):
            raise FormatError(f"awq is supported with 4 bits, version gemm, not {awq[0]!r} bits, {awq[1]}")

    def weights(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Return the weights among the tensors ``names``: for each, the names of its parts by part."""
        ending, parts = _PARTS[self.method]
        found: dict[str, dict[str, str]] = {}
        for name in names:
            part = next((part for part in parts if name.endswith(part)), None)
            if part is None or (part == ".scales" and name.removesuffix(part) + ".qweight" not in names):
                continue
            weight = name.removesuffix(part) + ending
            found.setdefault(weight, {})[part.removeprefix(".weight.").strip("._")] = name
        if self.method == "bitsandbytes":
            for weight, own in found.items():
                own["codes"] = weight
        return found

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weight ``name`` in fp32: (O, I), or (E, I, O) for experts. Raises FormatError."""
        try:
            weight = _UNPACK[self.method](parts, self.settings)
        except _UNPACK_ERRORS as error:
            sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
            raise FormatError(f"{name}: its {self.method} parts {sizes} do not fit together: {error}") from None
        if not bool(torch.isfinite(weight).all()):
            raise FormatError(f"{name}: its {self.method} scales are not finite")
        return weight


def _fields(words: Tensor, bits: int) -> Tensor:
    """Unpack unsigned ``bits``-bit values from int32 words, lowest first: (..., n) to (..., n * 32 / bits)."""
    _require(words.dtype == torch.int32, f"words of {words.dtype}")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & (1 << bits) - 1).flatten(-2)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _gptq(parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
    bits, scales = settings["bits"], parts["scales"].float()
    codes = _fields(parts["qweight"].t(), bits)
    zeros = _fields(parts["qzeros"], bits)[:, : scales.shape[1]]
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = zeros + 1
    inputs, groups = codes.shape[1], scales.shape[0]
    group_of = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // -(-inputs // groups)
    _require(tuple(group_of.shape) == (inputs,), f"{len(group_of)} groups of inputs for {inputs} inputs")
    _require(bool(((group_of >= 0) & (group_of < groups)).all()), f"an input in no group of {groups}")
    return (codes - zeros[group_of].t()) * scales[group_of].t()


def _awq(parts: Mapping[str, Tensor], _: Settings) -> Tensor:
    def ordered(words: Tensor) -> Tensor:
        eights = _fields(words, 4).unflatten(1, (-1, 8))
        own = torch.empty_like(eights)
        own[..., list(_AWQ_ORDER)] = eights
        return own.flatten(1)

    scales, codes, zeros = parts["scales"].float(), ordered(parts["qweight"]), ordered(parts["qzeros"])
    _require(codes.shape[0] % scales.shape[0] == 0, "groups that do not divide the inputs")
    size = codes.shape[0] // scales.shape[0]
    weight: Tensor = (codes.unflatten(0, (-1, size)) - zeros.unsqueeze(1)) * scales.unsqueeze(1)
    return weight.flatten(0, 1).t()


def _bitsandbytes(parts: Mapping[str, Tensor], _: Settings) -> Tensor:
    codes = parts["codes"]
    if "SCB" in parts:
        _require(codes.dtype == torch.int8, f"codes of {codes.dtype}")
        _require("weight_format" not in parts or int(parts["weight_format"]) == 0, "tiles of an older version")
        return codes.float() * (parts["SCB"].float() / 127.0).unsqueeze(1)
    state = json.loads(bytes(next(parts[part] for part in parts if part.startswith("quant_state")).tolist()))
    _require(codes.dtype == torch.uint8, f"codes of {codes.dtype}")
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], -1).flatten()
    numel, size = math.prod(state["shape"]), int(state["blocksize"])
    _require(0 <= halves.numel() - numel <= 1, f"{halves.numel()} codes for {numel} weights")
    absmax = parts["absmax"].flatten()
    _require(
        0 < size <= 1 << 16 and absmax.numel() == -(-numel // size), f"{absmax.numel()} scales for {numel} weights"
    )
    if "nested_absmax" in parts:
        every = int(state["nested_blocksize"])
        _require(0 < every <= 1 << 16, f"a scale of {every} scales")
        nested = parts["nested_absmax"].float().repeat_interleave(every)[: absmax.numel()]
        absmax = parts["nested_quant_map"].float()[absmax.long()] * nested + float(state["nested_offset"])
    values = parts["quant_map"].float()[halves[:numel].long()]
    return (values * absmax.float().repeat_interleave(size)[:numel]).view(state["shape"])


def _mxfp4(parts: Mapping[str, Tensor], _: Settings) -> Tensor:
    blocks, scales = parts["blocks"], parts["scales"]
    _require(blocks.dtype == scales.dtype == torch.uint8 and blocks.shape[:-1] == scales.shape, "blocks and scales")
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    numbers = table[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
    return torch.ldexp(numbers, scales.int().unsqueeze(-1) - 127).flatten(-2).transpose(-1, -2).contiguous()


_UNPACK_ERRORS = LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError, StopIteration
"""Errors of these functions for parts that do not fit together; RecursionError is a RuntimeError."""
_UNPACK = {"gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes, "mxfp4": _mxfp4}
