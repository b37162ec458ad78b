"""Description of a transformers model's decoder as a table, read from its modules instead of its name.

Supports every model whose layers are attention and an MLP with residuals, under the names that transformers gives these
parts: Llama, Mistral, Ministral 3, Qwen2 and 3, SmolLM3, Phi-3, Gemma 1 to 3, Granite and OLMo 2 are tested.
:meth:`Decoder.from_model` compares logits to find what a table cannot express.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError

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
_ROPE_PARAMETERS_OF_ALL = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "mrope_section",
    "mrope_interleaved",
)
"""mrope is for images: the three positions of a text token are equal."""
_CHANGES_BEYOND_ORIGINAL = {
    "long_factor": "longrope uses other angles",
    "llama_4_scaling_beta": "attention scales queries by position",
}
"""Rotary parameters without effect up to original_max_position_embeddings, and their effect in longer sequences."""


Part = Any
"""A module of a transformers model, or its config. Its attributes depend on the model family."""


class DecoderError(InputError):
    """The native loop does not support a model; the message names the unsupported part."""


@dataclass(slots=True)
class LayerTable:
    """One layer: its products by the names of ``native_loop.LINEARS``, its norms and its attention."""

    linears: dict[str, list[nn.Module]]
    norms: dict[str, Tensor]
    window: int = 0
    angles: int = -1


@dataclass(slots=True)
class DecoderTable:
    """A whole decoder. ``angles``: tables of rotary cosines and sines, (context, half) each."""

    shape: dict[str, int]
    numbers: dict[str, float]
    embeddings: nn.Module
    embedding_scale: float
    head: nn.Module
    last_norm: Tensor
    layers: list[LayerTable] = field(default_factory=list)
    angles: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def without_modules(self) -> DecoderTable:
        """Return the table without references to the model's weights."""
        bare = [replace(layer, linears={}) for layer in self.layers]
        return replace(self, layers=bare, embeddings=nn.Identity(), head=nn.Identity())


def _layers_of(model: Part, body: Part) -> Part:
    """Return the list of layers of ``body``, the decoder of ``model``. Raises DecoderError without layers or a norm."""
    layers = getattr(body, "layers", None)
    has_layers = isinstance(layers, nn.ModuleList) and len(layers) > 0
    if not has_layers or not hasattr(body, "norm"):
        missing = "'norm'" if has_layers else "list 'layers'"
        raise DecoderError(
            f"{type(model).__name__}: {type(body).__name__} has no {missing}: the native loop reads a list 'layers' "
            "and a 'norm' after it. Use transformers' own generate()"
        )
    return layers


def table_of(model: Part, context: int) -> DecoderTable:
    """Return the table of a transformers causal language model, with rotary angles for ``context`` positions.

    Raises DecoderError for features that a table does not support.
    """
    config, body = model.config.get_text_config(), model.get_decoder()
    _require_known_rope(type(model).__name__, config, context)
    layers = _layers_of(model, body)
    reader = _Reader(type(model).__name__, config, body, context)
    found = [reader.layer(layer, index) for index, layer in enumerate(layers)]
    first: Part = layers[0]
    attention, mlp = first.self_attn, first.mlp
    heads, head = config.num_attention_heads, int(attention.head_dim)
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or ""
    if name not in _ACTIVATIONS:
        raise DecoderError(f"{reader.name}: no native activation {name!r}; there are {', '.join(_ACTIVATIONS)}")
    shape = {
        "layers": len(layers),
        "hidden": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head": head,
        "inner": features(mlp.down_proj)[1],
        "vocabulary": features(model.get_output_embeddings())[0],
        "context": context,
        "gated": int(hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")),
        "norm_of_heads": int("queries" not in found[0].norms or found[0].norms["queries"].numel() == head),
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
        shape | {"activation": _index(name)},
        numbers,
        model.get_input_embeddings(),
        reader.embedding_scale(model.get_input_embeddings()),
        model.get_output_embeddings(),
        reader.gain(body.norm),
        found,
        reader.tables,
    )


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
                    f"{name}: {key} = {value!r} in rope_parameters: the native loop does not compute it. Use "
                    "transformers' own generate()"
                )
        original = parameters.get("original_max_position_embeddings") or 0
        for key, change in _CHANGES_BEYOND_ORIGINAL.items():
            if parameters.get(key) is not None and context > original:
                raise DecoderError(
                    f"{name}: context = {context}: {change} in sequences beyond the original {original} positions "
                    f"({key}), and the native loop does not. Lower context to {original}, or use transformers' own "
                    "generate()"
                )


def features(module: Part) -> tuple[int, int]:
    """Return (out_features, in_features) of a dense or packed linear layer."""
    return int(module.out_features), int(module.in_features)


def _index(activation: str) -> int:
    from pst_ds.inference.runtime.native_loop import ACTIVATIONS

    return ACTIVATIONS.index(_ACTIVATIONS[activation])


class _Reader:
    """Reads the layers of one model. Rotary tables that several layers share are stored once."""

    def __init__(self, name: str, config: Part, body: Part, context: int):
        self.name, self.config, self.body, self.context = name, config, body, context
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
        sandwich = hasattr(layer, "post_feedforward_layernorm")
        norms = {}
        for name in _NORMS:
            if hasattr(layer, name):
                place = "after_attention" if sandwich and name == "post_attention_layernorm" else _NORMS[name]
                norms[place] = self.gain(getattr(layer, name))
        for name, place in (("q_norm", "queries"), ("k_norm", "keys")):
            if getattr(attention, name, None) is not None:
                norms[place] = self.gain(getattr(attention, name))
        known = [module for modules in linears.values() for module in modules]
        known += [getattr(layer, name) for name in _NORMS if hasattr(layer, name)]
        known += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self._refuse_others(where, layer, known)
        return LayerTable(linears, norms, self._window(attention, index), self._angles(attention, index))

    def _first_of(self, where: str, parent: Part, *choices: list[str]) -> list[nn.Module]:
        for names in choices:
            if all(hasattr(parent, name) for name in names):
                return [getattr(parent, name) for name in names]
        raise DecoderError(f"{where}: {type(parent).__name__} has no {' or '.join(map('/'.join, choices))}")

    def _refuse_others(self, where: str, layer: nn.Module, known: list[nn.Module]) -> None:
        held = {id(module) for top in known for module in top.modules()}
        for name, module in layer.named_modules():
            if id(module) not in held and next(module.parameters(recurse=False), None) is not None:
                raise DecoderError(f"{where}: {name} ({type(module).__name__}) is not supported")

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

    def embedding_scale(self, embeddings: Part) -> float:
        """Return the factor of the rows of the embedding, applied by the module or by the model."""
        return float(getattr(embeddings, "embed_scale", 1.0)) * float(getattr(self.config, "embedding_multiplier", 1.0))

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
