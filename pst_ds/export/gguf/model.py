"""A GGUF file of a Llama or Mistral, for llama.cpp: int8 and int4 values in blocks of 32 that share a scale."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pst_ds.core.formats.gguf_blocks import BLOCK, gguf_blocks
from pst_ds.core.formats.rows import as_bools
from pst_ds.core.quantization import Grid
from pst_ds.export.encoding import Encoding
from pst_ds.export.gguf.tokenizer import GgufTokenizer, gguf_tokenizer
from pst_ds.export.manifest import ExportError, JsonTable
from pst_ds.export.plan import PlannedTensor, Source, TensorJob, TensorValues, require_space
from pst_ds.progress import Progress

FAMILIES = ("llama", "mistral")
"""Values of ``model_type`` that llama.cpp runs as its architecture "llama"."""
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_SPARE_BYTES = 64 << 20
_FILE_TYPES = {None: 32, 4: 2, 8: 7}
"""llama.cpp's numbers of mostly BF16, Q4_0 and Q8_0 files, by the bits of the values."""


def write_gguf(
    jobs: Sequence[TensorJob], source: Source, config: Any, tokenizer: Any, out: Path, encoding: Encoding
) -> JsonTable:
    """Write ``out``, whole or not at all. Returns counts.

    ``jobs`` and ``source``: of plan_run or plan_folder. ``config``: of the model. Raises ExportError for a family or a
    tokenizer that GGUF has no words for here.
    """
    text = config.get_text_config()
    if text.model_type not in FAMILIES:
        raise ExportError(f"GGUF is written of {' and '.join(FAMILIES)} models, and this is {text.model_type}")
    library = _library()
    jobs = [job for job in jobs if not job.outputs[0].name.endswith("rotary_emb.inv_freq")]  # computed by llama.cpp
    tensors = [_tensor(output, text, library) for job in jobs for output in job.outputs]
    num_tokens = next((t.output.shape[0] for t in tensors if t.name == "token_embd.weight"), text.vocab_size)
    words = gguf_tokenizer(tokenizer, num_tokens)
    require_space(out, sum(tensor.nbytes for tensor in tensors) + _SPARE_BYTES)
    partial = out.with_name(f".{out.name}.partial")
    writer = library.GGUFWriter(partial, "llama")
    try:
        _describe(writer, text, words, out.stem, encoding)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.numpy), tensor.nbytes, tensor.kind)
        factors = _llama3_factors(text)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        inexact = 0
        with Progress("export", sum(tensor.nbytes for tensor in tensors), "bytes") as progress:
            for tensor, values in zip(tensors, _made(jobs, source), strict=True):
                data, changed = tensor.data(values)
                writer.write_tensor_data(data)
                inexact += changed
                progress.add(tensor.nbytes)
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    rounded = [tensor for tensor in tensors if tensor.grid]
    return {
        "export_dir": str(out), "kind": "gguf", **encoding.facts(), "tensors": len(tensors),
        "rounded_tensors": len(rounded), "file_bytes": out.stat().st_size, "inexact_scales": inexact,
        "bits_per_weight": round(8 * out.stat().st_size / sum(t.numel for t in tensors), 4),
    }  # fmt: skip


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("GGUF takes the package gguf: pip install 'pst-ds[gguf]'") from None
    return gguf


def _made(jobs: Sequence[TensorJob], source: Source) -> Iterator[TensorValues]:
    for job in jobs:
        yield from source.make(job)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Of what is written: bytes, where it is blocks."""
    kind: Any
    """ggml's type."""
    numpy: type[np.generic]
    numel: int
    nbytes: int
    output: PlannedTensor
    grid: Grid | None
    heads: int = 0
    """Of a query's or key's projection, whose rows are put in another order."""

    def data(self, values: TensorValues) -> tuple[NDArray[Any], int]:
        """Return (the array to write, number of scales that fp16 does not hold exactly). Raises ExportError."""
        tensor = values.tensor.to(self.output.dtype)
        if self.grid is None:
            tensor = _for_interleaved_rotation(tensor, self.heads)
            if self.numpy is np.float32:
                return tensor.float().contiguous().numpy(), 0
            return tensor.contiguous().view(torch.uint8).numpy(), 0
        keep = None if values.keep is None else as_bools(values.keep, tensor.shape[1])
        try:
            blocks, changed = gguf_blocks(tensor, keep, self.grid, values.scales)
        except ValueError as error:
            raise ExportError(f"{self.output.name}: {error}") from None
        return _for_interleaved_rotation(blocks, self.heads).contiguous().numpy(), changed


def _tensor(output: PlannedTensor, config: Any, library: Any) -> _Tensor:
    """Plan a tensor of the model for the file. Raises ExportError where it has no place there."""
    names = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    name = names.get_name(output.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ExportError(f"{output.name} has no name in a GGUF file of a Llama")
    kinds = library.GGMLQuantizationType
    owner = output.name.rpartition(".")[0]
    heads = config.num_attention_heads if owner.endswith(_ROTATED[0]) else 0
    if owner.endswith(_ROTATED[1]):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    numel = math.prod(output.shape)
    if output.grid is not None:
        if output.shape[1] % BLOCK:
            raise ExportError(f"{output.name} has {output.shape[1]} inputs, and GGUF's blocks have {BLOCK}")
        row = output.shape[1] // BLOCK * (2 + BLOCK * output.grid.bits // 8)
        kind = kinds.Q8_0 if output.grid.bits == 8 else kinds.Q4_0
        shape = (output.shape[0], row)
        return _Tensor(name, shape, kind, np.uint8, numel, math.prod(shape), output, output.grid, heads)
    halves = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
    if len(output.shape) == 1 or output.dtype not in halves:  # llama.cpp takes vectors in fp32 alone
        return _Tensor(name, output.shape, kinds.F32, np.float32, numel, 4 * numel, output, None, heads)
    shape = (output.shape[0], 2 * output.shape[1])
    return _Tensor(name, shape, halves[output.dtype], np.uint8, numel, 2 * numel, output, None, heads)


def _for_interleaved_rotation(tensor: Tensor, heads: int) -> Tensor:
    """Put the rows of a query's or key's projection in llama.cpp's order.

    transformers rotates dimension i of a head with i + d / 2; llama.cpp's "llama" rotates 2 i with 2 i + 1.
    """
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _describe(writer: Any, config: Any, words: GgufTokenizer, name: str, encoding: Encoding) -> None:
    """Write the model's shape and its tokenizer."""
    heads, width = config.num_attention_heads, config.hidden_size
    head_width = getattr(config, "head_dim", None) or width // heads
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[encoding.values.bits if encoding.values else None])
    writer.add_quantization_version(2)
    writer.add_vocab_size(len(words.tokens))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_width)
    if head_width * heads != width:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    writer.add_rope_freq_base(float(_rotation(config).get("rope_theta", 10000.0)))
    _require_rotation(config)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    for key, number in words.special.items():
        getattr(writer, f"add_{key}_token_id")(number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_space_prefix(words.adds_space)


def _rotation(config: Any) -> dict[str, Any]:
    """The rotary settings of a config, old or new: rope_theta, rope_type and what belongs to it."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if getattr(config, "rope_theta", None):
        found.setdefault("rope_theta", config.rope_theta)
    return found


def _require_rotation(config: Any) -> None:
    kind = _rotation(config).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ExportError(
            f"the rotary embeddings of this model are {kind!r}; GGUF is written of default and llama3 ones"
        )


def _llama3_factors(config: Any) -> NDArray[np.float32] | None:
    """By what Llama 3.1 divides each frequency, as transformers computes it; None for default rotary embeddings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = _rotation(config)
    if said.get("rope_type") != "llama3":
        return None
    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * divided.numel()
    plain = said["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / divided).float().numpy()
