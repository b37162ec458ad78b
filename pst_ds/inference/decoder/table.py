"""Description of a transformers model's decoder as a table, read from its modules instead of its name.

Supports every model whose layers are attention and an MLP with residuals, under the names that transformers gives these
parts: Llama, Mistral, Ministral 3, Qwen2 and 3, SmolLM3, Phi-3, Gemma 1 to 3, Granite and OLMo 2 are tested.
:meth:`Decoder.from_model` compares logits to find what a table cannot express.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import unpack_nibbles
from pst_ds.errors import InputError
from pst_ds.formats import QuantizedFormat
from pst_ds.inference.hf.tables import StoredTable
from pst_ds.inference.runtime import SparseLinear
from pst_ds.inference.runtime.native_loop import ACTIVATIONS, Adapter, Loop, Matrix, Place, narrowed
from pst_ds.nn.personal_updates import LEFT, RIGHT

_NORMS = {
    "input_layernorm": "before_attention",
    "post_attention_layernorm": "before_mlp",
    "pre_feedforward_layernorm": "before_mlp",
    "post_feedforward_layernorm": "after_mlp",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "tanh": "tanh",
}
_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rotary parameters by rope_type. Each only affects the angles, which the model's module computes for the table."""
_ROPE_PARAMETERS_OF_ALL = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings"),
    *("original_max_position_embeddings", "mrope_section", "mrope_interleaved"),
}
"""mrope is for images: the three positions of a text token are equal."""
_CHANGES_BEYOND_ORIGINAL = {
    "long_factor": "longrope uses other angles",
    "llama_4_scaling_beta": "attention scales queries by position",
}
"""Rotary parameters without effect up to original_max_position_embeddings, and their effect in longer sequences."""
_USE_OTHER = "Use transformers' own generate()"
Part = Any
"""A module of a transformers model, or its config. Its attributes depend on the model family."""
Product = tuple[list[Matrix], Tensor | None]
"""Matrices side by side, and their concatenated fp32 biases."""


class DecoderError(InputError):
    """The native loop does not support a model; the message names the unsupported part."""


@dataclass(slots=True)
class LayerTable:
    """One layer: its products by the names of ``native_loop.LINEARS``, its norms and its attention."""

    products: dict[str, Product]
    norms: dict[str, Tensor]
    window: int
    angles: int


@dataclass(slots=True)
class DecoderTable:
    """A whole decoder with its weights in memory, from which any number of loops are created.

    It does not refer to the model, which may be freed.
    """

    shape: dict[str, int]
    numbers: dict[str, float]
    embedding: tuple[Tensor, Tensor | None, int, int, float]
    """Arguments of :meth:`Loop.set_embedding`."""
    head: Product
    last_norm: Tensor
    layers: list[LayerTable]
    angles: list[tuple[Tensor, Tensor]]
    """Rotary cosines and sines, (context, half) each."""
    places: dict[str, Place]
    """Place of each linear layer in the products, by its name in the model."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read per token."""
        products = [self.head, *(product for layer in self.layers for product in layer.products.values())]
        return sum(matrix.nbytes for matrices, _ in products for matrix in matrices)

    def position_bytes(self, cache_bits: int) -> int:
        """Return the bytes of the keys and values of one position, whose heads are padded to 16 numbers."""
        of_head = -(-self.shape["head"] // 16) * 16 * cache_bits // 8 + 4 * (cache_bits == 8)
        return 2 * self.shape["layers"] * self.shape["key_value_heads"] * of_head

    def updated(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        """Return the places of the layers that have updates, from the shapes of U and V. Raises DecoderError."""
        found = {}
        for name in sorted({name.rpartition(".")[0] for name in shapes}):
            place, (left, right) = self.places.get(name), (shapes[f"{name}.{part}"] for part in (LEFT, RIGHT))
            if place is None or [*left, *right] != [place.rows, right[0], right[0], place.columns]:
                fact = "has no place for" if place is None else "has another shape than"
                raise DecoderError(f"the native loop {fact} the users' updates of {name}. {_USE_OTHER}")
            found[name] = place
        return found

    def adapter(self, state: Mapping[str, Tensor], beta: float) -> Adapter:
        """Return a user's state for loops of this table. Raises DecoderError if it does not fit."""
        places = self.updated({name: values.shape for name, values in state.items()})
        updates = {place: (state[f"{name}.{LEFT}"], state[f"{name}.{RIGHT}"]) for name, place in places.items()}
        return Adapter(len(self.layers), beta, updates, state)

    def loop(self, context: int, sequences: int, most: int, cache_bits: int, first: int = 0) -> Loop:
        """Return a loop with an empty cache of 32, 16 or 8 bits. Raises MemoryError.

        ``most``: most tokens per pass. ``first``: position in the model of the loop's first token.
        """
        more = {"context": context, "sequences": sequences, "most": most, "cache_bits": cache_bits}
        loop = Loop(self.shape | more, self.numbers)
        loop.set_embedding(*self.embedding)
        for cosines, sines in self.angles:
            loop.add_angles(cosines[first:], sines[first:])
        for index, layer in enumerate(self.layers):
            for name, product in layer.products.items():
                loop.set_linear(index, name, *product)
            for name, gain in layer.norms.items():
                loop.set_norm(index, name, gain)
            loop.set_attention(index, layer.window, layer.angles)
        loop.set_linear(0, "head", *self.head)
        loop.set_norm(0, "last", self.last_norm)
        return loop


def table_of(model: Part, context: int, tables: Mapping[str, StoredTable] | None = None) -> DecoderTable:
    """Return the table of a transformers causal language model, with rotary angles for ``context`` positions.

    ``tables``: quantised embeddings, by name in the model. Raises DecoderError for unsupported features.
    """
    config, body, kind = model.config.get_text_config(), model.get_decoder(), type(model).__name__
    _require_known_rope(kind, config, context)
    layers = _layers_of(kind, body)
    reader = _Reader(kind, config, body, context, {module: name for name, module in model.named_modules()})
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or ""
    if name not in _ACTIVATIONS:
        raise DecoderError(f"{kind}: no native activation {name!r}; there are {', '.join(_ACTIVATIONS)}")
    found = [reader.layer(layer, index) for index, layer in enumerate(layers)]
    attention, mlp = layers[0].self_attn, layers[0].mlp
    embedding, head, heads = model.get_input_embeddings(), model.get_output_embeddings(), config.num_attention_heads
    by_id = {id(model.get_submodule(name)): table for name, table in (tables or {}).items()}
    table = by_id.get(id(embedding))
    tied = table if isinstance(head, nn.Linear) and head.weight is embedding.weight else None
    queries = found[0].norms.get("queries")
    shape = {
        "layers": len(layers),
        "hidden": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head": int(attention.head_dim),
        "inner": int(mlp.down_proj.in_features),
        "vocabulary": int(head.out_features),
        "context": context,
        "gated": int(hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")),
        "norm_of_heads": int(queries is None or queries.numel() == attention.head_dim),
        "activation": ACTIVATIONS.index(_ACTIVATIONS[name]),
    }
    numbers = {
        "epsilon": reader.epsilon,
        "attention_scale": float(attention.scaling),
        "attention_cap": float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        "logits_cap": float(getattr(config, "final_logit_softcapping", None) or 0.0),
        "logits_scale": 1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
        "residual_scale": float(getattr(config, "residual_multiplier", None) or 1.0),
    }
    return DecoderTable(
        shape,
        numbers,
        _rows_of(embedding, table, float(getattr(config, "embedding_multiplier", 1.0))),
        _product("the output layer", [head], tied),
        reader.gain(body.norm),
        found,
        reader.tables,
        reader.places,
    )


def _rows_of(
    embedding: Part, table: StoredTable | None, factor: float
) -> tuple[Tensor, Tensor | None, int, int, float]:
    """Return the rows of the embedding, dense or quantised. The module or the model multiplies them by a factor."""
    scale = float(getattr(embedding, "embed_scale", 1.0)) * factor
    if table is not None:
        return table.codes, table.scales, table.bits, table.group, scale
    weight = narrowed(embedding.weight.detach())
    return weight, None, 8 * weight.element_size(), 0, scale


def _product(name: str, modules: Sequence[Part], table: StoredTable | None = None) -> Product:
    """Return linear layers that share their input as one product. ``table``: stored form of an only layer."""
    matrices = [_matrix_of(name, module, table) for module in modules]
    if all(module.bias is None for module in modules):
        return matrices, None
    biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in modules]
    return matrices, torch.cat(biases)


def _matrix_of(name: str, module: Part, table: StoredTable | None) -> Matrix:
    """Return the matrix of a linear layer. Weights that are not quantised are dense, in bf16 if that is lossless."""
    if table is not None:
        codes = unpack_nibbles(table.codes, module.in_features).contiguous() if table.bits == 4 else table.codes
        return Matrix.of_codes(codes, table.scales, table.bits, table.group)
    if isinstance(module, SparseLinear):
        if isinstance(module.format, QuantizedFormat):
            parts, grid = module.parts(), module.format.grid
            return Matrix.of_codes(module.format.unpack_codes(parts), parts["scales"], grid.bits, grid.group or 0)
        return Matrix.of_floats(narrowed(module.dense_weight()))
    if not isinstance(module, nn.Linear):
        raise DecoderError(f"{name}: {type(module).__name__} is not a linear layer that the native loop supports")
    return Matrix.of_floats(narrowed(module.weight.detach()))


def _layers_of(kind: str, body: Part) -> Part:
    """Return the list of layers of ``body``. Raises DecoderError without layers or a norm."""
    layers = getattr(body, "layers", None)
    has_layers = isinstance(layers, nn.ModuleList) and len(layers) > 0
    missing = "'norm'" if has_layers else "list 'layers'"
    if not has_layers or not hasattr(body, "norm"):
        raise DecoderError(f"{kind}: {type(body).__name__} has no {missing}, which the native loop reads. {_USE_OTHER}")
    return layers


def _require_known_rope(name: str, config: Part, context: int) -> None:
    """Raise DecoderError for rotary parameters that affect more than the angles of positions up to ``context``."""
    found = getattr(config, "rope_parameters", None) or {}
    for parameters in [value for value in found.values() if isinstance(value, dict)] or [found]:
        kind = parameters.get("rope_type", "default")
        known = {*_ROPE_PARAMETERS_OF_ALL, *_CHANGES_BEYOND_ORIGINAL, *_ROPE_PARAMETERS.get(kind, ())}
        if kind not in _ROPE_PARAMETERS:
            known.discard("rope_type")
        for key, value in {"rope_type": kind, **parameters}.items():
            if value is not None and key not in known:
                raise DecoderError(
                    f"{name}: {key} = {value!r} in rope_parameters: the native loop does not compute it. {_USE_OTHER}"
                )
        original = parameters.get("original_max_position_embeddings") or 0
        for key, change in _CHANGES_BEYOND_ORIGINAL.items():
            if parameters.get(key) is not None and context > original:
                raise DecoderError(
                    f"{name}: context = {context}: {change} in sequences beyond the original {original} positions "
                    f"({key}), and the native loop does not. Lower context to {original}, or use "
                    "transformers' own generate()"
                )


class _Reader:
    """Reads the layers of one model. Rotary tables that several layers share are stored once."""

    def __init__(self, name: str, config: Part, body: Part, context: int, names: Mapping[nn.Module, str]):
        self.name, self.config, self.body, self.context, self._names = name, config, body, context, names
        self.places: dict[str, Place] = {}
        self.tables: list[tuple[Tensor, Tensor]] = []
        self._table_of_type: dict[str | None, int] = {}
        self.epsilon = self._epsilon(body.norm)

    def layer(self, layer: Part, index: int) -> LayerTable:
        where = f"{self.name}: layer {index}"
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            raise DecoderError(f"{where} has no self_attn and mlp")
        linears = {
            "qkv": self._first_of(where, attention, ["qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
            "output": self._first_of(where, attention, ["o_proj"], ["dense"]),
            "gate_up": self._first_of(where, mlp, ["gate_up_proj"], ["gate_proj", "up_proj"], ["up_proj"]),
            "down": self._first_of(where, mlp, ["down_proj"]),
        }
        is_sandwich = hasattr(layer, "post_feedforward_layernorm")
        places = _NORMS | ({"post_attention_layernorm": "after_attention"} if is_sandwich else {})
        norms = {place: getattr(layer, name) for name, place in places.items() if hasattr(layer, name)}
        norms |= {"queries": getattr(attention, "q_norm", None), "keys": getattr(attention, "k_norm", None)}
        norms = {place: norm for place, norm in norms.items() if norm is not None}
        known = [*norms.values(), *(module for modules in linears.values() for module in modules)]
        held = {id(module) for top in known for module in top.modules()}
        for name, module in layer.named_modules():
            if id(module) not in held and next(module.parameters(recurse=False), None) is not None:
                raise DecoderError(f"{where}: {name} ({type(module).__name__}) is not supported")
        products = {name: _product(f"layer {index}, {name}", modules) for name, modules in linears.items()}
        for name, (matrices, _) in products.items():
            firsts = accumulate((matrix.shape[0] for matrix in matrices), initial=0)
            for module, matrix, first in zip(linears[name], matrices, firsts, strict=False):
                self.places[self._names[module]] = Place(index, name, first, *matrix.shape)
        gains = {place: self.gain(norm) for place, norm in norms.items()}
        return LayerTable(products, gains, self._window(attention, index), self._angles(attention, index))

    def _first_of(self, where: str, parent: Part, *choices: list[str]) -> list[nn.Module]:
        for names in choices:
            if all(hasattr(parent, name) for name in names):
                return [getattr(parent, name) for name in names]
        raise DecoderError(f"{where}: {type(parent).__name__} has no {' or '.join(map('/'.join, choices))}")

    def gain(self, norm: Part) -> Tensor:
        """Return the factor of a root-mean-square norm, measured from its output. Raises DecoderError."""
        weight = getattr(norm, "weight", None)
        if weight is None or weight.dim() != 1:
            raise DecoderError(f"{self.name}: {type(norm).__name__} is not a norm with a gain")
        epsilon = self._epsilon(norm)
        x = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype)
        with torch.no_grad():
            gain = norm(torch.ones_like(x)).float() * (1 + epsilon) ** 0.5
            expected = gain * (x.float() * (x.float().square().mean() + epsilon).rsqrt())
            if not torch.allclose(norm(x).float(), expected, rtol=2e-2, atol=1e-3):
                raise DecoderError(f"{self.name}: {type(norm).__name__} is not a root-mean-square norm")
        return gain

    def _epsilon(self, norm: Part) -> float:
        found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if found is None:
            raise DecoderError(f"{self.name}: {type(norm).__name__} has no epsilon")
        return float(found)

    def _type(self, index: int) -> str | None:
        types = getattr(self.config, "layer_types", None)
        return str(types[index]) if types else None

    def _window(self, attention: Part, index: int) -> int:
        found = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window") and self._type(index) in (None, "sliding_attention"):
            found = getattr(self.config, "sliding_window", None)
        return int(found or 0)

    def _angles(self, attention: Part, index: int) -> int:
        uses = getattr(attention, "use_rope", 1)
        rotary = getattr(self.body, "rotary_emb", None)
        if rotary is None or not int(uses):
            return -1
        kind = self._type(index) if hasattr(rotary, "layer_types") else None
        if kind not in self._table_of_type:
            x, positions = torch.zeros(1, 1, 1), torch.arange(self.context)[None]
            with torch.no_grad():
                cosines, sines = rotary(x, positions, kind) if kind else rotary(x, positions)
            half = cosines.shape[-1] // 2
            if not torch.equal(cosines[0, :, :half], cosines[0, :, half:]):
                raise DecoderError(f"{self.name}: {type(rotary).__name__} turns neighbours, not halves, of a head")
            self.tables.append((cosines[0, :, :half].float(), sines[0, :, :half].float()))
            self._table_of_type[kind] = len(self.tables) - 1
        return self._table_of_type[kind]
