"""Read the table of a transformers model's decoder from its modules, instead of from the model's name.

Supports every model whose layers are attention and an MLP with residuals, under the names that transformers gives these
parts. docs/how-to/inference.md lists families that are tested. What a part computes is measured where possible: norms,
rotary angles and their pairs of columns. A refusal names everything that the table cannot express;
:meth:`Decoder.from_model` compares logits to find what was not noticed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.activations import XIELUActivation

from pst_ds.core.quantization import unpack_nibbles
from pst_ds.formats import QuantizedFormat
from pst_ds.hf.tables import StoredTable
from pst_ds.inference.decoder.norms import measured_norm
from pst_ds.inference.decoder.problems import Problems
from pst_ds.inference.decoder.rotary import RotaryTables, note_unknown_parameters, require_original_positions
from pst_ds.inference.decoder.table import USE_OTHER, DecoderError, DecoderTable, Embedding, LayerTable, Part, Product
from pst_ds.runtime import SparseLinear
from pst_ds.runtime.native_loop import ACTIVATIONS, Matrix, Norm, Place, narrowed

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
"""Names in ``native_loop.ACTIVATIONS``, by the names that configs have."""


def table_of(model: Part, context: int, tables: Mapping[str, StoredTable] | None = None) -> DecoderTable:
    """Return the table of a transformers causal language model, with rotary angles for ``context`` positions.

    ``tables``: quantised embeddings, by name in the model. Raises DecoderError for unsupported features.
    """
    config = model.config.get_text_config()
    body = model.get_decoder()
    # everything is read before a refusal, so that one message names all that is missing
    problems = Problems()
    note_unknown_parameters(config, problems)
    modules = _layers_of(body)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or ""
    _note_problems_of_body(body, modules, config=config, activation=activation, problems=problems)
    names = {module: name for name, module in model.named_modules()}
    rotary = RotaryTables(getattr(body, "rotary_emb", None), context, problems)
    reader = _LayerReader(config=config, names=names, rotary=rotary, problems=problems)
    layers: list[LayerTable] = []
    for index, module in enumerate(modules):
        layer = reader.layer(module, index)
        # otherwise it has noted a problem
        if layer is not None:
            layers.append(layer)
    last_norm = None
    if hasattr(body, "norm"):
        last_norm = measured_norm(body.norm, config.hidden_size, problems)
    if problems:
        raise DecoderError(
            f"model_type = {config.model_type!r}: the native decoder cannot compute {type(model).__name__}: "
            f"{problems}. {USE_OTHER}"
        )
    require_original_positions(config, context)
    assert last_norm is not None
    # the loop has one scale of attention for all layers
    attention = modules[0].self_attn
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    stored_embedding = None
    for name, table in (tables or {}).items():
        if model.get_submodule(name) is embedding:
            stored_embedding = table
    # a tied output layer reads the quantised rows too
    is_tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    return DecoderTable(
        shape={
            **_sizes(config, layers, _head_size(config, attention)),
            "vocabulary": int(head.out_features),
            "context": context,
            "activation": ACTIVATIONS.index(_ACTIVATIONS[activation]),
        },
        numbers=_numbers(model, config, attention),
        embedding=_embedding_of(embedding, stored_embedding, float(getattr(config, "embedding_multiplier", 1.0))),
        head=_product("the output layer", [head], stored_embedding if is_tied else None),
        last_norm=last_norm,
        layers=layers,
        angles=rotary.tables,
        turns_neighbours=rotary.turns_neighbours,
        places=reader.places,
    )


def _note_problems_of_body(
    body: Part, layers: Sequence[Part], *, config: Part, activation: str, problems: Problems
) -> None:
    """Note what no table can have of the model around its layers, or of all layers."""
    if not layers:
        problems.note(f"{type(body).__name__} has no list 'layers'")
    if not hasattr(body, "norm"):
        problems.note(f"{type(body).__name__} has no 'norm' after its layers")
    # without layers, the activation says nothing more
    if layers and activation not in _ACTIVATIONS:
        problems.note(f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    if getattr(config, "clip_qkv", None) is not None:
        problems.note(f"clip_qkv = {config.clip_qkv} limits queries, keys and values")


def _layers_of(body: Part) -> Sequence[Part]:
    """Return the layers of ``body``; nothing if it has no list of layers."""
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return ()
    return list(layers)


def _head_size(config: Part, attention: Part) -> int:
    """Return the columns of an attention head, which need not be hidden size / heads."""
    size = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _sizes(config: Part, layers: Sequence[LayerTable], head_size: int) -> dict[str, int]:
    """Return the part of :attr:`DecoderTable.shape` that is about the layers."""
    first = layers[0]  # the loop rejects layers of other sizes
    heads = config.num_attention_heads
    norm_of_queries = first.norms.get("queries")
    # queries are normed by head, or all heads together (OLMo 2)
    is_norm_of_heads = norm_of_queries is None or norm_of_queries.gain.numel() == head_size
    return {
        "layers": len(layers),
        "hidden": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head": head_size,
        "inner": first.products["down"].matrices[0].shape[1],
        "gated": int(first.is_gated),
        "norm_of_heads": int(is_norm_of_heads),
    }


def _numbers(model: Part, config: Part, attention: Part) -> dict[str, float]:
    """Return the factors and limits of :attr:`DecoderTable.numbers`; a limit of 0 is none."""
    head_size = _head_size(config, attention)
    return {
        "attention_scale": float(getattr(attention, "scaling", head_size**-0.5)),
        "attention_cap": float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        "logits_cap": float(getattr(config, "final_logit_softcapping", None) or 0.0),
        "logits_scale": _logits_scale(model, config),
        "residual_scale": float(getattr(config, "residual_multiplier", None) or 1.0),
    }


@torch.no_grad()
def _logits_scale(model: Part, config: Part) -> float:
    """Return the factor of the output layer's result, measured: some models multiply by logits_scaling, some divide."""
    setting = float(getattr(config, "logits_scaling", None) or 1.0)
    # most models, of which none needs a forward pass here
    if setting == 1.0:
        return 1.0
    outputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    finally:
        hook.remove()
    error_if_multiplied = float((logits - setting * outputs[0]).norm())
    error_if_divided = float((logits - outputs[0] / setting).norm())
    return setting if error_if_multiplied < error_if_divided else 1.0 / setting


def _embedding_of(embedding: Part, stored: StoredTable | None, factor: float) -> Embedding:
    """Return the rows of the embedding, dense or quantised. The module or the model multiplies them by a factor."""
    scale = float(getattr(embedding, "embed_scale", 1.0)) * factor
    if stored is not None:
        return Embedding(rows=stored.codes, scales=stored.scales, bits=stored.bits, group=stored.group, scale=scale)
    weight = narrowed(embedding.weight.detach())
    return Embedding(rows=weight, scales=None, bits=8 * weight.element_size(), group=0, scale=scale)


def _product(name: str, modules: Sequence[Part], stored: StoredTable | None = None) -> Product:
    """Return linear layers that share their input as one product. ``stored``: stored form of an only layer."""
    matrices = [_matrix_of(name, module, stored) for module in modules]
    if all(module.bias is None for module in modules):
        return Product(matrices, bias=None)
    biases = []
    for module in modules:
        # q, k and v may differ in this
        if module.bias is None:
            biases.append(torch.zeros(module.out_features))
        else:
            biases.append(module.bias.detach().float())
    return Product(matrices, torch.cat(biases))


def _matrix_of(name: str, module: Part, stored: StoredTable | None) -> Matrix:
    """Return the matrix of a linear layer. Weights that are not quantised are dense, in bf16 if that is lossless."""
    if stored is not None:
        codes = stored.codes
        # two of them are in a byte of the table, and one in a byte of a matrix
        if stored.bits == 4:
            codes = unpack_nibbles(codes, module.in_features).contiguous()
        return Matrix.of_codes(codes, scales=stored.scales, bits=stored.bits, group=stored.group)
    if isinstance(module, SparseLinear):
        if not isinstance(module.format, QuantizedFormat):
            return Matrix.of_floats(narrowed(module.dense_weight()))
        parts = module.parts()
        scheme = module.format.grid
        codes = module.format.unpack_codes(parts)
        return Matrix.of_codes(codes, scales=parts["scales"], bits=scheme.bits, group=scheme.group or 0)
    if not isinstance(module, nn.Linear):
        raise DecoderError(f"{name}: {type(module).__name__} is not a linear layer that the native decoder supports")
    return Matrix.of_floats(narrowed(module.weight.detach()))


class _LayerReader:
    """Reads the layers of one model, and notes what a table cannot express."""

    def __init__(self, config: Part, names: Mapping[nn.Module, str], rotary: RotaryTables, problems: Problems):
        """``names``: the name in the model of each module."""
        self.places: dict[str, Place] = {}
        """Place of each linear layer read so far, by its name in the model."""
        self._config = config
        self._names = names
        self._rotary = rotary
        self._problems = problems

    def layer(self, layer: Part, index: int) -> LayerTable | None:
        """Return the table of a layer; None, with problems noted, if there is no such table."""
        problems_before = len(self._problems)
        attention = getattr(layer, "self_attn", None)
        mlp = getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            self._problems.note(f"{type(layer).__name__} has no self_attn and mlp")
            return None
        # separate layers, or one that has their outputs side by side
        linears = {
            "qkv": self._first_of(attention, ["qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
            "output": self._first_of(attention, ["o_proj"], ["dense"]),
            "gate_up": self._first_of(mlp, ["gate_up_proj"], ["gate_proj", "up_proj"], ["up_proj"], ["c_fc"]),
            "down": self._first_of(mlp, ["down_proj"], ["c_proj"]),
        }
        modules_of_norms = _norms_of(layer, attention)
        # a module with parameters in some models
        activation = getattr(mlp, "act_fn", None)
        in_table = [*modules_of_norms.values(), activation]
        for modules in linears.values():
            in_table += modules
        self._note_others(layer, in_table)
        if not {"before_mlp", "after_attention", "after_mlp"} & set(modules_of_norms):
            self._problems.note(
                f"{type(layer).__name__} has no norm between its attention and its MLP, which are in parallel"
            )
        norms = self._measured(modules_of_norms, _head_size(self._config, attention))
        angles = self._rotary.index_for(attention, self._type(index))
        # a norm may be unknown without a new problem: an earlier layer noted the same one
        if len(self._problems) > problems_before or len(norms) < len(modules_of_norms):
            return None
        products = {}
        for name, modules in linears.items():
            products[name] = _product(f"layer {index}, {name}", modules)
            self._keep_places(index, name, modules, products[name].matrices)
        return LayerTable(
            products=products,
            norms=norms,
            window=self._window(attention, index),
            angles=angles,
            activation=_parameters_of(activation),
            is_gated=hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
        )

    def _keep_places(self, index: int, product: str, modules: Sequence[nn.Module], matrices: Sequence[Matrix]) -> None:
        """Remember which rows of a product are which linear layer."""
        first = 0
        for module, matrix in zip(modules, matrices, strict=True):
            rows, columns = matrix.shape
            self.places[self._names[module]] = Place(
                layer=index, product=product, first=first, rows=rows, columns=columns
            )
            first += rows

    def _measured(self, modules: Mapping[str, nn.Module], head_size: int) -> dict[str, Norm]:
        """Return the norms of a layer by their places, without those that are not known."""
        norms = {}
        for place, module in modules.items():
            width = self._config.hidden_size
            if place in ("queries", "keys"):
                # over a head, or over all heads: only its weight tells
                weight = next(module.parameters(recurse=False), None)
                width = head_size if weight is None else weight.numel()
            norm = measured_norm(module, width, self._problems)
            if norm is not None:
                norms[place] = norm
        return norms

    def _note_others(self, layer: Part, in_table: Sequence[nn.Module | None]) -> None:
        """Note the modules of a layer that have parameters and are neither in the table, nor in a module that is."""
        known: set[nn.Module] = set()
        for part in in_table:
            if part is not None:
                known.update(part.modules())
        others = []
        for name, module in layer.named_modules():
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if has_parameters and module not in known:
                others.append(name or "the parameters of the layer itself")
        if others:
            self._problems.note(f"{type(layer).__name__} has {', '.join(others)}")

    def _first_of(self, parent: Part, *choices: list[str]) -> list[nn.Module]:
        """Return the modules of the first choice of which ``parent`` has all; nothing, with a problem, without one."""
        for names in choices:
            if all(hasattr(parent, name) for name in names):
                return [getattr(parent, name) for name in names]
        self._problems.note(f"{type(parent).__name__} has no {' or '.join(map('/'.join, choices))}")
        return []

    def _type(self, index: int) -> str | None:
        """Return the kind of a layer, such as "sliding_attention"; None if the config has no kinds."""
        types = getattr(self._config, "layer_types", None)
        return str(types[index]) if types else None

    def _window(self, attention: Part, index: int) -> int:
        """Return the positions that a layer attends to, 0 for all: from its attention, or else from the config."""
        if not getattr(attention, "is_sliding", True):
            return 0
        window = getattr(attention, "sliding_window", None)
        # an attention that has the attribute, even None, has decided
        if not hasattr(attention, "sliding_window") and self._type(index) in (None, "sliding_attention"):
            window = getattr(self._config, "sliding_window", None)
        return int(window or 0)


def _norms_of(layer: Part, attention: Part) -> dict[str, nn.Module]:
    """Return the norms of a layer by their places, one of ``native_loop.NORMS``."""
    norms: dict[str, nn.Module | None] = {}
    is_sandwich = any(hasattr(layer, name) for name in _SANDWICH)
    for name, place in _NORMS.items():
        # the one name that has two meanings
        if is_sandwich and name == "post_attention_layernorm":
            place = "after_attention"
        if hasattr(layer, name):
            norms[place] = getattr(layer, name)
    norms["queries"] = getattr(attention, "q_norm", None)
    norms["keys"] = getattr(attention, "k_norm", None)
    present = {}
    for place, norm in norms.items():
        # an Identity is a norm that a setting has switched off
        if norm is not None and not isinstance(norm, nn.Identity):
            present[place] = norm
    return present


@torch.no_grad()
def _parameters_of(activation: Part) -> Tensor | None:
    """Return the parameters of an activation for :meth:`Loop.set_activation`; None without any."""
    if not isinstance(activation, XIELUActivation):
        return None
    # as XIELUActivation computes them in each forward pass
    beta = activation.beta.float()
    of_positive = torch.nn.functional.softplus(activation.alpha_p.float())
    of_negative = beta + torch.nn.functional.softplus(activation.alpha_n.float())
    parameters = (of_positive, of_negative, beta, activation.eps.float())
    return torch.stack([values.reshape(()) for values in parameters])
