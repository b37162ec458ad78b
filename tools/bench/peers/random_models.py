"""Decoders of Llama shapes with random weights, for measurements of speed: in pst-ds's decoder and as GGUF files.

No model is read or quantised. Each layer has its own memory, but all layers have the same random values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pst_ds.inference.decoder.table import DecoderTable, Embedding, LayerTable, Product, RotaryTable
from pst_ds.runtime.native_loop import ACTIVATIONS, Matrix, Norm


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    is_tied: bool
    """True if the output layer is the embedding."""
    vocabulary: int = 128_256

    def linears(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return (outputs, inputs) of a layer's linear layers by their GGUF names, by the decoder's products."""
        queries = self.heads * self.head
        shared = self.key_value_heads * self.head
        return {
            "qkv": {"attn_q": (queries, self.hidden), "attn_k": (shared, self.hidden), "attn_v": (shared, self.hidden)},
            "output": {"attn_output": (self.hidden, queries)},
            "gate_up": {"ffn_gate": (self.inner, self.hidden), "ffn_up": (self.inner, self.hidden)},
            "down": {"ffn_down": (self.hidden, self.inner)},
        }

    @property
    def position_bytes(self) -> int:
        """Bytes of the 16-bit keys and values of one position in all layers."""
        return 2 * 2 * self.layers * self.key_value_heads * self.head


SHAPES = {
    "1.2B": Shape(2048, 8192, 16, 32, 8, 64, is_tied=True),
    "3B": Shape(3072, 8192, 28, 24, 8, 128, is_tied=True),
    "8B": Shape(4096, 14336, 32, 32, 8, 128, is_tied=False),
}
"""Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B."""
ROTARY_BASE = 500_000.0
EPSILON = 1e-5


class Weights(NamedTuple):
    """Kind of a packed folder's weights."""

    bits: int
    group: int
    """Inputs that share a scale; 0 for a whole row. The defaults of `pst-ds export`."""
    pattern: str
    """"dense", "random" for half of all weights at random places, or "8:16" for 8 of each 16 inputs."""


OURS = {
    "dense int8": Weights(8, 0, "dense"),
    "dense int4": Weights(4, 64, "dense"),
    "50 % int8": Weights(8, 0, "random"),
    "50 % int4": Weights(4, 64, "random"),
    "8:16 int8": Weights(8, 0, "8:16"),
}
_BLOCK_ROWS = 512
"""Random rows of a weight, which are repeated: too many for a branch predictor to learn."""


def random_table(shape: Shape, weights: Weights, context: int) -> DecoderTable:
    """Return a decoder with quantised weights and dense int8 embeddings, as `--embeddings int8` stores them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {size for product in shape.linears().values() for size in product.values()}
    codes = {size: random_codes(*size, weights, generator) for size in sorted(sizes)}
    norm = Norm(torch.ones(shape.hidden), None, EPSILON)
    layers = []
    for _ in range(shape.layers):
        products = {}
        for name, linears in shape.linears().items():
            matrices = [_packed(codes[size], weights) for size in linears.values()]
            products[name] = Product(matrices, bias=None)
        norms = {"before_attention": norm, "before_mlp": norm}
        layers.append(LayerTable(products, norms, window=0, angles=0, activation=None, is_gated=True))
    del codes
    of_embedding = Weights(8, 0, "dense")
    rows = random_codes(shape.vocabulary, shape.hidden, of_embedding, generator)
    return DecoderTable(
        shape={
            "layers": shape.layers,
            "hidden": shape.hidden,
            "heads": shape.heads,
            "key_value_heads": shape.key_value_heads,
            "head": shape.head,
            "inner": shape.inner,
            "vocabulary": shape.vocabulary,
            "context": context,
            "activation": ACTIVATIONS.index("silu"),
            "gated": 1,
            "norm_of_heads": 1,
        },
        numbers={
            "attention_scale": shape.head**-0.5,
            "attention_cap": 0.0,
            "logits_cap": 0.0,
            "logits_scale": 1.0,
            "residual_scale": 1.0,
        },
        embedding=Embedding(rows, _scales(rows, of_embedding), bits=8, group=0, scale=1.0),
        head=Product([_packed(rows, of_embedding)], bias=None),
        last_norm=norm,
        layers=layers,
        angles=[_angles(shape, context)],
        turns_neighbours=False,
        places={},
    )


def random_codes(rows: int, columns: int, weights: Weights, generator: torch.Generator) -> Tensor:
    """Return int8 quantised values (rows, columns), 0 exactly where pruned."""
    most = (1 << (weights.bits - 1)) - 1
    block = torch.empty(min(rows, _BLOCK_ROWS), columns, dtype=torch.int8)
    block.random_(-most, most + 1, generator=generator)
    block[block == 0] = 1
    if weights.pattern == "random":
        block *= torch.empty_like(block).random_(0, 2, generator=generator)
    elif weights.pattern == "8:16":
        order = torch.rand(block.shape[0], columns // 16, 16, generator=generator).argsort(dim=2)
        block *= (order < 8).view(block.shape).to(torch.int8)
    repeats = -(-rows // block.shape[0])
    return block.repeat(repeats, 1)[:rows].contiguous()


def _scales(codes: Tensor, weights: Weights) -> Tensor:
    """Return bf16 scales with which outputs are about as large as inputs."""
    groups = codes.shape[1] // weights.group if weights.group else 1
    size = 1.0 / (codes.shape[1] ** 0.5 * (1 << (weights.bits - 2)))
    return torch.full((codes.shape[0], groups), size, dtype=torch.bfloat16)


def _packed(codes: Tensor, weights: Weights) -> Matrix:
    return Matrix.of_codes(codes, _scales(codes, weights), bits=weights.bits, group=weights.group)


def _angles(shape: Shape, context: int) -> RotaryTable:
    half = shape.head // 2
    speeds = ROTARY_BASE ** -(torch.arange(half) / half)
    angles = torch.arange(context)[:, None] * speeds
    return RotaryTable(angles.cos(), angles.sin())


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    rows: int
    """0 for a vector."""
    columns: int
    kind: str
    """Name of its ``GGMLQuantizationType``."""

    @property
    def nbytes(self) -> int:
        block = BLOCKS[self.kind]
        return max(self.rows, 1) * self.columns // block.weights * block.nbytes


class Block(NamedTuple):
    """Layout of a block of quantised weights."""

    weights: int
    nbytes: int
    scales: tuple[int, ...]
    """Byte offsets of fp16 scales."""


BLOCKS = {
    "F32": Block(1, 4, ()),
    "Q8_0": Block(32, 34, (0,)),
    "Q4_0": Block(32, 18, (0,)),
    "Q4_K": Block(256, 144, (0, 2)),
    "Q6_K": Block(256, 210, (208,)),
}
GGUF_KINDS = ("Q8_0", "Q4_0", "Q4_K_M")


def gguf_tensors(shape: Shape, kind: str) -> Iterator[GgufTensor]:
    """Yield the tensors of a file of one of :data:`GGUF_KINDS`, with the types that llama.cpp chooses."""
    plain = kind.removesuffix("_M")
    # llama.cpp quantises the output layer more finely than other tensors
    of_output = "Q8_0" if kind == "Q8_0" else "Q6_K"
    of_embedding = of_output if shape.is_tied else plain
    yield GgufTensor("token_embd.weight", shape.vocabulary, shape.hidden, of_embedding)
    for layer in range(shape.layers):
        yield GgufTensor(f"blk.{layer}.attn_norm.weight", 0, shape.hidden, "F32")
        yield GgufTensor(f"blk.{layer}.ffn_norm.weight", 0, shape.hidden, "F32")
        for linears in shape.linears().values():
            for name, (rows, columns) in linears.items():
                is_finer = kind == "Q4_K_M" and name in ("attn_v", "ffn_down") and _has_more_bits(layer, shape.layers)
                yield GgufTensor(f"blk.{layer}.{name}.weight", rows, columns, "Q6_K" if is_finer else plain)
    yield GgufTensor("output_norm.weight", 0, shape.hidden, "F32")
    if not shape.is_tied:
        yield GgufTensor("output.weight", shape.vocabulary, shape.hidden, of_output)


def _has_more_bits(layer: int, layers: int) -> bool:
    """Return llama.cpp's ``use_more_bits``: the first and last eighth of the layers, and each third between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def gguf_bytes(shape: Shape, kind: str) -> tuple[int, int]:
    """Return the bytes of all tensors, and of those that a pass reads whole."""
    total = sum(tensor.nbytes for tensor in gguf_tensors(shape, kind))
    if shape.is_tied:
        return total, total
    # a token reads one row of the embedding, which is the first tensor
    return total, total - next(gguf_tensors(shape, kind)).nbytes


def write_gguf(shape: Shape, kind: str, out: Path, context: int) -> None:
    """Write a GGUF file with random blocks, tensor by tensor. Needs the package gguf."""
    import gguf

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(ROTARY_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(shape.vocabulary)
    # only token numbers are used
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = list(gguf_tensors(shape, kind))
    for tensor in tensors:
        size = (tensor.rows, tensor.columns) if tensor.rows else (tensor.columns,)
        # with float32 as dtype, the shape is in weights and not in bytes
        writer.add_tensor_info(
            tensor.name, size, np.dtype(np.float32), tensor.nbytes, gguf.GGMLQuantizationType[tensor.kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = _random_blocks()
    for tensor in tensors:
        writer.write_tensor_data(values(tensor))
    writer.close()


def _random_blocks() -> Callable[[GgufTensor], NDArray[np.uint8]]:
    """Return a function that returns a tensor's bytes, from random blocks that it makes once per type."""
    generator = np.random.default_rng(0)
    made: dict[str, NDArray[np.uint8]] = {}

    def values(tensor: GgufTensor) -> NDArray[np.uint8]:
        if tensor.kind == "F32":
            return np.ones(tensor.columns, dtype=np.float32).view(np.uint8)
        block = BLOCKS[tensor.kind]
        if tensor.kind not in made:
            blocks = generator.integers(0, 256, (1 << 14, block.nbytes), dtype=np.uint8)
            # small enough that outputs are about as large as inputs
            for offset in block.scales:
                blocks[:, offset : offset + 2] = np.array([1e-4], dtype=np.float16).view(np.uint8)
            made[tensor.kind] = blocks.reshape(-1)
        return np.resize(made[tensor.kind], tensor.nbytes)

    return values
