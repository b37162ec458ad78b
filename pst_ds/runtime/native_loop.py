"""ctypes interface of the native decoder loop and of the matrices that it multiplies (``decoder/loop.hpp``).

Weights are repacked for this processor's instructions when a model is opened (``decoder/matrix.hpp``).
"""

import ctypes
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import CDLL, c_int
from functools import cache, partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pst_ds.core.kernels import INT, POINTER, NativeSource, load
from pst_ds.errors import InputError

LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "amx")
"""Plain C++; AVX2 with FMA; the same with AVX-VNNI; AVX-512 with VBMI2 and VNNI; the same with int8 AMX."""
VARIABLE = "PST_DS_INSTRUCTIONS"
"""Environment variable with one of :data:`LEVELS`. Libraries read it once, on first use."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "relu2", "xielu")
XIELU_NUMBERS = 4
"""Parameters of xielu: factors of x^2, of e^x - 1 - x and of x, and the x at which e^x - 1 is cut off."""
LINEARS = ("qkv", "output", "gate_up", "down")
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "queries", "keys")
SHAPE = (
    "layers", "hidden", "heads", "key_value_heads", "head", "inner", "vocabulary", "context", "sequences", "most",
    "activation", "gated", "cache_bits", "norm_of_heads",
)  # fmt: skip
NUMBERS = ("attention_scale", "attention_cap", "logits_cap", "logits_scale", "residual_scale")
SOURCE = NativeSource(
    "decoder/decoder.cpp",
    {
        "pst_decoder_level": ([], c_int),
        "pst_decoder_supports": ([c_int], c_int),
        "pst_matrix_of_codes": ([POINTER, POINTER, INT, INT, c_int, INT, c_int], POINTER),
        "pst_matrix_of_floats": ([POINTER, INT, INT, c_int], POINTER),
        "pst_matrix_bytes": ([POINTER], INT),
        "pst_matrix_free": ([POINTER], None),
        "pst_matrix_multiply": ([POINTER, POINTER, INT, POINTER, c_int, c_int, c_int], c_int),
        "pst_decoder_new": ([POINTER, POINTER, c_int], POINTER),
        "pst_decoder_free": ([POINTER], None),
        "pst_decoder_angles": ([POINTER, POINTER, POINTER, INT, c_int], None),
        "pst_decoder_linear": ([POINTER, INT, c_int, POINTER, INT, POINTER], None),
        "pst_decoder_norm": ([POINTER, INT, c_int, POINTER, POINTER, ctypes.c_float], None),
        "pst_decoder_activation": ([POINTER, INT, POINTER], None),
        "pst_decoder_attention": ([POINTER, INT, INT, INT], None),
        "pst_decoder_embedding": ([POINTER, POINTER, POINTER, c_int, INT, ctypes.c_float], None),
        "pst_decoder_copy": ([POINTER, INT, INT, INT], None),
        "pst_adapter_new": ([INT, POINTER, INT, c_int, ctypes.c_float], POINTER),
        "pst_adapter_free": ([POINTER], None),
        "pst_decoder_run": ([*([POINTER] * 5), INT, POINTER, INT, POINTER, c_int, c_int], c_int),
    },
    "decoder loops",
    flags=("-std=c++17", "-O3", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"),
    may_flags=("-pthread",),
    announce=True,
)
library = cache(partial(load, SOURCE))
"""Compiled loop, or None if it cannot be built."""


def require_library() -> CDLL:
    """Return the compiled loop. Raises RuntimeError if it cannot be built, or is switched off."""
    compiled = library()
    if compiled is not None:
        return compiled
    if os.environ.get("PST_DS_NATIVE") == "0":
        raise RuntimeError("the environment sets PST_DS_NATIVE = '0', which switches the native loop off. Unset it")
    raise RuntimeError(
        "the native loop cannot be compiled, for the reason in the warning. Install a C++ compiler, or name one in CXX"
    )


def as_asked(level: int) -> int:
    """Return ``level``, which a library chose. Raises InputError if the environment asks for another one."""
    asked = os.environ.get(VARIABLE)
    if asked and asked != LEVELS[level]:
        raise InputError(
            f"the environment sets {VARIABLE} = {asked!r}, which this processor, its system or the compiler of our "
            f"native code does not have. Unset it for {LEVELS[level]!r}, or set one of {', '.join(LEVELS[: level + 1])}"
        )
    return level


@cache
def best_level() -> int:
    """Return the index in :data:`LEVELS` of this processor's best instruction set, or of the environment's choice.

    AMX is only used if the environment sets it: it has not been timed yet. Raises InputError if it is not supported.
    """
    return as_asked(int(require_library().pst_decoder_level()))


def narrowed(values: Tensor) -> Tensor:
    """Return float ``values`` in bf16 if that is lossless, else in fp32."""
    narrow = values.to(torch.bfloat16)
    return narrow if torch.equal(narrow.to(values.dtype), values) else values.float()


class Matrix:
    """Weight of a linear layer (O, I), packed for the instruction set ``level``."""

    def __init__(self, handle: int | None, shape: tuple[int, int], level: int, keep: Tensor | None = None):
        if not handle:
            raise MemoryError(f"not enough memory to pack a weight of {shape[0]} x {shape[1]}")
        self.handle, self.shape, self.level, self._keep = handle, shape, level, keep
        weakref.finalize(self, require_library().pst_matrix_free, handle)

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, bits: int, group: int, level: int | None = None) -> Self:
        """Pack ``codes`` (O, I) int8, 0 where pruned, with bf16 ``scales`` (O, groups).

        ``group``: columns per group, a multiple of 32; 0 for per-row scales.
        """
        level = best_level() if level is None else level
        rows, columns = codes.shape
        groups = -(-columns // group) if group else 1
        if codes.dtype != torch.int8 or scales.dtype != torch.bfloat16 or tuple(scales.shape) != (rows, groups):
            found = f"{codes.dtype} codes {tuple(codes.shape)}, {scales.dtype} scales {tuple(scales.shape)}"
            raise ValueError(f"{found}; int8 codes take bf16 scales of shape {(rows, groups)}")
        if group % 32:
            raise ValueError(f"groups of {group} columns; they must be a multiple of 32")
        codes, scales = codes.contiguous(), scales.contiguous()
        pointers = codes.data_ptr(), scales.data_ptr()
        return cls(
            require_library().pst_matrix_of_codes(*pointers, rows, columns, bits, group, level), (rows, columns), level
        )

    @classmethod
    def of_floats(cls, weight: Tensor, level: int | None = None) -> Self:
        """Use ``weight`` (O, I), fp32 or bf16, unchanged, and without a copy if it is contiguous."""
        weight = weight.detach().contiguous()
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a weight of {weight.dtype}; fp32 and bf16 are multiplied")
        shape = (weight.shape[0], weight.shape[1])
        found = require_library().pst_matrix_of_floats(weight.data_ptr(), *shape, 8 * weight.element_size())
        return cls(found, shape, best_level() if level is None else level, weight)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(require_library().pst_matrix_bytes(self.handle))

    def multiply(self, x: Tensor, threads: int = 1, *, in_bytes: bool = False) -> Tensor:
        """Return x W', fp32 (tokens, O), for fp32 ``x`` (tokens, I).

        ``in_bytes``: quantise ``x`` to int8, with a scale per word of 64 columns (32 if groups of the weight are not a
        multiple of 64), instead of to 13 to 16 bits. Raises ValueError if the instruction set does not support it.
        """
        x = x.float().contiguous()
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"x is {tuple(x.shape)}; the weight takes (tokens, {self.shape[1]})")
        y = x.new_empty(x.shape[0], self.shape[0])
        failed = require_library().pst_matrix_multiply(
            self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), threads, self.level, in_bytes
        )
        if failed == 2:
            raise ValueError(f"int8 activations are not supported with {LEVELS[self.level]}")
        if failed:
            raise MemoryError(f"not enough memory to multiply {tuple(x.shape)} with a weight of {self.shape}")
        return y


class Norm(NamedTuple):
    """A root-mean-square norm, or with ``bias`` a layer norm, which subtracts the mean first."""

    gain: Tensor
    bias: Tensor | None
    epsilon: float


class Place(NamedTuple):
    """Rows of a layer's product, one of :data:`LINEARS`, that are a linear layer of the model."""

    layer: int
    product: str
    first: int
    rows: int
    columns: int


class Adapter:
    """A user's low-rank updates y += beta U (V x) of the products of a loop with ``layers`` layers."""

    def __init__(self, layers: int, beta: float, updates: Mapping[Place, tuple[Tensor, Tensor]], state: object):
        """``updates``: U (rows, rank) and V (rank, columns), used in bf16 if all are. ``state``: kept in memory."""
        self.state, self._keep, parts = state, list[Tensor](), list[int]()
        is_bf16 = all(factor.dtype == torch.bfloat16 for pair in updates.values() for factor in pair)
        for place, (left, right) in updates.items():
            assert (*left.shape, right.shape[1]) == (place.rows, right.shape[0], place.columns)
            held = [_in_sixteens(factor if is_bf16 else factor.float()) for factor in (right, left.t())]
            self._keep += held
            parts += place.layer, LINEARS.index(place.product), *(factor.data_ptr() for factor in held)
            parts += len(right), place.columns, place.rows, place.first
        numbers = (ctypes.c_int64 * len(parts))(*parts)
        self.handle = require_library().pst_adapter_new(layers, numbers, len(updates), 16 if is_bf16 else 32, beta)
        if not self.handle:
            raise MemoryError(f"not enough memory for {len(updates)} updates")
        weakref.finalize(self, require_library().pst_adapter_free, self.handle)


def _in_sixteens(rows: Tensor) -> Tensor:
    """Return a contiguous matrix whose rows end with zeros up to a multiple of 16 numbers."""
    missing = -rows.shape[1] % 16
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).contiguous()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


class Loop:
    """The C++ decoder: a table of layers, and a cache of ``sequences`` times ``context`` positions.

    C++ does not check its arguments, which come from a model's config and tensors, so every method does, and
    raises InputError.
    """

    def __init__(self, shape: dict[str, int], numbers: dict[str, float], level: int | None = None):
        """``shape`` and ``numbers`` have the keys :data:`SHAPE` and :data:`NUMBERS`."""
        self._library, self.shape = require_library(), dict(shape)
        for key in SHAPE:
            least = 0 if key in ("activation", "gated", "norm_of_heads") else 1
            _require(least <= shape[key] < 1 << 31, f"{key} = {shape[key]}: not from {least} to 2^31 - 1")
        hidden, heads, shared, head = (shape[key] for key in ("hidden", "heads", "key_value_heads", "head"))
        _require(heads % shared == 0, f"key_value_heads = {shared} does not divide heads = {heads}")
        inner = shape["inner"] * (2 if shape["gated"] else 1)
        self._sizes = {
            "qkv": ((heads + 2 * shared) * head, hidden),
            "output": (hidden, heads * head),
            "gate_up": (inner, hidden),
            "down": (hidden, shape["inner"]),
            "head": (shape["vocabulary"], hidden),
        }
        of_heads = bool(shape["norm_of_heads"])
        self._widths = {"queries": head if of_heads else heads * head, "keys": head if of_heads else shared * head}
        self._num_angles = 0
        sizes = (ctypes.c_int64 * len(SHAPE))(*(shape[key] for key in SHAPE))
        values = (ctypes.c_double * len(NUMBERS))(*(numbers[key] for key in NUMBERS))
        cached = math.prod(shape[key] for key in ("layers", "sequences", "context", "key_value_heads", "head"))
        level = best_level() if level is None else level
        is_possible = cached <= 1 << 46  # fewer than 2^63 bytes
        handle = self._library.pst_decoder_new(sizes, values, level) if is_possible else None
        if not handle:
            raise MemoryError(f"not enough memory for a cache of {shape['sequences']} x {shape['context']} positions")
        self.handle, self._keep = handle, list[object]()
        weakref.finalize(self, self._library.pst_decoder_free, handle)

    def _pointer(self, values: Tensor | None) -> int:
        if values is None:
            return 0
        values = values.detach().float().contiguous()
        self._keep.append(values)
        return values.data_ptr()

    def add_angles(self, cosines: Tensor, sines: Tensor, *, neighbours: bool) -> None:
        """Add a table of rotary angles, both (context, half of the rotated size of a head).

        ``neighbours``: pairs of columns are (0, 1), (2, 3), ... instead of (0, half), (1, half + 1), ...
        """
        turned, head, context = 2 * cosines.shape[1], self.shape["head"], self.shape["context"]
        _require(turned <= head, f"rotary angles turn {turned} columns of a head of {head}")
        _require(cosines.shape == sines.shape and cosines.shape[0] >= context, f"rotary angles of {tuple(sines.shape)}")
        self._num_angles += 1
        pointers = self._pointer(cosines), self._pointer(sines)
        self._library.pst_decoder_angles(self.handle, *pointers, cosines.shape[1], neighbours)

    def set_linear(self, layer: int, name: str, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """Set one of :data:`LINEARS` of a layer, or "head": products of one input, side by side, and their biases."""
        rows = sum(matrix.shape[0] for matrix in matrices)
        for matrix in matrices:
            found, wanted = (rows, matrix.shape[1]), self._sizes[name]
            _require(found == wanted, f"layer {layer}, {name}: weights of {found} where the config has {wanted}")
        _require(bias is None or bias.numel() == rows, f"layer {layer}, {name}: a bias not of {rows} numbers")
        handles = (ctypes.c_void_p * len(matrices))(*(matrix.handle for matrix in matrices))
        self._keep += matrices
        which = -1 if name == "head" else LINEARS.index(name)
        self._library.pst_decoder_linear(self.handle, layer, which, handles, len(matrices), self._pointer(bias))

    def set_norm(self, layer: int, name: str, norm: Norm) -> None:
        """Set one of :data:`NORMS` of a layer, or "last"."""
        width = self._widths.get(name, self.shape["hidden"])
        for part, values in (("gain", norm.gain), ("bias", norm.bias)):
            fits = values is None or values.numel() == width
            _require(fits, f"layer {layer}, norm {name}: a {part} not of {width} numbers")
        which = -1 if name == "last" else NORMS.index(name)
        pointers = self._pointer(norm.gain), self._pointer(norm.bias)
        self._library.pst_decoder_norm(self.handle, layer, which, *pointers, norm.epsilon)

    def set_activation(self, layer: int, numbers: Tensor) -> None:
        """Set the parameters of a layer's activation: the four of "xielu"."""
        _require(numbers.numel() == XIELU_NUMBERS, f"layer {layer}: {numbers.numel()} parameters of an activation")
        self._library.pst_decoder_activation(self.handle, layer, self._pointer(numbers))

    def set_attention(self, layer: int, window: int, angles: int) -> None:
        """Set the attention window of a layer (0 for all positions) and its table of angles (-1 for none)."""
        _require(window >= 0, f"layer {layer}: sliding_window = {window}; it is at least 1, or null for all positions")
        _require(-1 <= angles < self._num_angles, f"layer {layer}: rotary table {angles} does not exist")
        self._library.pst_decoder_attention(self.handle, layer, min(window, self.shape["context"]), angles)

    def set_embedding(self, rows: Tensor, scales: Tensor | None, bits: int, group: int, scale: float) -> None:
        """Set the embedding: fp32 or bf16 ``rows`` (vocabulary, hidden), or codes of 8 or 4 ``bits`` with scales.

        ``scales``: bf16 (vocabulary, groups). ``group``: columns per group, 0 for per-row scales. ``scale``: a factor.
        """
        hidden = self.shape["hidden"]
        wanted = (rows.shape[0], (hidden + 1) // 2 if bits == 4 else hidden)
        _require(rows.shape == wanted, f"an embedding of {tuple(rows.shape)} where the config has {wanted}")
        groups = -(-hidden // group) if group else 1
        fits = scales is None or tuple(scales.shape) == (rows.shape[0], groups)
        _require(fits, f"the embedding's scales are not {rows.shape[0]} x {groups}")
        self._num_rows = rows.shape[0]
        held = [rows.detach().contiguous(), None if scales is None else scales.contiguous()]
        self._keep += held
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in held]
        self._library.pst_decoder_embedding(self.handle, *pointers, bits, group, scale)

    def copy(self, source: int, to: int, length: int) -> None:
        """Copy the first ``length`` cached positions of the sequence ``source`` to ``to``."""
        sequences, context = self.shape["sequences"], self.shape["context"]
        assert 0 <= min(source, to) <= max(source, to) < sequences
        assert 0 <= length <= context
        self._library.pst_decoder_copy(self.handle, source, to, length)

    def run(
        self,
        ids: Sequence[int],
        sequences: Sequence[int],
        positions: Sequence[int],
        adapters: Sequence[Adapter | None],
        wanted: Sequence[int],
        threads: int,
        in_bytes: bool = False,
    ) -> Tensor:
        """Run tokens through all layers. Return fp32 logits (number wanted, vocabulary).

        ``sequences``, ``positions``, ``adapters``: of every token. Earlier positions must be in the cache or this pass.
        ``wanted``: tokens whose logits are returned. ``in_bytes``: use int8 activations if they are supported.
        """
        shape, count, logits = self.shape, len(ids), torch.empty(len(wanted), self.shape["vocabulary"])
        assert count == len(sequences) == len(positions) == len(adapters) <= shape["most"]
        given = (ids, sequences, positions, wanted)
        limits = (self._num_rows, shape["sequences"], shape["context"], count)
        assert all(0 <= value < limit for values, limit in zip(given, limits, strict=True) for value in values)
        *of_tokens, rows = ((ctypes.c_int64 * len(values))(*values) for values in given)
        handles = (ctypes.c_void_p * count)(*(None if adapter is None else adapter.handle for adapter in adapters))
        if self._library.pst_decoder_run(
            self.handle, *of_tokens, handles, count, rows, len(wanted), logits.data_ptr(), threads, in_bytes
        ):
            raise MemoryError(f"not enough memory for a pass of {count} tokens")
        return logits
