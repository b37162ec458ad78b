"""Weights of a model, dense or packed, as matrices of the native loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import unpack_nibbles
from pst_ds.formats import QuantizedFormat
from pst_ds.inference.decoder.table import DecoderError, DecoderTable, Part
from pst_ds.inference.hf.stored_tables import StoredTable
from pst_ds.inference.runtime import SparseLinear
from pst_ds.inference.runtime.dense import narrowed
from pst_ds.inference.runtime.native_loop import Loop, Matrix


def matrix_of(name: str, module: Part, table: StoredTable | None = None) -> Matrix:
    """Return the matrix of a linear layer. Weights that are not quantised are dense, in bf16 if that is lossless.

    ``table``: codes of a layer that was unpacked on loading. Raises DecoderError for other kinds of layers.
    """
    if table is not None:
        return Matrix.of_codes(table_codes(table, module.in_features), table.scales, table.bits, table.group)
    if isinstance(module, SparseLinear):
        if isinstance(module.format, QuantizedFormat):
            parts, grid = module.parts(), module.format.grid
            codes = module.format.unpack_codes(parts)
            return Matrix.of_codes(codes, parts["scales"], grid.bits, grid.group or 0)
        return Matrix.of_floats(narrowed(module.dense_weight()))
    if not isinstance(module, nn.Linear):
        raise DecoderError(f"{name}: {type(module).__name__} is not a linear layer that the native loop supports")
    return Matrix.of_floats(narrowed(module.weight.detach()))


def table_codes(table: StoredTable, columns: int) -> Tensor:
    """Return the codes of a table, (rows, columns) int8."""
    return unpack_nibbles(table.codes, columns).contiguous() if table.bits == 4 else table.codes


def joined_bias(modules: Sequence[Part]) -> Tensor | None:
    """Return the concatenated biases of layers, fp32; None if none has one."""
    if all(module.bias is None for module in modules):
        return None
    of = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in modules]
    return torch.cat(of)


@dataclass(slots=True)
class Embeddings:
    """Rows of the embedding: dense, or codes with a scale per row or group."""

    weight: Tensor | None
    table: StoredTable | None
    scale: float = 1.0

    def put(self, loop: Loop) -> None:
        """Pass the rows to ``loop``, which reads them in place."""
        if self.table is not None:
            loop.set_embedding(self.table.codes, self.table.scales, self.table.bits, self.table.group, self.scale)
        else:
            assert self.weight is not None
            loop.set_embedding(self.weight, None, 8 * self.weight.element_size(), 0, self.scale)

    @property
    def num_rows(self) -> int:
        """Size of the vocabulary."""
        held = self.weight if self.table is None else self.table.codes
        assert held is not None
        return held.shape[0]


def embeddings_of(module: Part, tables: Mapping[int, StoredTable], scale: float) -> Embeddings:
    """Return the rows of an embedding module. ``tables``: codes of modules by their id()."""
    table = tables.get(id(module))
    return Embeddings(None if table is not None else narrowed(module.weight.detach()), table, scale)


@dataclass(slots=True)
class Weights:
    """A table with its matrices in memory, from which any number of loops are created. The model may be freed."""

    table: DecoderTable
    embeddings: Embeddings
    products: dict[tuple[int, str], tuple[list[Matrix], Tensor | None]]
    """Matrices side by side, and their biases, by layer and name. The output layer is (0, "head")."""

    @classmethod
    def of(cls, table: DecoderTable, embeddings: Embeddings) -> Weights:
        """Pack every linear layer of ``table``. Raises DecoderError for unsupported kinds of layers."""
        products = {}
        for index, layer in enumerate(table.layers):
            for name, modules in layer.linears.items():
                matrices = [matrix_of(f"layer {index}, {name}", module) for module in modules]
                products[index, name] = (matrices, joined_bias(modules))
        head: Part = table.head
        is_tied = isinstance(head, nn.Linear) and head.weight is table.embeddings.weight
        matrix = matrix_of("the output layer", head, embeddings.table if is_tied else None)
        products[0, "head"] = ([matrix], joined_bias([head]))
        return cls(table.without_modules(), embeddings, products)

    def loop(self, context: int, sequences: int, most: int, cache_bits: int, first: int = 0) -> Loop:
        """Return a loop with an empty cache of 32, 16 or 8 bits. Raises MemoryError.

        ``most``: most tokens per pass. ``first``: position in the model of the loop's first token.
        """
        more = {"context": context, "sequences": sequences, "most": most, "cache_bits": cache_bits}
        loop = Loop(self.table.shape | more, self.table.numbers)
        self.embeddings.put(loop)
        for cosines, sines in self.table.angles:
            loop.add_angles(cosines[first:], sines[first:])
        for (index, name), (matrices, bias) in self.products.items():
            loop.set_linear(index, name, matrices, bias)
        for index, layer in enumerate(self.table.layers):
            for name, gain in layer.norms.items():
                loop.set_norm(index, name, gain)
            loop.set_attention(index, layer.window, layer.angles)
        loop.set_norm(0, "last", self.table.last_norm)
        return loop
