"""Export a run's checkpoint or a model folder as a folder of dense or packed weights, or as a GGUF file, atomically."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pst_ds.atomic_files import atomic_folder
from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.packings import DENSE
from pst_ds.core.quantization import Grid
from pst_ds.data.tokens.tokenize import open_tokenizer
from pst_ds.data.vocabulary import Vocabulary
from pst_ds.file_names import CARD_FILE
from pst_ds.formats.base_weights import BaseWeights, is_text_part
from pst_ds.nn.addition import SavedAddition, read_additions, saved_additions, write_additions
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.folder_facts import origin_of
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.model_structure import is_linear
from pst_ds.nn.tables.rounded import table_grid
from pst_ds.storage_format import EMBEDDINGS, VALUES, storage_format
from pst_ds.writing.encoding import Encoding, ExportError
from pst_ds.writing.from_folder import CONFIG_FILE, copy_small_files, open_folder, plan_folder
from pst_ds.writing.from_run import RunSource, plan_run
from pst_ds.writing.manifest import ExportedTensor, Facts, file_sums, write_manifest
from pst_ds.writing.model_card import model_card
from pst_ds.writing.plan import (
    SHARD_BYTES,
    PlannedFile,
    Source,
    TensorJob,
    all_outputs,
    plan_files,
    require_packed,
    require_space,
)
from pst_ds.writing.pruning_record import zeros_in_record
from pst_ds.writing.refilled import measured_sparsity, refilled_weights
from pst_ds.writing.trimmed_vocabulary import require_no_other_part, with_fewer_rows, write_vocabulary
from pst_ds.writing.write import write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SMALL = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Small files of the base model that ``save_pretrained`` of the tokenizer does not write."""
_SPARE_BYTES = 64 << 20
"""Free disk space to require in addition to the weights, for tokenizer, manifest and card."""
_KEPT_FACTS = (
    "step", "base_model", "base_fingerprint", "computed_in", "sparsity_requested", "metrics", "run", "tokens_kept",
)  # fmt: skip
"""Facts of a manifest that an export of the folder keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """Storage of an export."""

    packing: str = DENSE
    """Name of a storage format."""
    values: Grid | None = None
    """Quantisation of linear layers; None leaves them unchanged. Layers of a run that was trained with quantisation
    have its quantised values, unless ``dtype`` is set."""
    embeddings: Grid | None = None
    """Quantisation of embeddings and the output layer; None leaves them unchanged."""
    dtype: str | None = None
    """"bf16" or "fp32": cast all tensors; None keeps their dtypes."""
    shard_bytes: int = SHARD_BYTES
    """Size limit of a weight file."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """The model, tensors and other files of an export, and the facts for its manifest."""

    model: nn.Module
    jobs: list[TensorJob]
    source: Source
    facts: Facts
    write_small_files: Callable[[Path], None]
    """Writes config.json, the tokenizer and other small files."""
    recorded_zeros: dict[str, int] = field(default_factory=dict)
    """Zeros of each layer as ``pst-ds prune`` recorded them; empty for another source."""


def export_checkpoint(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    options: ExportOptions,
    *,
    vocabulary: Vocabulary | None = None,
    run: dict[str, object] | None = None,
    whole: PreTrainedModel | None = None,
) -> Facts:
    """Write the trained model in ``checkpoint`` to ``out``, a model folder or GGUF file, atomically.

    Pruned tensors have the values that the masked model multiplied with, and +0.0 where pruned. Other tensors are
    trained values, or have the base model's bytes.

    Args:
        model: the run's model, for names, shapes and config; may be on the meta device.
        vocabulary: ``tokenizer`` with fewer tokens; only their rows are written. None keeps all tokens.
        run: resolved run file, for the manifest.
        whole: the model with all experts, if the run has removed some and ``model`` lacks them.

    Raises ExportError.
    """
    options = options_as_trained(options, model, checkpoint)
    encoding = Encoding(options.packing, options.values, options.embeddings)
    # every check before the first byte is written, and the cheap ones first
    encoding.storage.require_free(out)
    base = BaseWeights(checkpoint.state.base_path, getattr(model, "base_model_prefix", ""))
    if vocabulary:
        require_no_other_part(model, base.folder)
    if whole is not None and is_text_part(model, base.folder):
        raise ExportError(
            f"{base.folder} has more than the text part, of which experts cannot be removed. Train its text part only"
        )
    jobs = plan_run(model=model, checkpoint=checkpoint, base=base, encoding=encoding, dtype=options.dtype, whole=whole)
    source = RunSource(checkpoint, base, model)
    facts = _facts_of_run(checkpoint, encoding, run)
    if whole is not None:
        # the sparsity of this run is the share of experts that it has removed; those it keeps are whole
        facts |= {"sparsity_requested": 0.0, "experts_removed": checkpoint.state.sparsity}
    additions = saved_additions(model, checkpoint.trained, DTYPES[checkpoint.state.precision])
    encoding.storage.require_additions_fit(additions, checkpoint.folder)
    write_small_files = partial(_write_small_files_of_run, model, base, tokenizer, additions)
    contents = _Contents(model=model, jobs=jobs, source=source, facts=facts, write_small_files=write_small_files)
    if vocabulary:
        contents = _trimmed(contents, tokenizer, vocabulary)
    return _write(contents, tokenizer, out, encoding=encoding, options=options)


def _facts_of_run(checkpoint: Checkpoint, encoding: Encoding, run: dict[str, object] | None) -> Facts:
    """Return the facts that a manifest has about a run and its checkpoint."""
    state = checkpoint.state
    metrics: dict[str, float | None] = {}
    for name, value in state.metrics.items():
        # JSON has no NaN or infinity
        metrics[name] = value if math.isfinite(value) else None
    facts: Facts = {
        "kind": encoding.packing,
        "step": state.step,
        "base_model": state.base_path,
        "base_fingerprint": state.base_fingerprint,
        "computed_in": state.precision,
        "sparsity_requested": state.sparsity,
        "metrics": metrics,
        "run": run,
    }
    origin = origin_of(state.base_path)
    if origin != state.base_path:
        facts["pruned_from"] = origin
    return facts


def _write_small_files_of_run(
    model: PreTrainedModel,
    base: BaseWeights,
    tokenizer: PreTrainedTokenizerBase,
    additions: Mapping[str, SavedAddition],
    folder: Path,
) -> None:
    """Write the config, the base's small files, the tokenizer and the additions to ``folder``."""
    write_additions(folder, additions)
    if is_text_part(model, base.folder):
        # the export has all tensors of the base, so its config is that of the base
        base.copy_if_there(CONFIG_FILE, folder)
    else:
        # a copy, because the caller's model would otherwise change
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    for name in _SMALL:
        base.copy_if_there(name, folder)
    tokenizer.save_pretrained(folder)


def export_folder(
    source: Path,
    out: Path,
    options: ExportOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: Vocabulary | None = None,
) -> Facts:
    """Write a dense model folder with pruned weights, or one of our packed folders, to ``out``, atomically.

    Weights are bit-identical, except for a packed -0.0, which becomes +0.0, and for weights that ``options`` quantises.
    Weights that are quantised in that way already stay unchanged.

    Args:
        tokenizer: the folder's tokenizer, required with ``vocabulary``.
        vocabulary: ``tokenizer`` with fewer tokens; only their rows are written. None keeps all tokens.

    Raises ExportError.
    """
    encoding = Encoding(options.packing, options.values, options.embeddings)
    encoding.storage.require_free(out)
    if out.resolve() == source.resolve():
        raise ExportError(f"out = {str(out)!r} is the folder to read. Name another folder")
    folder = open_folder(source)
    additions = read_additions(source)
    encoding.storage.require_additions_fit(additions, source)
    jobs, origin = plan_folder(folder, encoding, options.dtype)
    facts: Facts = {"kind": encoding.packing}
    for key in _KEPT_FACTS:
        facts[key] = folder.facts.get(key)
    facts["metrics"] = facts["metrics"] or {}  # the model card lists them
    if "pruned_from" in folder.facts:
        facts["pruned_from"] = folder.facts["pruned_from"]
    recorded_zeros: dict[str, int] = {}
    if not folder.facts:
        # an export keeps the pruning record of its source, which its own manifest supersedes
        recorded_zeros = zeros_in_record(folder.path)

    def write_small_files(out: Path) -> None:
        copy_small_files(folder.path, out)
        write_additions(out, additions)

    contents = _Contents(
        model=folder.model,
        jobs=jobs,
        source=origin,
        facts=facts,
        write_small_files=write_small_files,
        recorded_zeros=recorded_zeros,
    )
    if vocabulary:
        assert tokenizer is not None
        contents = _trimmed(contents, tokenizer, vocabulary)
    elif encoding.storage.writes_one_file:
        tokenizer = open_tokenizer(source, str(source), "Name a folder with a tokenizer")
    return _write(contents, tokenizer, out, encoding=encoding, options=options)


def _trimmed(contents: _Contents, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> _Contents:
    """Return ``contents`` with the rows, the tokenizer and the ids of ``vocabulary``. Raises ExportError."""
    model = contents.model

    def write_small_files(folder: Path) -> None:
        contents.write_small_files(folder)
        # after the others, since it replaces the files of the complete tokenizer
        write_vocabulary(folder, model, vocabulary, tokenizer)

    jobs, source = with_fewer_rows(contents.jobs, contents.source, model, vocabulary.kept)
    before = contents.facts.get("tokens_kept")
    if before and vocabulary.kept[-1] >= len(before):
        raise ExportError(f"the manifest has {len(before)} tokens, and the tokenizer has more. Export the model again")
    kept = list(vocabulary.kept)
    if before:
        # the folder was trimmed already: these are ids in the tokenizer before both
        kept = [before[old] for old in vocabulary.kept]
    return _Contents(
        model=model,
        jobs=jobs,
        source=source,
        facts={**contents.facts, "tokens_kept": kept},
        write_small_files=write_small_files,
        recorded_zeros=contents.recorded_zeros,
    )


def options_as_trained(options: ExportOptions, model: PreTrainedModel, checkpoint: Checkpoint) -> ExportOptions:
    """Return ``options`` with the quantisation that the run was trained with, if the format supports it.

    Raises ExportError for another quantisation.
    """
    if not checkpoint.state.rounds:
        return options
    values = _as_trained(VALUES, checkpoint.contents.value_grid, options.values, options)
    embeddings = _as_trained(EMBEDDINGS, table_grid(model), options.embeddings, options)
    return replace(options, values=values, embeddings=embeddings)


def _as_trained(option: str, trained: Grid | None, requested: Grid | None, options: ExportOptions) -> Grid | None:
    """Return the quantisation of "values" or "embeddings": by default the run's, if the format supports it.

    Raises ExportError for another quantisation than the run's.
    """
    if trained is None:
        return requested
    if requested is None:
        # a cast asks for floats, and formats without codes have them anyway
        has_codes = option in storage_format(options.packing).quantises
        if options.dtype is None and has_codes:
            return trained
        return None
    if requested != trained:
        raise ExportError(
            f"the export asks for {requested}, and the run was trained with {trained}. Quantising again loses "
            f"accuracy. Leave {option} and group unset, or write floats with dtype"
        )
    return requested


def _write(
    contents: _Contents,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    encoding: Encoding,
    options: ExportOptions,
) -> Facts:
    """Write ``out`` as a folder or a GGUF file; return the facts, counts and sizes."""
    jobs = contents.jobs
    source = contents.source
    storage = encoding.storage
    if storage.writes_one_file:
        written = storage.write_file(jobs, source, contents.model.config, tokenizer, out, encoding)
        return contents.facts | written
    stay_dense = require_packed(jobs, encoding)
    files = plan_files(jobs, encoding.stem, options.shard_bytes)
    file_bytes = sum(file.nbytes for file in files)
    require_space(out, file_bytes + _SPARE_BYTES)
    with atomic_folder(out) as folder:
        tensors = write_tensors(folder, files, jobs, source)
        _write_index(folder, files, encoding)
        contents.write_small_files(folder)
        left_alone: list[str] = []
        if storage.lists_unquantised:
            left_alone = _unquantised(contents.model, tensors)
        # a compressed bitmask is a row of bytes
        compressed = any(len(output.bitmask_shape) == 1 for output in all_outputs(jobs))
        quantization = encoding.quantization_config(len(files), left_alone, compressed=compressed)
        architecture = _finish_config(folder, tensors, quantization)
        refilled = refilled_weights(contents.model, tensors, contents.recorded_zeros)
        sizes = _stored_sizes(tensors, files)
        measured = storage_facts(tensors, sizes)
        facts: Facts = {
            "kind": encoding.packing,
            **encoding.facts(),
            "architecture": architecture,
            **contents.facts,
            "sparsity_measured": measured_sparsity(tensors, refilled),
            "dense_bf16_bytes": 2 * sum(tensor.numel for tensor in tensors),
            "weight_bytes": sum(sizes),
            "file_bytes": file_bytes,
        }
        if encoding.is_quantized:
            facts |= measured
        if left_alone:
            facts["left_alone"] = left_alone
        if refilled:
            facts["refilled"] = refilled
        # the manifest last, since it has the SHA-256 of every other file but the card
        (folder / CARD_FILE).write_text(model_card(out.name, facts), encoding="utf-8")
        write_manifest(folder, tensors, {**facts, **file_sums(folder)})
    # the report is printed, and a run file is long
    facts.pop("run", None)
    return {**facts, "export_dir": str(out), **tensor_counts(tensors), **measured, "stay_dense": stay_dense}


def _stored_sizes(tensors: Sequence[ExportedTensor], files: Sequence[PlannedFile]) -> list[int]:
    """Return the bytes of all parts of each tensor in the files."""
    nbytes: dict[str, int] = {}
    for file in files:
        nbytes |= {name: slot.nbytes for name, slot in file.slots.items()}
    sizes: list[int] = []
    for tensor in tensors:
        sizes.append(sum(nbytes[part.name] for part in tensor.parts))
    return sizes


def tensor_counts(tensors: Sequence[ExportedTensor]) -> dict[str, int]:
    """Return the numbers of tensors, of pruned ones and of packed ones."""
    num_pruned = 0
    num_packed = 0
    for tensor in tensors:
        num_pruned += tensor.origin == "pruned"
        num_packed += tensor.spec.is_packed
    return {"tensors": len(tensors), "pruned_tensors": num_pruned, "packed_tensors": num_packed}


def _write_index(folder: Path, files: Sequence[PlannedFile], encoding: Encoding) -> None:
    """Write the index, if there are several files."""
    if len(files) == 1:
        return
    total = 0
    weight_map: dict[str, str] = {}
    for file in files:
        for name, slot in file.slots.items():
            total += slot.nbytes
            weight_map[name] = file.name
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / encoding.weights_file(len(files))
    path.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish_config(folder: Path, tensors: Sequence[ExportedTensor], quantization: dict[str, object] | None) -> str:
    """Write dtype and packing of the tensors into config.json; return the name of the model's class."""
    path = folder / CONFIG_FILE
    table = json.loads(path.read_text(encoding="utf-8"))
    names = {str(tensor.spec.dtype).removeprefix("torch.") for tensor in tensors}
    floats = names & {"bfloat16", "float16", "float32"}
    table.pop("torch_dtype", None)  # the older name of "dtype"
    # loading in fp32 holds the values of all of them exactly
    table["dtype"] = "float32"
    if len(floats) == 1:
        table["dtype"] = floats.pop()
    for part in table.values():  # such as text_config
        if isinstance(part, dict) and part.get("dtype"):
            part["dtype"] = table["dtype"]
    if quantization is not None:
        table["quantization_config"] = quantization
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return (table.get("architectures") or [""])[0]


def _unquantised(model: nn.Module, tensors: Sequence[ExportedTensor]) -> list[str]:
    """Return the linear layers that are not quantised."""
    quantised = {tensor.name.removesuffix(".weight") for tensor in tensors if tensor.values}
    unquantised: list[str] = []
    for name, module in model.named_modules():
        # a pruned layer is a linear layer again when the export is loaded
        is_layer = is_linear(module) or isinstance(module, PSTLinear)
        if is_layer and name not in quantised:
            unquantised.append(name)
    return unquantised


def storage_facts(tensors: Sequence[ExportedTensor], sizes: Sequence[int]) -> dict[str, float]:
    """Return the bits per weight, including scales and positions, and the quantisation error.

    ``sizes``: stored bytes of each tensor.
    """
    weights = 0
    packed_weights = 0
    packed_bytes = 0
    has_packed = False
    errors: list[float] = []
    for tensor, size in zip(tensors, sizes, strict=True):
        weights += tensor.numel
        if tensor.spec.is_packed:
            has_packed = True
            packed_weights += tensor.numel
            packed_bytes += size
        if tensor.values:
            errors.append(tensor.rounding_error)
    facts: dict[str, float] = {"bits_per_weight": _bits_per_weight(sum(sizes), weights)}
    if has_packed:
        facts["packed_bits_per_weight"] = _bits_per_weight(packed_bytes, packed_weights)
    if errors:
        facts["rounded_tensors"] = len(errors)
        facts["largest_rounding_error"] = max(errors)
    return facts


def _bits_per_weight(nbytes: int, weights: int) -> float:
    """Return the bits of one of the ``weights`` that ``nbytes`` hold; 4 decimals, because reports print it."""
    return round(8 * nbytes / max(weights, 1), 4)
