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

LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "amx", "neon_dotprod", "neon_i8mm")
"""Plain C++. On x86: AVX2 with FMA; the same with AVX-VNNI; AVX-512 with VBMI2 and VNNI; the same with int8 AMX. On
arm64: NEON with dot products of bytes; the same with matrix products of bytes."""
VARIABLE = "PST_DS_INSTRUCTIONS"
"""Environment variable with one of :data:`LEVELS`. Libraries read it once, on first use."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "relu2", "xielu")
XIELU_NUMBERS = 4
"""Parameters of xielu: factors of x^2, of e^x - 1 - x and of x, and the x at which e^x - 1 is cut off."""
_NO_BYTES = 2
"""Status of a product with int8 activations, if the instruction set does not support them."""
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
        "pst_matrix_of_codes": ([POINTER, POINTER, INT, INT, c_int, INT, c_int, c_int], POINTER),
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
        of_arm = LEVELS[level].startswith("neon")
        available = [name for name in LEVELS[: level + 1] if name == "portable" or name.startswith("neon") == of_arm]
        raise InputError(
            f"the environment sets {VARIABLE} = {asked!r}, which this processor, its system or the compiler of our "
            f"native code does not have. Unset it for {LEVELS[level]!r}, or set one of {', '.join(available)}"
        )
    return level


@cache
def best_level() -> int:
    """Return the index in :data:`LEVELS` of this processor's best instruction set, or of the environment's choice.

    With AMX, few vectors are multiplied by AVX-512, which is faster for them. Raises InputError if the environment's
    choice is not supported.
    """
    return as_asked(int(require_library().pst_decoder_level()))


def narrowed(values: Tensor) -> Tensor:
    """Return float ``values`` in bf16 if that is lossless, else in fp32."""
    narrow = values.to(torch.bfloat16)
    if torch.equal(narrow.to(values.dtype), values):
        return narrow
    return values.float()


class Matrix:
    """Weight of a linear layer (O, I), packed for the instruction set ``level``."""

    def __init__(self, handle: int | None, shape: tuple[int, int], level: int, keep: Tensor | None = None):
        if not handle:
            raise MemoryError(f"not enough memory to pack a weight of {shape[0]} x {shape[1]}")
        self.handle = handle
        self.shape = shape
        self.level = level
        self._keep = keep  # C++ has a pointer to its values
        weakref.finalize(self, require_library().pst_matrix_free, handle)

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, bits: int, group: int, level: int | None = None) -> Self:
        """Pack ``codes`` (O, I) int8, 0 where pruned, with bf16 ``scales`` (O, groups).

        ``group``: columns per group, a multiple of 32; 0 for per-row scales. Uses torch's number of threads.
        """
        if level is None:
            level = best_level()
        rows, columns = codes.shape
        groups = _num_groups(columns, group)
        if codes.dtype != torch.int8 or scales.dtype != torch.bfloat16 or tuple(scales.shape) != (rows, groups):
            raise ValueError(
                f"{codes.dtype} codes {tuple(codes.shape)}, {scales.dtype} scales {tuple(scales.shape)}; int8 codes "
                f"take bf16 scales of shape {(rows, groups)}"
            )
        if group % 32:
            raise ValueError(f"groups of {group} columns; they must be a multiple of 32")
        # named, so that both live until C++ has packed them
        codes = codes.contiguous()
        scales = scales.contiguous()
        handle = require_library().pst_matrix_of_codes(
            codes.data_ptr(), scales.data_ptr(), rows, columns, bits, group, level, torch.get_num_threads()
        )
        return cls(handle, (rows, columns), level)

    @classmethod
    def of_floats(cls, weight: Tensor, level: int | None = None) -> Self:
        """Use ``weight`` (O, I), fp32 or bf16, unchanged, and without a copy if it is contiguous."""
        weight = weight.detach().contiguous()
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a weight of {weight.dtype}; fp32 and bf16 are multiplied")
        if level is None:
            level = best_level()
        rows, columns = weight.shape
        bits = 8 * weight.element_size()
        handle = require_library().pst_matrix_of_floats(weight.data_ptr(), rows, columns, bits)
        return cls(handle, (rows, columns), level, keep=weight)

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
        status = require_library().pst_matrix_multiply(
            self.handle, x.data_ptr(), x.shape[0], y.data_ptr(), threads, self.level, in_bytes
        )
        if status == _NO_BYTES:
            raise ValueError(f"int8 activations are not supported with {LEVELS[self.level]}")
        if status:
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
        self.state = state
        self._keep: list[Tensor] = []
        is_bf16 = all(factor.dtype == torch.bfloat16 for pair in updates.values() for factor in pair)
        bits = 16 if is_bf16 else 32
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        # eight numbers of each update, which pst_adapter_new reads in this order
        table: list[int] = []
        for place, (left, right) in updates.items():
            rank = right.shape[0]
            assert left.shape == (place.rows, rank)
            assert right.shape == (rank, place.columns)
            down = _in_sixteens(right.to(dtype))  # (rank, columns + zeros)
            up = _in_sixteens(left.t().to(dtype))  # (rank, rows + zeros)
            self._keep += [down, up]
            table += [place.layer, LINEARS.index(place.product), down.data_ptr(), up.data_ptr()]
            table += [rank, place.columns, place.rows, place.first]
        numbers = (ctypes.c_int64 * len(table))(*table)
        self.handle = require_library().pst_adapter_new(layers, numbers, len(updates), bits, beta)
        if not self.handle:
            raise MemoryError(f"not enough memory for {len(updates)} updates")
        weakref.finalize(self, require_library().pst_adapter_free, self.handle)


def _in_sixteens(rows: Tensor) -> Tensor:
    """Return a contiguous matrix whose rows end with zeros up to a multiple of 16 numbers."""
    missing = -rows.shape[1] % 16
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.contiguous()


def _num_groups(columns: int, group: int) -> int:
    """Return the number of scales per row, for ``group`` columns each; 0 is one group."""
    if not group:
        return 1
    return -(-columns // group)  # rounded up: the last group may be narrower


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
        self._library = require_library()
        self.shape = dict(shape)
        for key in SHAPE:
            least = 0 if key in ("activation", "gated", "norm_of_heads") else 1
            _require(least <= shape[key] < 1 << 31, f"{key} = {shape[key]}: not from {least} to 2^31 - 1")
        hidden = shape["hidden"]
        heads = shape["heads"]
        shared = shape["key_value_heads"]
        head = shape["head"]
        _require(heads % shared == 0, f"key_value_heads = {shared} does not divide heads = {heads}")
        inner = shape["inner"]
        if shape["gated"]:
            inner *= 2  # rows of the gate, and of what it multiplies
        # (outputs, inputs) of each product
        self._sizes = {
            "qkv": ((heads + 2 * shared) * head, hidden),
            "output": (hidden, heads * head),
            "gate_up": (inner, hidden),
            "down": (hidden, shape["inner"]),
            "head": (shape["vocabulary"], hidden),
        }
        # queries and keys are normed head by head, or over all heads
        self._widths = {"queries": heads * head, "keys": shared * head}
        if shape["norm_of_heads"]:
            self._widths = {"queries": head, "keys": head}
        self._num_angles = 0
        sizes = (ctypes.c_int64 * len(SHAPE))(*(shape[key] for key in SHAPE))
        values = (ctypes.c_double * len(NUMBERS))(*(numbers[key] for key in NUMBERS))
        cached = math.prod(shape[key] for key in ("layers", "sequences", "context", "key_value_heads", "head"))
        if level is None:
            level = best_level()
        handle = None
        if cached <= 1 << 46:  # the number of bytes must fit into 63 bits
            handle = self._library.pst_decoder_new(sizes, values, level)
        if not handle:
            raise MemoryError(f"not enough memory for a cache of {shape['sequences']} x {shape['context']} positions")
        self.handle = handle
        self._keep: list[object] = []
        """Tensors and matrices whose values C++ has pointers to."""
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
        turned = 2 * cosines.shape[1]
        head = self.shape["head"]
        context = self.shape["context"]
        _require(turned <= head, f"rotary angles turn {turned} columns of a head of {head}")
        _require(cosines.shape == sines.shape and cosines.shape[0] >= context, f"rotary angles of {tuple(sines.shape)}")
        self._num_angles += 1
        self._library.pst_decoder_angles(
            self.handle, self._pointer(cosines), self._pointer(sines), cosines.shape[1], neighbours
        )

    def set_linear(self, layer: int, name: str, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """Set one of :data:`LINEARS` of a layer, or "head": products of one input, side by side, and their biases."""
        rows = sum(matrix.shape[0] for matrix in matrices)
        for matrix in matrices:
            size = (rows, matrix.shape[1])
            wanted = self._sizes[name]
            _require(size == wanted, f"layer {layer}, {name}: weights of {size} where the config has {wanted}")
        _require(bias is None or bias.numel() == rows, f"layer {layer}, {name}: a bias not of {rows} numbers")
        handles = (ctypes.c_void_p * len(matrices))(*(matrix.handle for matrix in matrices))
        self._keep += matrices
        which = -1  # the output layer, which belongs to no layer
        if name != "head":
            which = LINEARS.index(name)
        self._library.pst_decoder_linear(self.handle, layer, which, handles, len(matrices), self._pointer(bias))

    def set_norm(self, layer: int, name: str, norm: Norm) -> None:
        """Set one of :data:`NORMS` of a layer, or "last"."""
        width = self._widths.get(name, self.shape["hidden"])
        for part, values in (("gain", norm.gain), ("bias", norm.bias)):
            fits = values is None or values.numel() == width
            _require(fits, f"layer {layer}, norm {name}: a {part} not of {width} numbers")
        which = -1  # the norm after all layers
        if name != "last":
            which = NORMS.index(name)
        gain = self._pointer(norm.gain)
        bias = self._pointer(norm.bias)
        self._library.pst_decoder_norm(self.handle, layer, which, gain, bias, norm.epsilon)

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
        width = (hidden + 1) // 2 if bits == 4 else hidden  # two int4 codes per byte
        wanted = (rows.shape[0], width)
        _require(rows.shape == wanted, f"an embedding of {tuple(rows.shape)} where the config has {wanted}")
        groups = _num_groups(hidden, group)
        fits = scales is None or tuple(scales.shape) == (rows.shape[0], groups)
        _require(fits, f"the embedding's scales are not {rows.shape[0]} x {groups}")
        self._num_rows = rows.shape[0]
        rows = rows.detach().contiguous()
        self._keep.append(rows)
        scales_pointer = 0
        if scales is not None:
            scales = scales.contiguous()
            self._keep.append(scales)
            scales_pointer = scales.data_ptr()
        self._library.pst_decoder_embedding(self.handle, rows.data_ptr(), scales_pointer, bits, group, scale)

    def copy(self, source: int, to: int, length: int) -> None:
        """Copy the first ``length`` cached positions of the sequence ``source`` to ``to``."""
        sequences = self.shape["sequences"]
        assert 0 <= source < sequences
        assert 0 <= to < sequences
        assert 0 <= length <= self.shape["context"]
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
        shape = self.shape
        count = len(ids)
        assert count == len(sequences) == len(positions) == len(adapters) <= shape["most"]
        # C++ reads all of them as indices
        _assert_below(self._num_rows, ids)
        _assert_below(shape["sequences"], sequences)
        _assert_below(shape["context"], positions)
        _assert_below(count, wanted)
        handles = (ctypes.c_void_p * count)()  # null for tokens without an adapter
        for token, adapter in enumerate(adapters):
            if adapter is not None:
                handles[token] = adapter.handle
        logits = torch.empty(len(wanted), shape["vocabulary"])
        failed = self._library.pst_decoder_run(
            self.handle,
            _int64s(ids),
            _int64s(sequences),
            _int64s(positions),
            handles,
            count,
            _int64s(wanted),
            len(wanted),
            logits.data_ptr(),
            threads,
            in_bytes,
        )
        if failed:
            raise MemoryError(f"not enough memory for a pass of {count} tokens")
        return logits


def _assert_below(limit: int, values: Sequence[int]) -> None:
    assert all(0 <= value < limit for value in values)


def _int64s(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    """Return a C array of the values."""
    return (ctypes.c_int64 * len(values))(*values)
