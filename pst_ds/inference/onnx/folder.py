"""Convert a packed folder to a folder with one ONNX file, checked against the model before it is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from pst_ds.hf.config import LoadAs
from pst_ds.hf.model_folder import input_names, open_model_folder
from pst_ds.hf.tables import stored_tables
from pst_ds.nn.base_model import architecture
from pst_ds.nn.model_structure import is_experts
from pst_ds.runtime.native_loop import narrowed
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.from_folder import copy_small_files
from pst_ds.writing.manifest import file_sums, read_manifest, write_manifest

if TYPE_CHECKING:
    import onnx_ir as ir

    from pst_ds.inference.onnx.export import Table

_TABLE_ROWS = 100
"""Embeddings with at least this many rows stay in their stored form; smaller ones gain little."""
ALLOWED = 1e-3
"""Largest relative difference of outputs. Sums in another order and our exponential stay far below it."""
ALLOWED_IN_8_BITS = 0.1
"""The same with int8 activations; the outputs of MiniLM differed by up to 0.02."""
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

    model, reference = _load(packed, "dense" if plain else "sparse"), _load(packed, "dense")
    outputs = _outputs_of(reference)
    graph = plain_graph(model, outputs) if plain else sparse_graph(model, _tables(packed, model), outputs)
    operators = "standard" if plain else "pst_ds"
    _annotate(graph, facts, activation_bits, operators)
    nbytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    external = f"{ONNX_FILE}.data" if nbytes > EXTERNAL_BYTES else None
    with atomic_folder(out) as partial:
        file = partial / ONNX_FILE
        ir.save(graph, file, external_data=external)
        copy_small_files(packed, partial)
        difference = _compare(file, reference, ALLOWED, exact=True)
        if activation_bits == 8:
            difference = _compare(file, reference, ALLOWED_IN_8_BITS)
        nbytes = sum(path.stat().st_size for path in partial.glob(f"{ONNX_FILE}*"))
        # the tensors are those of the packed folder, because verify quantises the run's model as they say
        tensors, packed_facts = read_manifest(packed)
        packed_facts.pop("files_in_folders", None)
        write_manifest(partial, tensors, {**packed_facts, **file_sums(partial)})
    return {
        **facts,
        "kind": "onnx",
        "export_dir": str(out),
        "file_bytes": nbytes,
        "operators": operators,
        "inputs": [value.name for value in graph.graph.inputs],
        "outputs": outputs,
        "nodes": len(list(graph.graph)),
        "sparse_nodes": sum(node.op_type == "SparseLinear" for node in graph.graph),
        "activation_bits": activation_bits,
        "max_relative_difference": difference,
    }


def _annotate(graph: ir.Model, facts: Mapping[str, object], activation_bits: int, operators: str) -> None:
    """Add the small ``facts`` and the kind of ``operators`` to the graph's metadata.

    Sparse products get the bits of activations, too.
    """
    import onnx_ir as ir

    kept = {key: facts[key] for key in ("values", "group", "embeddings", "sparsity_measured") if facts.get(key)}
    if activation_bits == 8:
        kept["activation_bits"] = activation_bits
        for node in graph.graph:
            if node.op_type == "SparseLinear":
                node.attributes.add(ir.AttrInt64("activation_bits", activation_bits))
    graph.metadata_props["pst_ds"] = json.dumps({"version": __version__, "operators": operators, **kept})


def _outputs_of(model: PreTrainedModel) -> list[str]:
    """Return the tensors that a model's forward pass returns, without states and caches. Raises ExportError."""
    require_graph(model)
    inputs = input_names(model)
    with torch.no_grad():
        found = model(**{name: torch.ones(1, 8, dtype=torch.long) for name in inputs}, return_dict=True)
    return [name for name, value in found.items() if isinstance(value, Tensor) and name not in _NOT_LOGITS]


def require_graph(model: Any) -> None:
    """Raise ExportError for a model, which may be on the meta device, that no graph can represent."""
    inputs, name = input_names(model), type(model).__name__
    if model.config.is_encoder_decoder or "input_ids" not in inputs:
        raise ExportError(f"{name} does not take a single sequence of tokens. Choose another format")
    if any(is_experts(module) for module in model.modules()):
        raise ExportError(f"{name} has experts, and a graph cannot route tokens to them. Choose another format")


def require_free(out: Path) -> None:
    """Raise ExportError unless ``out`` is free, an empty folder, or an older ONNX export, and ONNX can be written."""
    if find_spec("onnxscript") is None:  # onnx and onnx_ir are installed with it
        raise ExportError("ONNX files need onnx and onnxscript: pip install 'pst-ds[onnx]'")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / ONNX_FILE).is_file())):
        raise ExportError(f"out = {str(out.absolute())!r} exists and is not an ONNX export. Name another folder")
    require_writable(out, f"out = {str(out)!r}")


def _load(folder: Path, load_as: LoadAs) -> PreTrainedModel:
    """Return the model in ``folder`` in fp32, of the class that its config names."""
    opened = open_model_folder(folder)
    if opened.config.architectures and architecture(opened.config) is None:
        raise ExportError(f"config.json names {opened.config.architectures[0]}, which transformers does not have")
    model = opened.load(load_as, "fp32")
    model.config.use_cache = False
    return model


def _tables(folder: Path, model: nn.Module) -> dict[str, Table]:
    """Return the large embeddings in the folder's stored form, by name in ``model``."""
    stored = stored_tables(folder, model)
    found: dict[str, Table] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Embedding or module.num_embeddings < _TABLE_ROWS:
            continue
        if name in stored:
            found[name] = (stored[name].codes, stored[name].scales, stored[name].bits)
        elif (weight := narrowed(module.weight.detach())).dtype == torch.bfloat16:
            found[name] = (weight, None, 16)
    return found


def _compare(file: Path, reference: PreTrainedModel, allowed: float, *, exact: bool = False) -> float | None:
    """Run ``file`` and the model on inputs of all lengths. Return their largest difference over the largest output.

    Ignores outputs at padding. ``exact``: use 16-bit activations. Returns None without ONNX Runtime. Raises ExportError
    above ``allowed``.
    """
    if find_spec("onnxruntime") is None:
        return None
    from pst_ds.inference.onnx.operators import open_session

    session = open_session(file, threads=1, exact=exact)
    num_tokens = len(reference.get_input_embeddings().get_parameter("weight"))
    most = min(getattr(reference.config, "max_position_embeddings", None) or 64, 64)
    draw, apart, largest = np.random.default_rng(0), 0.0, 1e-30
    for batch, tokens in ((1, 1), (2, 7), (3, most)):
        feed = {value.name: np.ones((batch, tokens), np.int64) for value in session.get_inputs()}
        feed["input_ids"] = draw.integers(1, num_tokens, (batch, tokens))
        if "token_type_ids" in feed:
            feed["token_type_ids"][:] = 0
        real = np.ones((batch, tokens), bool)
        if "attention_mask" in feed:
            real[-1, (tokens + 1) // 2 :] = False
            feed["attention_mask"][~real] = 0
            # classification heads look for the padding token
            feed["input_ids"][~real] = max(getattr(reference.config, "pad_token_id", None) or 0, 0)
        names = [value.name for value in session.get_outputs()]
        with torch.no_grad():
            wanted = reference(**{name: torch.from_numpy(array) for name, array in feed.items()}, return_dict=True)
        for name, got in zip(names, session.run(names, feed), strict=True):
            want = wanted[name].float().numpy()
            if want.shape[:2] == real.shape:
                got, want = got[real], want[real]
            apart = float(np.maximum(apart, np.abs(got - want).max()))  # keeps a NaN
            largest = max(largest, float(np.abs(want).max()))
    worst = apart / largest
    if not worst <= allowed:
        raise ExportError(f"the graph does not compute the same as the model: {worst:.2g} of the largest output apart")
    return worst
