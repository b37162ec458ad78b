"""Export a model for fewer tokens: embeddings and output layer keep only the rows of the remaining tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pst_ds.core.packings import DENSE
from pst_ds.data.vocabulary import Vocabulary, ids_in, renumbered
from pst_ds.formats import row_bits
from pst_ds.formats.base_weights import is_text_part, names_in_files
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.model_structure import is_inside_block
from pst_ds.nn.tables.embedding import PSTEmbedding
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.plan import Source, TensorJob, TensorValues

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Table = dict[str, object]


@dataclass(frozen=True, slots=True)
class RowSource:
    """Another source's values; tensors in ``names`` have only the rows ``kept``."""

    source: Source
    names: frozenset[str]
    kept: Sequence[int]

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs. Raises ExportError."""
        rows = torch.tensor(self.kept)
        for output, values in zip(job.outputs, self.source.make(job), strict=True):
            if output.name not in self.names:
                yield values
                continue
            scales: Tensor | None = None
            if values.scales is not None:
                scales = values.scales[rows]
            yield replace(values, tensor=values.tensor[rows], scales=scales)

    def job(self, job: TensorJob) -> TensorJob:
        """Return another source's job with fewer rows. Packed tensors are read, to count their values."""
        outputs = list(job.outputs)
        for i, output in enumerate(outputs):
            if output.name not in self.names:
                continue
            outputs[i] = replace(output, shape=(len(self.kept), *output.shape[1:]))
            if output.stored_values:
                # fewer rows have fewer non-zeros, and may no longer be worth packing
                tensor = list(self.make(job))[i].tensor.to(output.dtype)
                keep = row_bits(output.as_matrix(tensor).contiguous())
                dense = replace(outputs[i], packing=DENSE, stored_values=0, bitmask_shape=())
                outputs[i] = dense.packed(output.packing, output.grid, keep)
        return replace(job, outputs=tuple(outputs))


def with_fewer_rows(
    jobs: Sequence[TensorJob], source: Source, model: nn.Module, kept: Sequence[int]
) -> tuple[list[TensorJob], RowSource]:
    """Return the jobs and the source of an export of ``model`` with the tokens ``kept``. Raises ExportError."""
    params = _row_per_token(model, kept)
    names = frozenset({*params, *names_in_files(model, params)})
    trimmed = RowSource(source, names, kept)
    return [trimmed.job(job) for job in jobs], trimmed


def take_rows(model: nn.Module, kept: Sequence[int]) -> None:
    """Keep only the rows of the tokens ``kept`` in ``model``, in place; it may have PST modules. Raises ExportError."""
    rows = torch.tensor(kept)
    # a tied parameter has several names, and its rows are removed once
    distinct = {id(param): param for param in _row_per_token(model, kept).values()}
    for param in distinct.values():
        param.data = param.data[rows.to(param.device)]
    table = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(table, PSTEmbedding):
        # U has a row per token, and V a column per feature
        table.pst_U.data = table.pst_U.data[rows.to(table.pst_U.device)]
    if getattr(table, "padding_idx", None) is not None:
        table.padding_idx = list(kept).index(table.padding_idx)


def require_no_other_part(model: nn.Module, base: Path) -> None:
    """Raise ExportError if ``model`` is the text part of the model in the folder ``base``.

    The other parts place tokens of images or sounds, by ids that only the complete vocabulary has.
    """
    if is_text_part(model, base):
        raise ExportError(
            f"vocabulary: {base} has more than the text part, so its vocabulary must stay complete. Keep all tokens"
        )


def _row_per_token(model: nn.Module, kept: Sequence[int]) -> dict[str, nn.Parameter]:
    """Return the parameters with a row per token: embedding, output layer (tied or not), and biases outside the blocks.

    Raises ExportError if rows of them cannot be removed.
    """
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    rows = int(modules[0].weight.shape[0])
    if kept[-1] >= rows:
        raise ExportError(f"the tokenizer has token {kept[-1]}, but the model embeds only {rows} tokens")
    owned = set[int]()
    for module in modules:
        if module is not None:
            owned.update(id(param) for param in module.parameters())
    per_token: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if ".pst_" in name:
            continue  # factors, which have no row in the files
        # such as the bias of a masked language model, which is outside the output layer
        is_bias_per_token = tuple(param.shape) == (rows,) and not is_inside_block(name, model)
        if id(param) in owned or is_bias_per_token:
            per_token[name] = param
    layers = pst_layers(model)
    for name in per_token:
        # a mask and its budgets are for the rows that it was made for
        if name.rpartition(".")[0] in layers:
            raise ExportError(
                f"vocabulary: {name} has a row per token and is pruned, so its rows must stay. Keep all tokens"
            )
    for name, param in per_token.items():
        if param.shape[0] != rows:
            raise ExportError(
                f"vocabulary: {name} has {param.shape[0]} rows, and the embedding {rows}. Keep all tokens"
            )
    return per_token


def ids_of_model(model: nn.Module) -> set[int]:
    """Return the token ids in the configs of ``model``, which must be kept."""
    ids = ids_in(_settings(model))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ids |= ids_in(generation.to_dict())
    return ids


def write_vocabulary(folder: Path, model: nn.Module, vocabulary: Vocabulary, whole: "PreTrainedTokenizerBase") -> None:
    """Replace the ``whole`` tokenizer in ``folder`` by the trimmed one, and renumber the ids in the configs."""
    # all of them: a tokenizer.model that stays would be loaded in place of the trimmed tokenizer
    for name in whole.vocab_files_names.values():
        (folder / name).unlink(missing_ok=True)
    vocabulary.tokenizer.save_pretrained(folder)
    _renumber_file(folder / "config.json", _settings(model), vocabulary)
    path = folder / "generation_config.json"
    if path.is_file():
        _renumber_file(path, json.loads(path.read_text("utf-8")), vocabulary)


def _settings(model: nn.Module) -> _Table:
    return dict(model.config.to_dict())  # type: ignore[operator, union-attr]


def _renumber_file(path: Path, full: _Table, vocabulary: Vocabulary) -> None:
    """Renumber the ids in a config file; ``full`` includes settings that the file omits because they are defaults."""
    table = _changed(json.loads(path.read_text("utf-8")), full, renumbered(full, vocabulary))
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _changed(table: Mapping[str, object], full: Mapping[str, object], new: Mapping[str, object]) -> _Table:
    """Return ``table`` with the values that differ between ``full`` and ``new``."""
    merged: _Table = dict(table)
    for name, value in new.items():
        inner = merged.get(name)
        before = full[name]
        if isinstance(value, dict) and isinstance(inner, dict) and isinstance(before, dict):
            merged[name] = _changed(inner, before, value)
        elif value != before:
            merged[name] = value
    return merged
