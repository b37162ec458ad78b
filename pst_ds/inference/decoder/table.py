"""A decoder as a table: matrices, norms and rotary angles of each layer, from which native loops are created.

The native loop knows one kind of layer:

    x += after_attention(output(attention(qkv(before_attention(x)))))
    x += after_mlp(down(activation(gate_up(before_mlp(x)))))

qkv, output, gate_up and down are products with matrices. A layer may lack norms, and a model may scale some results;
the table says so in numbers. :mod:`pst_ds.inference.decoder.model_reader` makes it from a transformers model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pst_ds.errors import InputError
from pst_ds.nn.personal_updates import LEFT, RIGHT
from pst_ds.runtime.native_loop import Adapter, Loop, Matrix, Norm, Place

USE_OTHER = "Use transformers' own generate()"
Part = Any
"""A module of a transformers model, or its config. Its attributes depend on the model family."""
_HEAD_MULTIPLE = 16
"""Numbers to whose multiple the loop pads cached keys and values of a head."""


class DecoderError(InputError):
    """The native decoder does not support a model; the message names the unsupported part."""


class Product(NamedTuple):
    """Matrices that multiply the same input, with their results side by side: q, k and v, for example."""

    matrices: list[Matrix]
    bias: Tensor | None
    """fp32 biases of all matrices, concatenated."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(matrix.nbytes for matrix in self.matrices)


class Embedding(NamedTuple):
    """Arguments of :meth:`Loop.set_embedding`, in its order."""

    rows: Tensor
    """(vocabulary, hidden) fp32 or bf16, or quantised values as :class:`pst_ds.hf.tables.StoredTable` has them."""
    scales: Tensor | None
    """Scales of quantised rows."""
    bits: int
    group: int
    """Columns that share a scale; 0 for per-row scales."""
    scale: float
    """Factor of every row."""


class RotaryTable(NamedTuple):
    """Rotary cosines and sines of all positions: (context, half) fp32 each."""

    cosines: Tensor
    sines: Tensor


@dataclass(slots=True)
class LayerTable:
    """One layer: its products by the names of ``native_loop.LINEARS``, its norms and its attention."""

    products: dict[str, Product]
    norms: dict[str, Norm]
    """By the names of ``native_loop.NORMS``; those that the layer lacks are missing."""
    window: int
    """Positions that a token attends to; 0 for all."""
    angles: int
    """Index in :attr:`DecoderTable.angles`; -1 for attention without rotary angles."""
    activation: Tensor | None
    """Parameters of the activation; None without any."""
    is_gated: bool
    """True if the activation of one product is multiplied by another product."""


@dataclass(slots=True)
class DecoderTable:
    """A whole decoder with its weights in memory, from which any number of loops are created.

    It does not refer to the model, which may be freed.
    """

    shape: dict[str, int]
    """Sizes by the names of ``native_loop.SHAPE``, except those that differ between loops."""
    numbers: dict[str, float]
    """Factors and limits by the names of ``native_loop.NUMBERS``."""
    embedding: Embedding
    head: Product
    last_norm: Norm
    layers: list[LayerTable]
    angles: list[RotaryTable]
    turns_neighbours: bool
    """True if rotary angles turn columns (0, 1), (2, 3), ... of a head; False for (0, half), (1, half + 1), ..."""
    places: dict[str, Place]
    """Place of each linear layer in the products, by its name in the model."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read per token."""
        # without the embedding, of which a token reads one row
        total = self.head.nbytes
        for layer in self.layers:
            for product in layer.products.values():
                total += product.nbytes
        return total

    def position_bytes(self, cache_bits: int) -> int:
        """Return the bytes of the keys and values of one position in all layers."""
        # rounded up
        padded_head = -(-self.shape["head"] // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
        head_bytes = padded_head * cache_bits // 8
        if cache_bits == 8:
            head_bytes += 4  # the fp32 scale of its quantised numbers
        # a key and a value for each head of each layer
        return 2 * self.shape["layers"] * self.shape["key_value_heads"] * head_bytes

    def places_of_updates(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        """Return the places of the layers that have updates, by name, from the shapes of U and V. Raises DecoderError.

        ``shapes``: by names such as "model.layers.0.mlp.up_proj" with the part U or V appended.
        """
        places = {}
        # U and V of a layer have its name; a parameter of another kind is refused below
        layers = {parameter.rpartition(".")[0] for parameter in shapes}
        # sorted, so that a message names the same layer each time
        for name in sorted(layers):
            place = self.places.get(name)
            if place is None:
                raise DecoderError(f"the native decoder has no place for the users' updates of {name}. {USE_OTHER}")
            left = list(shapes.get(f"{name}.{LEFT}", ()))
            right = list(shapes.get(f"{name}.{RIGHT}", ()))
            rank = right[0] if right else 0
            # the C++ code trusts these shapes
            if rank == 0 or left != [place.rows, rank] or right != [rank, place.columns]:
                raise DecoderError(
                    f"the native decoder has another shape than the users' updates of {name}. {USE_OTHER}"
                )
            places[name] = place
        return places

    def adapter(self, state: Mapping[str, Tensor], beta: float) -> Adapter:
        """Return a user's state for loops of this table. Raises DecoderError if it does not fit."""
        places = self.places_of_updates({name: values.shape for name, values in state.items()})
        updates = {}
        for name, place in places.items():
            updates[place] = (state[f"{name}.{LEFT}"], state[f"{name}.{RIGHT}"])
        return Adapter(layers=len(self.layers), beta=beta, updates=updates, state=state)

    def loop(self, context: int, sequences: int, most: int, cache_bits: int, first: int = 0) -> Loop:
        """Return a loop with an empty cache of 32, 16 or 8 bits. Raises MemoryError.

        ``most``: most tokens per pass. ``first``: position in the model of the loop's first token.
        """
        sizes = {"context": context, "sequences": sequences, "most": most, "cache_bits": cache_bits}
        loop = Loop(self.shape | sizes, self.numbers)
        loop.set_embedding(*self.embedding)
        # before the layers, whose attention names its angles by index
        for cosines, sines in self.angles:
            loop.add_angles(cosines[first:], sines[first:], neighbours=self.turns_neighbours)
        for index, layer in enumerate(self.layers):
            for name, product in layer.products.items():
                loop.set_linear(layer=index, name=name, matrices=product.matrices, bias=product.bias)
            for name, norm in layer.norms.items():
                loop.set_norm(index, name, norm)
            if layer.activation is not None:
                loop.set_activation(index, layer.activation)
            loop.set_attention(index, layer.window, layer.angles)
        # neither belongs to a layer, and the number 0 is not used
        loop.set_linear(layer=0, name="head", matrices=self.head.matrices, bias=self.head.bias)
        loop.set_norm(0, "last", self.last_norm)
        return loop
