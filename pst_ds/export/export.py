"""Export: a run or a model folder becomes a folder of dense or packed weights, whole or not at all."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pst_ds.atomic_files import atomic_folder, file_sha256, require_writable
from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.packings import FOR_COMPRESSED_TENSORS, GGUF, QUANTIZED_PACKINGS
from pst_ds.core.quantization import Grid
from pst_ds.data.vocabulary import Vocabulary
from pst_ds.export import manifest
from pst_ds.export.encoding import Encoding
from pst_ds.export.from_folder import CONFIG_FILE, FolderContents, copy_beside, open_folder, plan_folder
from pst_ds.export.from_run import RunSource, plan_run
from pst_ds.export.gguf.model import write_gguf
from pst_ds.export.manifest import DENSE, MANIFEST_FILE, About, ExportError, JsonTable, TensorEntry
from pst_ds.export.model_card import CARD_FILE, model_card
from pst_ds.export.plan import SHARD_BYTES, PlannedFile, Source, TensorJob, plan_files, require_packed, require_space
from pst_ds.export.prompt_file import SavedPrompt, read_prompt
from pst_ds.export.rounding import linear_layers
from pst_ds.export.vocabulary import with_fewer_rows, write_vocabulary
from pst_ds.export.write import write_tensors
from pst_ds.formats.base_weights import BaseWeights, is_text_part
from pst_ds.nn.base_model import pruning_record

_SMALL = "generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
"""Small files of the base that the tokenizer does not write."""
_SPARE_BYTES = 64 << 20
"""Free space to require besides the weights: tokenizer, manifest, card."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """The tensors and other files of a folder, and the facts for its manifest."""

    jobs: list[TensorJob]
    source: Source
    about: About
    linear: list[str]
    """The linear layers' names."""
    write_beside: Callable[[Path], None]
    """Writes config.json and the other small files."""


def export_run(
    model: nn.Module,
    checkpoint: Checkpoint,
    tokenizer: Any,
    out: Path,
    *,
    packing: str = DENSE,
    values: Grid | None = None,
    embeddings: Grid | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    vocabulary: Vocabulary | None = None,
    prompt: SavedPrompt | None = None,
    run: JsonTable | None = None,
) -> JsonTable:
    """Write ``out``, a model folder of the model in ``checkpoint``; whole or not at all. Returns what was written.

    ``model`` gives names, shapes and the config; it may be on the meta device, since values come from the base model's
    files and the checkpoint. Pruned tensors have the values the masked model multiplied with, +0.0 where pruned; other
    tensors are the base model's bytes, or were trained. ``dtype`` ("bf16", "fp32") casts all of them instead.
    ``packing``: "dense", a format that pruned weights are packed in, "compressed-tensors", or "gguf", one file.
    ``values`` and ``embeddings``: the grids that linear layers and embeddings are rounded to; None leaves them, but for
    the layers of a run that rounds: they have its codes and scales unless ``dtype`` asks for plain values.
    ``vocabulary``: ``tokenizer`` with fewer tokens, of which the rows alone are written; None: all. ``prompt``: that of
    the run, kept in a file of its own. ``run``: the resolved run file, to be kept. Raises ExportError, and WorkerError
    when one of several ``processes`` was killed.
    """
    encoding = _encoding(packing, _trained_values(checkpoint, packing, values, dtype), embeddings)
    _require_free(out, encoding)
    base = BaseWeights(checkpoint.state.base_path, getattr(model, "base_model_prefix", ""))
    state = checkpoint.state
    if vocabulary and is_text_part(model, base.folder):
        raise ExportError(
            f"{base.folder} holds more than the text part, and its vocabulary stays whole: no --vocabulary"
        )
    about = {
        "step": state.step,
        "base_model": state.base_path,
        "base_fingerprint": state.base_fingerprint,
        "computed_in": state.precision,
        "sparsity_requested": state.sparsity,
        "metrics": {name: value if math.isfinite(value) else None for name, value in state.metrics.items()},
        "prompt": None if prompt is None else prompt.facts,
        "run": run,
    }
    if pruned_from := pruning_record(state.base_path).get("base_model"):
        about["pruned_from"] = pruned_from
    _require_reader(prompt, packing, checkpoint.folder)
    jobs = plan_run(model, checkpoint, base, encoding, dtype)
    write_beside = partial(_write_beside_run, model, base, tokenizer, prompt)
    contents = _Contents(jobs, RunSource(checkpoint, base, model), about, linear_layers(model), write_beside)
    if vocabulary:
        contents = _trimmed(contents, model, tokenizer, vocabulary)
    if packing == GGUF:
        return about | write_gguf(contents.jobs, contents.source, model.config, tokenizer, out, encoding)
    return _write_folder(contents, out, encoding, shard_bytes, processes)


def _require_reader(prompt: SavedPrompt | None, packing: str, source: Path) -> None:
    """Raise ExportError for a format whose readers would leave the prompt out without a word."""
    if prompt is not None and packing in (*FOR_COMPRESSED_TENSORS, GGUF):
        raise ExportError(
            f"{source} has a trained prompt, and the programs that read {packing} know none: they would compute "
            "without it. Take --format dense, or bitmask"
        )


def _write_beside_run(
    model: nn.Module, base: BaseWeights, tokenizer: Any, prompt: SavedPrompt | None, folder: Path
) -> None:
    """Write the config, the base's small files, the tokenizer and the prompt to ``folder``."""
    if prompt is not None:
        prompt.write(folder)
    if is_text_part(model, base.folder):
        base.copy_if_there(CONFIG_FILE, folder)
    else:
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    for name in _SMALL:
        base.copy_if_there(name, folder)
    tokenizer.save_pretrained(folder)


def export_folder(
    source: Path,
    out: Path,
    *,
    packing: str = DENSE,
    values: Grid | None = None,
    embeddings: Grid | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    tokenizer: Any = None,
    vocabulary: Vocabulary | None = None,
    dequantize: bool = False,
) -> JsonTable:
    """Write ``out`` from a model folder: dense with zeros, whoever pruned it, or one of our packed folders.

    Weights keep their bits, but for a -0.0 that is packed, which becomes +0.0, and for those that are rounded to the
    grids ``values`` and ``embeddings``; what is on its grid already stays as it is. ``vocabulary``: the folder's
    ``tokenizer`` with fewer tokens, whose rows alone are written. ``dequantize``: the folder is another library's, of
    GPTQ, AWQ, bitsandbytes or MXFP4, whose weights become plain numbers first. Raises ExportError and WorkerError.
    """
    encoding = _encoding(packing, values, embeddings)
    _require_free(out, encoding)
    if out.resolve() == source.resolve():
        raise ExportError(f"{out} is the folder to read; name another with --out")
    folder = open_folder(source, dequantize=dequantize)
    jobs, origin = plan_folder(folder, encoding, dtype)
    surviving = (
        "step", "base_model", "base_fingerprint", "computed_in", "sparsity_requested", "metrics", "run", "tokens_kept",
        "prompt",
    )  # fmt: skip
    _require_reader(read_prompt(source), packing, source)
    about = {key: folder.about.get(key) for key in surviving} | {"metrics": folder.about.get("metrics") or {}}
    about |= {key: folder.about[key] for key in ("pruned_from",) if key in folder.about}
    contents = _Contents(jobs, origin, about, linear_layers(folder.model), lambda beside: _copy_folder(folder, beside))
    if vocabulary:
        contents = _trimmed(contents, folder.model, tokenizer, vocabulary)
    if packing == GGUF:
        from transformers import AutoTokenizer

        words = tokenizer if vocabulary else AutoTokenizer.from_pretrained(source, local_files_only=True)
        return about | write_gguf(contents.jobs, contents.source, folder.model.config, words, out, encoding)
    return _write_folder(contents, out, encoding, shard_bytes, processes)


def _trimmed(contents: _Contents, model: nn.Module, tokenizer: Any, vocabulary: Vocabulary) -> _Contents:
    """Return ``contents`` with the rows, the tokenizer and the ids of ``vocabulary``. Raises ExportError."""

    def write_beside(folder: Path) -> None:
        contents.write_beside(folder)
        write_vocabulary(folder, model, vocabulary, tokenizer)

    jobs, source = with_fewer_rows(contents.jobs, contents.source, model, vocabulary.kept)
    before = contents.about.get("tokens_kept")
    if before and vocabulary.kept[-1] >= len(before):
        raise ExportError(
            f"the manifest knows {len(before)} tokens, and the tokenizer has more: export the model again"
        )
    kept = [before[old] for old in vocabulary.kept] if before else vocabulary.kept
    about = {**contents.about, "tokens_kept": kept}
    return replace(contents, jobs=jobs, source=source, about=about, write_beside=write_beside)


def _trained_values(checkpoint: Checkpoint, packing: str, asked: Grid | None, dtype: str | None) -> Grid | None:
    """Return the grid of the values: of a run that rounds its own, if the packing has codes. Raises ExportError."""
    trained = checkpoint.contents.value_grid
    if not checkpoint.state.rounds or trained is None:
        return asked
    if asked is None:
        return trained if dtype is None and packing in (*QUANTIZED_PACKINGS, *FOR_COMPRESSED_TENSORS, GGUF) else None
    if asked != trained:
        raise ExportError(
            f"values in {asked}, but {checkpoint.folder} was trained with weights in {trained}, and rounding them "
            "again loses more: leave out --values and --group, or write plain numbers with --dtype"
        )
    return asked


def _encoding(packing: str, values: Grid | None, embeddings: Grid | None) -> Encoding:
    try:
        return Encoding(packing, values, embeddings)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _copy_folder(folder: FolderContents, out: Path) -> None:
    copy_beside(folder.path, out)
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_free(out: Path, encoding: Encoding) -> None:
    """``out`` must be free, an empty folder, or an older export; of GGUF a file name that is free or an older file."""
    if encoding.packing == GGUF:
        if out.suffix != ".gguf" or out.is_dir():
            raise ExportError(f"{out.absolute()} is to be one file for llama.cpp; give --out a name that ends in .gguf")
        require_writable(out, f"--out {out}")
        return
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST_FILE).is_file())):
        raise ExportError(f"{out.absolute()} exists and is not an export; name another folder with --out")
    require_writable(out, f"--out {out}")


def _write_folder(contents: _Contents, out: Path, encoding: Encoding, shard_bytes: int, processes: int) -> JsonTable:
    stay_dense = require_packed(contents.jobs, encoding)
    files = plan_files(contents.jobs, encoding.stem, shard_bytes)
    require_space(out, sum(file.nbytes for file in files) + _SPARE_BYTES)
    with atomic_folder(out) as partial:
        entries = write_tensors(partial, files, contents.jobs, contents.source, processes)
        _write_index(partial, files, encoding)
        contents.write_beside(partial)
        left_alone = _left_alone(contents.linear, entries) if encoding.packing in FOR_COMPRESSED_TENSORS else []
        architecture = _finish_config(partial, entries, encoding.quantization_config(len(files), left_alone))
        about = {"kind": encoding.packing, **encoding.facts(), "architecture": architecture, **contents.about}
        about |= _counted(entries, files)
        if encoding.is_quantized:
            about |= storage_facts(entries, _sizes(entries, files))
        if left_alone:
            about["left_alone"] = left_alone
        (partial / CARD_FILE).write_text(model_card(out.name, entries, about), encoding="utf-8")
        about["files"] = _sums(partial)
        manifest.write_manifest(partial, entries, about)
    return {
        **{key: value for key, value in about.items() if key not in ("files", "run")},
        "export_dir": str(out),
        "tensors": len(entries),
        "pruned_tensors": sum(entry.origin == "pruned" for entry in entries),
        "packed_tensors": sum(entry.packing != DENSE for entry in entries),
        **storage_facts(entries, _sizes(entries, files)),
        "stay_dense": stay_dense,
    }


def _write_index(folder: Path, files: Sequence[PlannedFile], encoding: Encoding) -> None:
    """The index of several files; of one there is none."""
    if len(files) == 1:
        return
    total = sum(slot.nbytes for file in files for slot in file.slots.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: file.name for file in files for n in file.slots}}
    path = folder / encoding.weights_file(len(files))
    path.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish_config(folder: Path, entries: Sequence[TensorEntry], quantization: JsonTable | None) -> str:
    """Put the dtype of the tensors into config.json, and how they are packed; the name of the model's class."""
    path = folder / CONFIG_FILE
    table = json.loads(path.read_text(encoding="utf-8"))
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    widths = {names[entry.dtype] for entry in entries if entry.dtype in names}
    table.pop("torch_dtype", None)  # its older name
    table["dtype"] = widths.pop() if len(widths) == 1 else "float32"
    for part in table.values():  # such as text_config
        if isinstance(part, dict) and part.get("dtype"):
            part["dtype"] = table["dtype"]
    if quantization is not None:
        table["quantization_config"] = quantization
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return (table.get("architectures") or [""])[0]


def _left_alone(linear: Sequence[str], entries: Sequence[TensorEntry]) -> list[str]:
    """The linear layers that are not rounded."""
    rounded = {entry.name.removesuffix(".weight") for entry in entries if entry.values}
    return [name for name in linear if name not in rounded]


def _counted(entries: Sequence[TensorEntry], files: Sequence[PlannedFile]) -> JsonTable:
    """Sparsity and sizes, as counted."""
    return {
        "sparsity_measured": measured_sparsity(entries),
        "dense_bf16_bytes": 2 * sum(entry.numel for entry in entries),
        "weight_bytes": sum(slot.nbytes for file in files for slot in file.slots.values()),
        "file_bytes": sum(file.nbytes for file in files),
    }


def _sizes(entries: Sequence[TensorEntry], files: Sequence[PlannedFile]) -> list[int]:
    nbytes = {name: slot.nbytes for file in files for name, slot in file.slots.items()}
    return [sum(nbytes[part.name] for part in entry.parts) for entry in entries]


def storage_facts(entries: Sequence[TensorEntry], sizes: Sequence[int]) -> JsonTable:
    """Return bits a weight, with scales and all else, and what rounding changed; ``sizes``: bytes of each tensor."""
    stored = list(zip(entries, sizes, strict=True))
    packed = [(entry, size) for entry, size in stored if entry.packing != DENSE]
    errors = [entry.rounding_error for entry in entries if entry.values]
    facts: JsonTable = {"bits_per_weight": _bits_per_weight(stored)}
    if packed:
        facts["packed_bits_per_weight"] = _bits_per_weight(packed)
    return facts | ({"rounded_tensors": len(errors), "largest_rounding_error": max(errors)} if errors else {})


def _bits_per_weight(stored: Sequence[tuple[TensorEntry, int]]) -> float:
    weights, nbytes = sum(entry.numel for entry, _ in stored), sum(size for _, size in stored)
    return round(8 * nbytes / max(weights, 1), 4)


def measured_sparsity(entries: Sequence[TensorEntry]) -> float:
    """Share of zeros in the pruned tensors; of a model that was pruned elsewhere, in the linear weights with zeros."""
    pruned = [entry for entry in entries if entry.origin == "pruned"]
    sparse = pruned or [entry for entry in entries if entry.pattern != DENSE]
    zeros = sum(entry.numel - entry.nonzero for entry in sparse)
    return zeros / sum(entry.numel for entry in sparse) if sparse else 0.0


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the weights, which have their own, and the card, which is for people to edit."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {n: file_sha256(folder / n) for n in names if n != CARD_FILE and not n.endswith(".safetensors")}
