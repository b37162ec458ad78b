"""Convert a packed folder to a folder with one ONNX file, checked against the model before it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pst_ds import __version__
from pst_ds.atomic_files import atomic_folder, require_writable
from pst_ds.core.packings import ONNX_FILE
from pst_ds.formats import QuantizedFormat
from pst_ds.hf.config import LoadAs
from pst_ds.hf.model_folder import input_names, open_model_folder
from pst_ds.hf.tables import stored_tables
from pst_ds.inference.onnx.arithmetic import DRAWS, RoundedProducts, allowed_difference
from pst_ds.nn.base_model import architecture
from pst_ds.nn.model_structure import is_experts
from pst_ds.runtime import sparse_layers
from pst_ds.runtime.native_loop import narrowed
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.from_folder import copy_small_files
from pst_ds.writing.manifest import file_sums, read_manifest, write_manifest

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

    from pst_ds.inference.onnx.export import Table

_TABLE_ROWS = 100
"""Embeddings with at least this many rows stay in their stored form; smaller ones gain little."""
ALLOWED_IN_8_BITS = 0.1
"""Largest difference of outputs with int8 activations, relative to the largest output. It is a constant because the
effect of rounding to 8 bits depends on the model; the outputs of MiniLM differed by up to 0.02."""
EXTERNAL_BYTES = 1 << 30
"""Weights above this size go into a second file; protobuf holds at most 2 GB."""
_NOT_LOGITS = ("loss", "past_key_values", "hidden_states", "attentions", "encoder_last_hidden_state")


def write_onnx(
    packed: Path, out: Path, facts: Mapping[str, object], *, plain: bool = False, activation_bits: int = 16
) -> dict[str, object]:
    """Write ``out``, a folder with model.onnx, config.json and the tokenizer, from the folder ``packed``.

    ``packed`` is a bitmask folder, or any folder with ``plain``: dense fp32 weights and ONNX's standard operators.
    ``activation_bits``: 8 lets products with quantised weights use int8 activations. If ONNX Runtime is installed, the
    file is compared with the model in ``packed``: with 16 bits, and as exported. Returns ``facts`` about the packed
    export, and facts about the file. Raises ExportError, leaving nothing behind.
    """
    import onnx_ir as ir

    from pst_ds.inference.onnx.export import plain_graph, sparse_graph

    model = _load(packed, "dense" if plain else "sparse")
    # loaded again, because tracing changes the first one
    reference = _load(packed, "dense")
    outputs = _outputs_of(reference)
    quantised = _quantised_layers(model)  # before it is consumed
    if plain:
        graph = plain_graph(model, outputs)
        operators = "standard"
    else:
        graph = sparse_graph(model, _tables(packed, model), outputs)
        operators = "pst_ds"
    _annotate(graph, facts, activation_bits, operators)
    external = None
    if _weight_bytes(graph) > EXTERNAL_BYTES:
        external = f"{ONNX_FILE}.data"
    with atomic_folder(out) as partial:
        file = partial / ONNX_FILE
        ir.save(graph, file, external_data=external)
        copy_small_files(packed, partial)
        difference = _check(file, reference, quantised, activation_bits)
        # model.onnx, and model.onnx.data if the weights are in a second file
        file_bytes = sum(path.stat().st_size for path in partial.glob(f"{ONNX_FILE}*"))
        # the tensors are those of the packed folder, because verify quantises the run's model as they say
        tensors, packed_facts = read_manifest(packed)
        # files that are not copied
        packed_facts.pop("files_in_folders", None)
        write_manifest(partial, tensors, {**packed_facts, **file_sums(partial)})
    return {
        **facts,
        "kind": "onnx",
        "export_dir": str(out),
        "file_bytes": file_bytes,
        "operators": operators,
        "inputs": _names(graph.graph.inputs),
        "outputs": outputs,
        "nodes": len(list(graph.graph)),
        "sparse_nodes": sum(node.op_type == "SparseLinear" for node in graph.graph),
        "activation_bits": activation_bits,
        "max_relative_difference": difference,
    }


def _weight_bytes(graph: ir.Model) -> int:
    """Return the bytes of the graph's constants."""
    total = 0
    for value in graph.graph.initializers.values():
        if value.const_value is not None:
            total += value.const_value.nbytes
    return total


def _names(values: Iterable[Any]) -> list[str]:
    """Return the names of a graph's or a session's inputs or outputs, in their order."""
    return [value.name for value in values]


def _annotate(graph: ir.Model, facts: Mapping[str, object], activation_bits: int, operators: str) -> None:
    """Add the small ``facts`` and the kind of ``operators`` to the graph's metadata.

    Sparse products and attention get the bits of activations, too.
    """
    import onnx_ir as ir

    stated: dict[str, object] = {"version": __version__, "operators": operators}
    for key in ("values", "group", "embeddings", "sparsity_measured"):
        if facts.get(key):
            stated[key] = facts[key]
    # without the attribute, the operators use 16 bits
    if activation_bits == 8:
        stated["activation_bits"] = activation_bits
        for node in graph.graph:
            if node.op_type in ("SparseLinear", "Attention"):
                node.attributes.add(ir.AttrInt64("activation_bits", activation_bits))
    graph.metadata_props["pst_ds"] = json.dumps(stated)


def _outputs_of(model: PreTrainedModel) -> list[str]:
    """Return the tensors that a model's forward pass returns, without states and caches. Raises ExportError."""
    require_graph(model)
    example = dict.fromkeys(input_names(model), torch.ones(1, 8, dtype=torch.long))
    with torch.no_grad():
        results = model(**example, return_dict=True)
    names = []
    for name, value in results.items():
        if isinstance(value, Tensor) and name not in _NOT_LOGITS:
            names.append(name)
    return names


def require_graph(model: Any) -> None:
    """Raise ExportError for a model, which may be on the meta device, that no graph can represent."""
    inputs = input_names(model)
    name = type(model).__name__
    if model.config.is_encoder_decoder or "input_ids" not in inputs:
        raise ExportError(f"{name} does not take a single sequence of tokens. Choose another format")
    if any(is_experts(module) for module in model.modules()):
        raise ExportError(f"{name} has experts, and a graph cannot route tokens to them. Choose another format")


def _quantised_layers(model: nn.Module) -> dict[str, str]:
    """Return "int8" or "int4" for each packed layer with quantised weights, by name."""
    values_of = {}
    for name, layer in sparse_layers(model).items():
        if isinstance(layer.format, QuantizedFormat):
            values_of[name] = layer.format.grid.values
    return values_of


def require_free(out: Path) -> None:
    """Raise ExportError unless ``out`` is free, an empty folder, or an older ONNX export, and ONNX can be written."""
    # onnx and onnx_ir are installed with it
    if find_spec("onnxscript") is None:
        raise ExportError("ONNX files need onnx and onnxscript: pip install 'pst-ds[onnx]'")
    is_replaceable = out.is_dir() and ((out / ONNX_FILE).is_file() or not any(out.iterdir()))
    if out.exists() and not is_replaceable:
        raise ExportError(f"out = {str(out.absolute())!r} exists and is not an ONNX export. Name another folder")
    require_writable(out, f"out = {str(out)!r}")


def _load(folder: Path, load_as: LoadAs) -> PreTrainedModel:
    """Return the model in ``folder`` in fp32, of the class that its config names."""
    opened = open_model_folder(folder)
    if opened.config.architectures and architecture(opened.config) is None:
        raise ExportError(f"config.json names {opened.config.architectures[0]}, which transformers does not have")
    model = opened.load(load_as, "fp32")
    # keys and values for later calls, which a graph does not keep
    model.config.use_cache = False
    return model


def _tables(folder: Path, model: nn.Module) -> dict[str, Table]:
    """Return the large embeddings in the folder's stored form, by name in ``model``."""
    stored = stored_tables(folder, model)
    tables: dict[str, Table] = {}
    for name, module in model.named_modules():
        # a subclass may compute more than a look-up
        if type(module) is not nn.Embedding or module.num_embeddings < _TABLE_ROWS:
            continue
        if name in stored:
            tables[name] = (stored[name].codes, stored[name].scales, stored[name].bits)
            continue
        weight = narrowed(module.weight.detach())
        if weight.dtype == torch.bfloat16:  # without loss; an fp32 table stays a standard operator
            tables[name] = (weight, None, 16)
    return tables


Outputs = list[dict[str, np.ndarray]]
"""What a model returns for each of several inputs: values by the name of the output, without those at padding."""


def _check(file: Path, reference: PreTrainedModel, quantised: Mapping[str, str], activation_bits: int) -> float | None:
    """Compare the outputs of ``file`` with those of the model on inputs of all lengths.

    With 16-bit activations they may differ by what the arithmetic explains, as in ``verify``. With int8 activations the
    file is compared as exported, too: their effect depends on the model, and :data:`ALLOWED_IN_8_BITS` is a limit for
    all. ``quantised``: "int8" or "int4" of the weights that the graph's products have, by the name of their layer.
    Returns the largest difference of the file as exported over the largest output, or None without ONNX Runtime. Raises
    ExportError.
    """
    if find_spec("onnxruntime") is None:
        return None
    from pst_ds.inference.onnx.operators import open_session

    session = open_session(file, threads=1, exact=True)
    names = _names(session.get_outputs())
    feeds = list(_feeds(reference, _names(session.get_inputs())))
    expected = _outputs(reference, feeds, names)
    largest = _largest(expected)
    differences = _differences(_outputs_of_session(session, feeds, names), expected)
    # how far outputs move if each product is rounded as in the graph
    effects = []
    for seed in range(DRAWS):
        rounded = _outputs(RoundedProducts(reference, quantised, seed), feeds, names)
        effects.append(_differences(rounded, expected))
    for name in names:
        allowed = allowed_difference([effect[name] for effect in effects], largest[name])
        # "not <=" also rejects NaN
        if not differences[name] <= allowed:
            raise _not_the_model(
                f"{name} differs by {differences[name]:.2g}, and its arithmetic explains {allowed:.2g}"
            )
    # outputs may all be 0
    scale = max(*largest.values(), 1e-30)
    if activation_bits == 8:
        as_exported = open_session(file, threads=1)
        differences = _differences(_outputs_of_session(as_exported, feeds, names), expected)
        # "not all" instead of "any", because a NaN is not <= either
        if not all(value <= ALLOWED_IN_8_BITS * scale for value in differences.values()):
            worst = max(differences.values()) / scale
            raise _not_the_model(f"with int8 activations its outputs differ by {worst:.2g} of the largest")
    return max(differences.values()) / scale


def _not_the_model(why: str) -> ExportError:
    return ExportError(f"the graph does not compute the same as the model: {why}. Choose another format")


def _feeds(reference: PreTrainedModel, inputs: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield random ``inputs`` of several sizes for a model, one with padding at the end."""
    num_tokens = len(reference.get_input_embeddings().get_parameter("weight"))
    longest = min(getattr(reference.config, "max_position_embeddings", None) or 64, 64)
    draw = np.random.default_rng(0)
    # other sizes than the traced one, of 2 rows with 8 tokens
    for batch, tokens in ((1, 1), (2, 7), (3, longest)):
        feed = {name: np.ones((batch, tokens), np.int64) for name in inputs}
        feed["input_ids"] = draw.integers(1, num_tokens, (batch, tokens))
        if "token_type_ids" in feed:
            feed["token_type_ids"][:] = 0
        # from the middle on, so that the one token of the first size stays
        if "attention_mask" in feed:
            feed["attention_mask"][-1, (tokens + 1) // 2 :] = 0
            # classification heads look for the padding token
            padding = max(getattr(reference.config, "pad_token_id", None) or 0, 0)
            feed["input_ids"][feed["attention_mask"] == 0] = padding
        yield feed


@torch.no_grad()
def _outputs(model: Callable[..., Any], feeds: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> Outputs:
    """Return the outputs of a model, which has the signature of one of transformers."""
    outputs = []
    for feed in feeds:
        inputs = {name: torch.from_numpy(array) for name, array in feed.items()}
        results = model(**inputs, return_dict=True)
        at_tokens = {}
        for name in names:
            at_tokens[name] = _at_tokens(results[name].float().numpy(), feed)
        outputs.append(at_tokens)
    return outputs


def _outputs_of_session(
    session: onnxruntime.InferenceSession, feeds: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> Outputs:
    """Return the outputs of a graph."""
    outputs = []
    for feed in feeds:
        at_tokens = {}
        for name, values in zip(names, session.run(names, feed), strict=True):
            at_tokens[name] = _at_tokens(values, feed)
        outputs.append(at_tokens)
    return outputs


def _at_tokens(values: np.ndarray, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the values of an output (batch, tokens, ...) that are not at padding; all of an output of other axes."""
    # what a model computes at padding has no meaning, and differs
    is_token = feed.get("attention_mask", np.ones_like(feed["input_ids"])) == 1  # (batch, tokens)
    if values.shape[:2] != is_token.shape:
        return values
    return values[is_token]


def _differences(outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """Return the largest difference of each output; NaN if a value is NaN."""
    differences: dict[str, float] = {}
    for name in expected[0]:
        of_inputs = []
        for values, expected_values in zip(outputs, expected, strict=True):
            of_inputs.append(np.abs(values[name] - expected_values[name]).max())
        # numpy's max keeps a NaN, Python's may not
        differences[name] = float(np.max(of_inputs))
    return differences


def _largest(outputs: Outputs) -> dict[str, float]:
    """Return the largest absolute value of each output."""
    largest: dict[str, float] = {}
    for values in outputs:
        for name, array in values.items():
            largest[name] = max(largest.get(name, 0.0), float(np.abs(array).max()))
    return largest
