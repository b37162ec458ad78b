"""Write a model as a GGUF file for llama.cpp, with int8 and int4 values in blocks of 32 that share a scale."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pst_ds.atomic_files import atomic_file
from pst_ds.formats.safetensors_file import write_at
from pst_ds.progress import Progress
from pst_ds.writing.encoding import Encoding, ExportError
from pst_ds.writing.gguf.seal import SEAL_KEY, UNSEALED, seal
from pst_ds.writing.gguf.tensors import Config, Family, GgufPlan, GgufTensor, family_of, num_experts
from pst_ds.writing.gguf.tokenizer import gguf_tokenizer
from pst_ds.writing.plan import Source, TensorJob, TensorSpec, TensorValues, all_outputs, require_space

_Table = dict[str, Any]
_Writer = Any
"""``gguf.GGUFWriter``, which has no types."""
_SPARE_BYTES = 64 << 20
_FILE_TYPES = {None: 32, 4: 2, 8: 7}
"""llama.cpp's file types for mostly BF16, Q4_0 and Q8_0, by bits of the values."""


def write_gguf(
    jobs: Sequence[TensorJob], source: Source, config: Config, tokenizer: Any, out: Path, encoding: Encoding
) -> dict[str, object]:
    """Write the tensors of ``jobs``, the config and the tokenizer to ``out``, atomically; return counts and sizes.

    Raises ExportError for an unsupported model family or tokenizer.
    """
    text = config.get_text_config()
    family = family_of(text)
    library = _library()
    jobs = [job for job in jobs if not job.outputs[0].name.endswith("rotary_emb.inv_freq")]  # computed by llama.cpp
    plan = GgufPlan(all_outputs(jobs), text, family, library)
    words = gguf_tokenizer(tokenizer, _num_tokens(plan, text))
    tensors = plan.tensors
    factors = _llama3_factors(text)
    if factors is not None:
        # a tensor of the file that no tensor of the model becomes
        kind = library.GGMLQuantizationType.F32
        output = TensorSpec(name="rope_freqs.weight", shape=factors.shape, dtype=torch.float32, origin="model")
        rope_factors = GgufTensor(name=output.name, shape=output.shape, kind=kind, numpy=np.float32, output=output)
        tensors = [*tensors, rope_factors]
    require_space(out, sum(tensor.nbytes for tensor in tensors) + _SPARE_BYTES)
    with atomic_file(out) as partial, closing(library.GGUFWriter(partial, family.architecture)) as writer:
        _describe(writer, config=text, words=words, name=out.stem, encoding=encoding)
        if experts := num_experts(text):
            _describe_experts(writer, text, experts, family)
        offsets = _write_head(writer, tensors, partial)
        with partial.open("r+b") as file:
            if factors is not None:
                write_at(file.fileno(), factors.data.cast("B"), offsets["rope_freqs.weight"])
            inexact = _write_pieces(file.fileno(), offsets=offsets, pieces=plan.pieces, jobs=jobs, source=source)
        # before the file gets its name, so that every file of this name has its SHA-256
        seal(partial)
    nbytes = out.stat().st_size
    # of pieces, because a stack of experts is one tensor of the file and several of the model
    numel = sum(piece.output.numel for piece in plan.pieces)
    num_quantised = sum(tensor.output.grid is not None for tensor in plan.tensors)
    return {
        "export_dir": str(out),
        "kind": "gguf",
        **encoding.facts(),
        "tensors": len(plan.tensors),
        "rounded_tensors": num_quantised,
        "file_bytes": nbytes,
        "inexact_scales": inexact,
        "bits_per_weight": round(8 * nbytes / numel, 4),
    }


def _num_tokens(plan: GgufPlan, config: Config) -> int:
    """Return the rows of the embedding: fewer than in the config if the vocabulary is trimmed."""
    for tensor in plan.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    return config.vocab_size


def require_gguf(model: Any) -> None:
    """Raise ExportError if the config of ``model`` shows that no GGUF file can hold it, or without the package gguf."""
    _library()
    text = model.config.get_text_config()
    family_of(text)
    _rotation(text)
    if model.get_output_embeddings() is None:
        raise ExportError(
            f"{type(model).__name__} does not predict tokens, as the models of GGUF files do. Choose another format"
        )


def _library() -> ModuleType:
    """Import the optional package gguf. Raises ExportError without it."""
    try:
        import gguf
    except ImportError:
        raise ExportError("GGUF export needs the package gguf. Run pip install 'pst-ds[gguf]'") from None
    return gguf


def _write_head(writer: _Writer, tensors: Sequence[GgufTensor], path: Path) -> dict[str, int]:
    """Write everything but the tensors to ``path``, and reserve their space; return the offset of each tensor."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor_shape=tensor.shape,
            tensor_dtype=np.dtype(tensor.numpy),
            tensor_nbytes=tensor.nbytes,
            raw_dtype=tensor.kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # the package would hold all tensors in memory, or write each in one piece; we write them at their offsets instead
    writer.close()
    offsets: dict[str, int] = {}
    end = path.stat().st_size
    for tensor in tensors:
        start = writer.ggml_pad(end, writer.data_alignment)
        offsets[tensor.name] = start
        end = start + tensor.nbytes
    os.truncate(path, writer.ggml_pad(end, writer.data_alignment))
    return offsets


def _write_pieces(
    handle: int, offsets: dict[str, int], pieces: Sequence[GgufTensor], jobs: Sequence[TensorJob], source: Source
) -> int:
    """Make and write the pieces one by one; return the number of scales that fp16 cannot hold exactly."""
    inexact = 0
    total = sum(piece.nbytes for piece in pieces)
    made = _values_in_turn(jobs, source)
    with Progress("export", total, "bytes") as progress:
        for piece, values in zip(pieces, made, strict=True):
            data, changed = piece.data(values)
            offset = offsets[piece.name] + (piece.expert or 0) * piece.nbytes
            write_at(handle, data.data.cast("B"), offset)
            inexact += changed
            progress.add(piece.nbytes)
    return inexact


def _values_in_turn(jobs: Sequence[TensorJob], source: Source) -> Iterator[TensorValues]:
    """Yield the values of all outputs, made one by one, so that memory holds only one of them."""
    for job in jobs:
        yield from source.make(job)


def _describe(writer: _Writer, config: Config, words: _Table, name: str, encoding: Encoding) -> None:
    """Write the model's dimensions, and its tokenizer as :func:`gguf_tokenizer` describes it."""
    heads = config.num_attention_heads
    width = config.hidden_size
    rotation = _rotation(config)
    head_width = getattr(config, "head_dim", None) or width // heads
    writer.add_string(SEAL_KEY, UNSEALED)  # first, so that it is found in the first bytes of the file
    writer.add_name(name)
    bits: int | None = None
    if encoding.values:
        bits = encoding.values.bits
    # for people who look at a file; llama.cpp reads the type of each tensor
    writer.add_file_type(_FILE_TYPES[bits])
    writer.add_quantization_version(2)  # of ggml's block layouts
    writer.add_vocab_size(len(words["token_list"]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_width * rotation.get("partial_rotary_factor", 1.0)))
    if head_width * heads != width:
        # llama.cpp assumes width / heads without these keys
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    writer.add_rope_freq_base(float(rotation.get("rope_theta", 10000.0)))
    # the keys are names of the writer's methods
    for key, value in words.items():
        getattr(writer, f"add_{key}")(value)


def _describe_experts(writer: _Writer, config: Config, experts: int, family: Family) -> None:
    """Write the number and width of the experts, and the gating function of the router."""
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for setting, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("n_shared_experts", writer.add_expert_shared_count),
        ("first_k_dense_replace", writer.add_leading_dense_block_count),
        ("routed_scaling_factor", writer.add_expert_weights_scale),
    ):
        if (value := getattr(config, setting, None)) is not None:
            add(value)
    if family.has_sigmoid_gates:
        writer.add_expert_gating_func(_library().ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)


def _rotation(config: Config) -> _Table:
    """Return the rotary settings of an old or new config: rope_theta, rope_type and its parameters.

    Raises ExportError for a type that GGUF export does not support.
    """
    # transformers 5 has rope_parameters; older configs have rope_scaling, with rope_theta next to it
    rotation = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if getattr(config, "rope_theta", None):
        rotation.setdefault("rope_theta", config.rope_theta)
    kind = rotation.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ExportError(f'rope_type = {kind!r}: GGUF export supports "default" and "llama3". Choose another format')
    return rotation


def _llama3_factors(config: Config) -> NDArray[np.float32] | None:
    """Return the divisor of each rotary frequency of Llama 3.1; None for default rotary embeddings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = _rotation(config)
    if settings.get("rope_type") != "llama3":
        return None
    # llama.cpp divides the frequencies by a tensor of factors, and transformers computes the divided ones
    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * divided.numel()
    plain = settings["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / divided).float().numpy()
