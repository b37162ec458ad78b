"""Description of a transformers model's decoder as a table, read from its modules instead of its name.

Supports every model whose layers are attention and an MLP with residuals, under the names that transformers gives these
parts. docs/how-to/inference.md lists families that are tested. What a part computes is measured where possible: norms,
rotary angles and their pairs of columns. A refusal names everything that the table cannot express;
:meth:`Decoder.from_model` compares logits to find what was not noticed.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import XIELUActivation

from pst_ds.core.quantization import unpack_nibbles
from pst_ds.errors import InputError
from pst_ds.formats import QuantizedFormat
from pst_ds.hf.tables import StoredTable
from pst_ds.nn.personal_updates import LEFT, RIGHT
from pst_ds.runtime import SparseLinear
from pst_ds.runtime.native_loop import ACTIVATIONS, Adapter, Loop, Matrix, Norm, Place, narrowed

_NORMS = {
    "input_layernorm": "before_attention",
    "attention_layernorm": "before_attention",
    "post_self_attn_layernorm": "after_attention",
    "post_norm1": "after_attention",
    "post_attention_layernorm": "before_mlp",
    "pre_feedforward_layernorm": "before_mlp",
    "feedforward_layernorm": "before_mlp",
    "pre_mlp_layernorm": "before_mlp",
    "post_feedforward_layernorm": "after_mlp",
    "post_mlp_layernorm": "after_mlp",
    "post_norm2": "after_mlp",
}
"""Places of a layer's norms, by their names."""
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm")
"""Norms next to which post_attention_layernorm is the norm of the attention's result, not of the MLP's input."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "tanh": "tanh",
    "relu2": "relu2",
    "xielu": "xielu",
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
USE_OTHER = "Use transformers' own generate()"
Part = Any
"""A module of a transformers model, or its config. Its attributes depend on the model family."""
Product = tuple[list[Matrix], Tensor | None]
"""Matrices side by side, and their concatenated fp32 biases."""


class DecoderError(InputError):
    """The native decoder does not support a model; the message names the unsupported part."""


@dataclass(slots=True)
class LayerTable:
    """One layer: its products by the names of ``native_loop.LINEARS``, its norms and its attention."""

    products: dict[str, Product]
    norms: dict[str, Norm]
    window: int
    angles: int
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
    numbers: dict[str, float]
    embedding: tuple[Tensor, Tensor | None, int, int, float]
    """Arguments of :meth:`Loop.set_embedding`."""
    head: Product
    last_norm: Norm
    layers: list[LayerTable]
    angles: list[tuple[Tensor, Tensor]]
    """Rotary cosines and sines, (context, half) each."""
    turns_neighbours: bool
    """True if rotary angles turn columns (0, 1), (2, 3), ... of a head; False for (0, half), (1, half + 1), ..."""
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
            place = self.places.get(name)
            left, right = (list(shapes.get(f"{name}.{part}", ())) for part in (LEFT, RIGHT))
            rank = right[0] if right else 0
            if place is None or not rank or [*left, *right] != [place.rows, rank, rank, place.columns]:
                fact = "has no place for" if place is None else "has another shape than"
                raise DecoderError(f"the native decoder {fact} the users' updates of {name}. {USE_OTHER}")
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
            loop.add_angles(cosines[first:], sines[first:], neighbours=self.turns_neighbours)
        for index, layer in enumerate(self.layers):
            for name, product in layer.products.items():
                loop.set_linear(index, name, *product)
            for name, norm in layer.norms.items():
                loop.set_norm(index, name, norm)
            if layer.activation is not None:
                loop.set_activation(index, layer.activation)
            loop.set_attention(index, layer.window, layer.angles)
        loop.set_linear(0, "head", *self.head)
        loop.set_norm(0, "last", self.last_norm)
        return loop


def table_of(model: Part, context: int, tables: Mapping[str, StoredTable] | None = None) -> DecoderTable:
    """Return the table of a transformers causal language model, with rotary angles for ``context`` positions.

    ``tables``: quantised embeddings, by name in the model. Raises DecoderError for unsupported features.
    """
    config, body = model.config.get_text_config(), model.get_decoder()
    problems = dict.fromkeys(_unknown_rope(config))  # in order, each once
    layers = _layers_of(body)
    if layers is None:
        problems[f"{type(body).__name__} has no list 'layers'"] = None
    if not hasattr(body, "norm"):
        problems[f"{type(body).__name__} has no 'norm' after its layers"] = None
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or ""
    if layers is not None and activation not in _ACTIVATIONS:
        problems[f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}"] = None
    if getattr(config, "clip_qkv", None) is not None:
        problems[f"clip_qkv = {config.clip_qkv} limits queries, keys and values"] = None
    names = {module: name for name, module in model.named_modules()}
    reader = _Reader(config, body, context, names, problems)
    read = [reader.layer(layer, index) for index, layer in enumerate(layers or ())]
    last_norm = reader.norm(body.norm, config.hidden_size) if hasattr(body, "norm") else None
    if problems:
        raise DecoderError(
            f"model_type = {config.model_type!r}: the native decoder cannot compute {type(model).__name__}: "
            f"{'; '.join(problems)}. {USE_OTHER}"
        )
    _require_original_positions(config, context)
    assert last_norm is not None
    found = [layer for layer in read if layer is not None]
    attention = layers[0].self_attn  # type: ignore[index]
    head_size = reader.head_size(attention)
    embedding, head, heads = model.get_input_embeddings(), model.get_output_embeddings(), config.num_attention_heads
    by_id = {id(model.get_submodule(name)): table for name, table in (tables or {}).items()}
    table = by_id.get(id(embedding))
    tied = table if isinstance(head, nn.Linear) and head.weight is embedding.weight else None
    queries = found[0].norms.get("queries")
    shape = {
        "layers": len(found),
        "hidden": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head": head_size,
        "inner": found[0].products["down"][0][0].shape[1],
        "vocabulary": int(head.out_features),
        "context": context,
        "gated": int(found[0].is_gated),
        "norm_of_heads": int(queries is None or queries.gain.numel() == head_size),
        "activation": ACTIVATIONS.index(_ACTIVATIONS[activation]),
    }
    numbers = {
        "attention_scale": float(getattr(attention, "scaling", head_size**-0.5)),
        "attention_cap": float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        "logits_cap": float(getattr(config, "final_logit_softcapping", None) or 0.0),
        "logits_scale": _logits_scale(model, head, config),
        "residual_scale": float(getattr(config, "residual_multiplier", None) or 1.0),
    }
    return DecoderTable(
        shape=shape,
        numbers=numbers,
        embedding=_rows_of(embedding, table, float(getattr(config, "embedding_multiplier", 1.0))),
        head=_product("the output layer", [head], tied),
        last_norm=last_norm,
        layers=found,
        angles=reader.tables,
        turns_neighbours=reader.turns_neighbours,
        places=reader.places,
    )


@torch.no_grad()
def _logits_scale(model: Part, head: Part, config: Part) -> float:
    """Return the factor of the output layer's result, measured: some models multiply by logits_scaling, some divide."""
    setting = float(getattr(config, "logits_scaling", None) or 1.0)
    if setting == 1.0:
        return 1.0
    raw: list[Tensor] = []
    hook = head.register_forward_hook(lambda _module, _args, out: raw.append(out))
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    finally:
        hook.remove()
    multiplied, divided = (float((logits - factor * raw[0]).norm()) for factor in (setting, 1.0 / setting))
    return setting if multiplied < divided else 1.0 / setting


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
        raise DecoderError(f"{name}: {type(module).__name__} is not a linear layer that the native decoder supports")
    return Matrix.of_floats(narrowed(module.weight.detach()))


def _layers_of(body: Part) -> Part | None:
    """Return the list of layers of ``body``; None without one."""
    layers = getattr(body, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) and len(layers) > 0 else None


def _rope_settings(config: Part) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config, which may differ by kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [value for value in found.values() if isinstance(value, dict)] or [found]


def _unknown_rope(config: Part) -> list[str]:
    """Return the rotary parameters that may affect more than the angles, as facts for a message."""
    unknown = []
    for parameters in _rope_settings(config):
        kind = parameters.get("rope_type", "default")
        known = {*_ROPE_PARAMETERS_OF_ALL, *_CHANGES_BEYOND_ORIGINAL, *_ROPE_PARAMETERS.get(kind, ())}
        if kind not in _ROPE_PARAMETERS:
            known.discard("rope_type")
        for key, value in {"rope_type": kind, **parameters}.items():
            if value is not None and key not in known:
                unknown.append(f"{key} = {value!r} in rope_parameters is not known")
    return unknown


def _require_original_positions(config: Part, context: int) -> None:
    """Raise DecoderError if rotary parameters affect more than the angles beyond the original positions."""
    for parameters in _rope_settings(config):
        original = parameters.get("original_max_position_embeddings") or 0
        for key, change in _CHANGES_BEYOND_ORIGINAL.items():
            if parameters.get(key) is not None and context > original:
                raise DecoderError(
                    f"context = {context}: {change} in sequences beyond the original {original} positions ({key}), and "
                    f"the native decoder does not. Lower context to {original}, or use transformers' own generate()"
                )


class _Reader:
    """Reads the layers of one model and collects, in ``problems``, what a table cannot express.

    Rotary tables that several layers share are stored once.
    """

    def __init__(
        self, config: Part, body: Part, context: int, names: Mapping[nn.Module, str], problems: dict[str, None]
    ):
        self.config, self.body, self.context = config, body, context
        self._names, self._problems = names, problems
        self.places: dict[str, Place] = {}
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.turns_neighbours = False
        self._table_of_type: dict[str | None, int] = {}

    def layer(self, layer: Part, index: int) -> LayerTable | None:
        """Return the table of a layer; None, with problems noted, if there is no such table."""
        before = len(self._problems)
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            self._note(f"{type(layer).__name__} has no self_attn and mlp")
            return None
        linears = {
            "qkv": self._first_of(attention, ["qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
            "output": self._first_of(attention, ["o_proj"], ["dense"]),
            "gate_up": self._first_of(mlp, ["gate_up_proj"], ["gate_proj", "up_proj"], ["up_proj"], ["c_fc"]),
            "down": self._first_of(mlp, ["down_proj"], ["c_proj"]),
        }
        norms = self._norms_of(layer, attention)
        activation = getattr(mlp, "act_fn", None)
        self._note_others(layer, [*norms.values(), *(m for modules in linears.values() for m in modules), activation])
        has_norms = {"before_mlp", "after_attention", "after_mlp"} & set(norms)
        if not has_norms:
            self._note(f"{type(layer).__name__} has no norm between its attention and its MLP, which are in parallel")
        head = self.head_size(attention)
        widths = {name: self._width_of(norm, head) for name, norm in norms.items() if name in ("queries", "keys")}
        norm_tables = {name: self.norm(norm, widths.get(name, self.config.hidden_size)) for name, norm in norms.items()}
        angles = self._angles(attention, index)
        if len(self._problems) > before or any(table is None for table in norm_tables.values()):
            return None
        products = {name: _product(f"layer {index}, {name}", modules) for name, modules in linears.items()}
        for name, (matrices, _) in products.items():
            firsts = accumulate((matrix.shape[0] for matrix in matrices), initial=0)
            for module, matrix, first in zip(linears[name], matrices, firsts, strict=False):
                self.places[self._names[module]] = Place(index, name, first, *matrix.shape)
        return LayerTable(
            products=products,
            norms={name: table for name, table in norm_tables.items() if table is not None},
            window=self._window(attention, index),
            angles=angles,
            activation=_parameters_of(activation),
            is_gated=hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
        )

    def head_size(self, attention: Part) -> int:
        config = self.config
        size = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        return int(size or config.hidden_size // config.num_attention_heads)

    def _note(self, problem: str) -> None:
        self._problems[problem] = None

    def _norms_of(self, layer: Part, attention: Part) -> dict[str, nn.Module]:
        """Return the norms of a layer by their places, one of ``native_loop.NORMS``."""
        is_sandwich = any(hasattr(layer, name) for name in _SANDWICH)
        places = _NORMS | ({"post_attention_layernorm": "after_attention"} if is_sandwich else {})
        norms = {place: getattr(layer, name, None) for name, place in places.items() if hasattr(layer, name)}
        norms |= {"queries": getattr(attention, "q_norm", None), "keys": getattr(attention, "k_norm", None)}
        return {place: norm for place, norm in norms.items() if norm is not None and not isinstance(norm, nn.Identity)}

    def _note_others(self, layer: Part, known: Sequence[nn.Module | None]) -> None:
        """Note the modules of a layer that have parameters and are not, or not in, a known one."""
        held = {id(module) for top in known if top is not None for module in top.modules()}
        others = [
            name or "the parameters of the layer itself"
            for name, module in layer.named_modules()
            if id(module) not in held and next(module.parameters(recurse=False), None) is not None
        ]
        if others:
            self._note(f"{type(layer).__name__} has {', '.join(others)}")

    def _first_of(self, parent: Part, *choices: list[str]) -> list[nn.Module]:
        for names in choices:
            if all(hasattr(parent, name) for name in names):
                return [getattr(parent, name) for name in names]
        self._note(f"{type(parent).__name__} has no {' or '.join(map('/'.join, choices))}")
        return []

    def _width_of(self, norm: Part, default: int) -> int:
        weight = next(norm.parameters(recurse=False), None)
        return default if weight is None else weight.numel()

    @torch.no_grad()
    def norm(self, norm: Part, width: int) -> Norm | None:
        """Return a root-mean-square or layer norm of ``width`` numbers, measured from its outputs.

        Notes a problem and returns None for another one.
        """
        weights = list(norm.parameters(recurse=False))
        if any(tuple(weight.shape) != (width,) for weight in weights):
            self._note(f"{type(norm).__name__} has weights of another shape than ({width},)")
            return None
        dtype = weights[0].dtype if weights else torch.float32
        x, ones = torch.linspace(-1.0, 2.0, width, dtype=dtype), torch.ones(width, dtype=dtype)
        bias = norm(torch.zeros_like(x)).float()
        # a layer norm maps a constant to its bias
        is_centred = bool((norm(ones).float() - bias).abs().max() <= 1e-3 * (norm(x).float() - bias).abs().max())
        signs = ones.clone()
        signs[1::2] = -1.0

        def normalised(values: Tensor, epsilon: float) -> Tensor:
            values = values.float()
            values = values - values.mean() if is_centred else values
            return values * (values.square().mean() + epsilon).rsqrt()

        epsilon = self._epsilon(norm, signs, bias)
        gain = (norm(signs).float() - bias) / normalised(signs, epsilon)
        expected = normalised(x, epsilon) * gain + bias
        is_known = is_centred or not bool(bias.any())
        if not is_known or not torch.allclose(norm(x).float(), expected, rtol=2e-2, atol=1e-3):
            self._note(f"{type(norm).__name__} is neither a root-mean-square norm nor a layer norm")
            return None
        return Norm(gain, bias if is_centred else None, epsilon)

    def _epsilon(self, norm: Part, x: Tensor, bias: Tensor) -> float:
        """Return the epsilon of a norm, or measure it where it has no attribute: how much it shrinks a small ``x``."""
        for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
            if isinstance(getattr(norm, name, None), float):
                return float(getattr(norm, name))
        share = 1e-3
        variance = float((x.float() - x.float().mean()).square().mean())
        large, small = (float((norm(factor * x).float() - bias).norm()) for factor in (1.0, share))
        ratio = (small / large) ** 2
        epsilon = share**2 * variance * (1 - ratio) / (ratio - share**2)
        return float(f"{max(epsilon, 1e-12):.2g}")

    def _type(self, index: int) -> str | None:
        types = getattr(self.config, "layer_types", None)
        return str(types[index]) if types else None

    def _window(self, attention: Part, index: int) -> int:
        found = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window") and self._type(index) in (None, "sliding_attention"):
            found = getattr(self.config, "sliding_window", None)
        if not getattr(attention, "is_sliding", True):
            found = None
        return int(found or 0)

    def _angles(self, attention: Part, index: int) -> int:
        uses = getattr(attention, "use_rope", 1)
        if getattr(attention, "sliding_window", None) and not getattr(attention, "is_sliding", True):
            uses = 0  # full attention between layers with windows has no angles (EXAONE 4)
        rotary = getattr(self.body, "rotary_emb", None)
        if rotary is None or not int(uses):
            return -1
        kind = self._type(index) if hasattr(rotary, "layer_types") else None
        if kind not in self._table_of_type:
            x, positions = torch.zeros(1, 1, 1), torch.arange(self.context)[None]
            with torch.no_grad():
                cosines, sines = (
                    part[0].float() for part in (rotary(x, positions, kind) if kind else rotary(x, positions))
                )
            half = cosines.shape[-1] // 2
            if torch.equal(cosines[:, :half], cosines[:, half:]):
                each = slice(0, half)
            elif torch.equal(cosines[:, ::2], cosines[:, 1::2]):
                each = slice(0, None, 2)
            else:
                self._note(f"{type(rotary).__name__} gives no pair of columns the same angle")
                return -1
            self.turns_neighbours = _turns_neighbours(attention)
            self.tables.append((cosines[:, each].contiguous(), sines[:, each].contiguous()))
            self._table_of_type[kind] = len(self.tables) - 1
        return self._table_of_type[kind]


def _turns_neighbours(attention: Part) -> bool:
    """Return whether rotary angles turn neighbouring columns, measured with the function of the model's own code."""
    rotate_half = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    if rotate_half is None:
        return False
    return bool(rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0])


@torch.no_grad()
def _parameters_of(activation: Part) -> Tensor | None:
    """Return the parameters of an activation for :meth:`Loop.set_activation`; None without any."""
    if not isinstance(activation, XIELUActivation):
        return None
    beta = activation.beta.float()
    of_positive = torch.nn.functional.softplus(activation.alpha_p.float())
    of_negative = beta + torch.nn.functional.softplus(activation.alpha_n.float())
    return torch.stack([values.reshape(()) for values in (of_positive, of_negative, beta, activation.eps.float())])
