"""Export a run or a model folder in any format: the function behind ``pst-ds export``."""

import json
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.run import RunConfig
from pst_ds.config.settings import Positive, Section, settings
from pst_ds.config.toml import dump_run, load_run_or_folder
from pst_ds.core.packings import DENSE, VALUE_BITS
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.data.tokens.tokenize import open_tokenizer
from pst_ds.data.vocabulary import Vocabulary, trim
from pst_ds.errors import InputError
from pst_ds.export.export_checks import (
    require_place,
    require_pruned,
    require_representable,
    require_update_fits,
    require_vocabulary,
)
from pst_ds.file_names import RUN_FILE
from pst_ds.formats.hub import downloaded
from pst_ds.nn.addition import read_additions
from pst_ds.storage_format import StorageFormat, listed_formats, storage_format
from pst_ds.train.evaluate import evaluation_batches
from pst_ds.train.resolved import ResolvedRun
from pst_ds.train.run_folder import open_trained
from pst_ds.writing.expert_stacks import kept_experts
from pst_ds.writing.from_folder import CONFIG_FILE, model_of
from pst_ds.writing.manifest import Facts
from pst_ds.writing.plan import SHARD_BYTES
from pst_ds.writing.to_folder import ExportOptions, export_checkpoint, export_folder, options_as_trained
from pst_ds.writing.trimmed_vocabulary import ids_of_model, require_no_other_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEN = "seen"
"""Value of ``vocabulary`` for the tokens in a run's training and validation data."""
_BATCH = 1024
"""Examples or lines that are tokenised together."""


def _as_group(value: object) -> object:
    """Convert a number that is written as text, as an option of the command line is."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value


def _require_listed(name: str) -> str:
    """Return the name of a storage format that users choose. Raises ValueError for another."""
    known = listed_formats()
    if name not in known:
        raise ValueError(f"format = {name!r} must be one of {', '.join(map(repr, known))}")
    return name


def _formats_with_plain_variant() -> list[str]:
    """Return the names of formats that ``plain`` applies to, in quotes."""
    names: list[str] = []
    for name, storage in listed_formats().items():
        if storage.has_plain_variant:
            names.append(f'"{name}"')
    return names


@settings
class ExportSettings(Section):
    """Settings of an export, named like the options of ``pst-ds export``.

    Raises ConfigError, which names fields; the command line names its flags instead.
    """

    format: Annotated[str, AfterValidator(_require_listed)] = DENSE
    """Storage of the weights (docs/how-to/export.md), by the name of a storage format."""
    values: Literal["int8", "int4", "bf16"] | None = None
    """Linear layers inside the blocks: "int8" or "int4" quantises them; "bf16" casts every tensor of the model."""
    embeddings: Literal["int8", "int4"] | None = None
    """Embeddings and the output layer: "int8" or "int4"."""
    group: Annotated[Literal[32, 64, 128, "row"] | None, BeforeValidator(_as_group)] = None
    """Weights of a row per scale: 32, 64, 128 or "row"; default: "row" for int8, 64 for int4, and 32 for GGUF."""
    dtype: Literal["bf16", "fp32"] | None = None
    """"bf16" or "fp32": cast every tensor."""
    vocabulary: str | None = None
    """Keep only the tokens in this text file, or with "seen" those in a run's training and validation data."""
    activation_bits: Literal[8, 16] = 16
    """8 or 16: activations of quantised products in ONNX, or of int8 layers in compressed-tensors."""
    plain: bool = False
    """With format "onnx": dense fp32 weights and standard operators only."""
    shard_bytes: Positive = SHARD_BYTES
    """Size limit of a weight file."""

    def problems(self) -> Iterator[str]:
        storage = self.storage
        if self.plain and not storage.has_plain_variant:
            with_variant = " or ".join(_formats_with_plain_variant())
            yield f'plain = true is for format = {with_variant}, not for format = "{self.format}". Remove plain = true'
        if self.shard_bytes != SHARD_BYTES and not storage.has_weight_files:
            yield (
                f'shard_bytes = {self.shard_bytes} is for folders of weight files, not for format = "{self.format}". '
                "Remove shard_bytes"
            )
        yield from storage.problems_of_settings(self)
        if self.group and self.values not in VALUE_BITS and self.embeddings not in VALUE_BITS:
            yield (
                f'group = {self.group!r} is for quantised values. Set values = "int8" or "int4", or embeddings = '
                '"int8" or "int4"'
            )
        if self.values == "bf16" and self.dtype not in (None, "bf16"):
            yield f'values = "bf16" and dtype = "{self.dtype}" both cast every tensor. Remove one of them'
        if storage.needs_no_values(self):
            return
        try:
            options = self.options()
        except InputError as error:
            yield str(error)
            return
        if problem := storage_format(options.packing).problem(options.values, options.embeddings):
            yield problem

    @property
    def storage(self) -> StorageFormat:
        """The storage format's class."""
        return storage_format(self.format)

    def options(self) -> ExportOptions:
        """Return the storage of the export. Raises InputError for an unknown quantisation."""
        group = self.group or self.storage.default_group
        values: Grid | None = None
        embeddings: Grid | None = None
        dtype: str | None = self.dtype
        if self.values == "bf16":
            # a cast of every tensor, which users write where they would write "int8"
            dtype = "bf16"
        try:
            if self.values in VALUE_BITS:
                values = grid_of(self.values, group)
            if self.embeddings in VALUE_BITS:
                embeddings = grid_of(self.embeddings, group)
            packing = self.storage.variant_for(self.activation_bits)
        except ValueError as error:
            raise InputError(str(error)) from None
        return ExportOptions(
            packing=packing, values=values, embeddings=embeddings, dtype=dtype, shard_bytes=self.shard_bytes
        )


def require_run_fits(run: RunConfig, out: str | Path, settings: ExportSettings) -> None:
    """Check what :func:`export_run` can check without a checkpoint, for callers that open one first.

    Raises InputError if ``out`` cannot be written, or if ``settings`` do not fit ``run``.
    """
    require_place(Path(out), settings.format)
    require_vocabulary(settings.vocabulary, SEEN)
    require_update_fits(run, settings.format)
    require_pruned(run, settings.format, plain=settings.plain)


def export_run(
    run: RunConfig | str | Path | ResolvedRun,
    out: str | Path,
    settings: ExportSettings | None = None,
    *,
    checkpoint: str | Checkpoint = "best",
) -> Facts:
    """Export a checkpoint of a run, atomically.

    Args:
        run: the run, as its config, its folder, its run file, or resolved with the classes of the checkpoint.
        out: folder to write; for GGUF a file.
        settings: format, quantisation and so on; None writes a dense folder.
        checkpoint: "best", "final", another name in the run's ``checkpoints/``, or an opened checkpoint.

    Returns counts, sizes and sparsity. Raises InputError.
    """
    settings = settings or ExportSettings()
    if isinstance(run, str | Path):
        run = load_run_or_folder(run)
    config = run.run if isinstance(run, ResolvedRun) else run
    # the cheap checks first: opening the checkpoint reads files and may download the base model's config
    require_run_fits(config, out, settings)
    resolved, opened = open_trained(run, checkpoint)
    model = resolved.shapes.model_to_export()
    require_representable(model, settings.format)
    if settings.vocabulary:
        # the weights are written from the same folder later, so a download for this check is not in vain
        require_no_other_part(model, downloaded(opened.state.base_path))
    settings.storage.require_additions_fit(config.additions, opened.folder)
    export = partial(_export_resolved, resolved, opened)
    if _is_converted(settings):
        return _convert(export, Path(out), settings)
    return export(Path(out), settings)


def _export_resolved(resolved: ResolvedRun, checkpoint: Checkpoint, out: Path, settings: ExportSettings) -> Facts:
    """Export ``checkpoint`` in a format that is not converted from another; see :func:`export_run`."""
    tokenizer = resolved.require_tokenizer()
    model = resolved.shapes.model_to_export()
    options = options_as_trained(settings.options(), model, checkpoint)
    whole: PreTrainedModel | None = None
    # all blocks keep equally many experts, because a config has one number of experts; the first tells it
    kept = next(iter(kept_experts(model, checkpoint).values()), ())
    if kept:
        # the export has fewer experts than the trained model, whose shapes tell which rows to read
        whole = model
        model = resolved.with_experts(len(kept)).shapes.model_to_export()
    vocabulary: Vocabulary | None = None
    if settings.vocabulary:
        if settings.vocabulary == SEEN:
            tokens = _tokens_of_splits(resolved)
        else:
            tokens = _tokens_of_file(settings.vocabulary, tokenizer)
        vocabulary = trim(tokenizer, tokens | ids_of_model(model))
    # through TOML and JSON, so that the manifest has plain values only, and those that a run file would have
    run_table = json.loads(json.dumps(tomllib.loads(dump_run(resolved.run))))
    report = export_checkpoint(
        model=model,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        out=out,
        options=options,
        vocabulary=vocabulary,
        run=run_table,
        whole=whole,
    )
    report["checkpoint"] = str(checkpoint.folder)
    return _with_token_count(report)


def export_model_folder(source: str | Path, out: str | Path, settings: ExportSettings | None = None) -> Facts:
    """Export a model folder with pruned weights, or one of our packed folders, atomically; see :func:`export_run`."""
    settings = settings or ExportSettings()
    source = Path(source)
    require_place(Path(out), settings.format, source)
    if settings.vocabulary == SEEN:
        raise InputError(
            f'vocabulary = "seen": {source} is a model folder, which has no training data. Name a text file'
        )
    require_vocabulary(settings.vocabulary, SEEN)
    require_representable(model_of(source), settings.format)
    settings.storage.require_additions_fit(read_additions(source, with_tensors=False), source)
    if _is_converted(settings):
        export = partial(export_model_folder, source)
        return _convert(export, Path(out), settings)
    tokenizer: PreTrainedTokenizerBase | None = None
    vocabulary: Vocabulary | None = None
    if settings.vocabulary:
        tokenizer = open_tokenizer(source, str(source), "Name a folder with a tokenizer")
        tokens = _tokens_of_file(settings.vocabulary, tokenizer)
        vocabulary = trim(tokenizer, tokens | ids_of_model(model_of(source)))
    report = export_folder(source, Path(out), settings.options(), tokenizer=tokenizer, vocabulary=vocabulary)
    return _with_token_count(report)


def is_model_folder(source: Path) -> bool:
    """Return whether ``source`` is a model folder, not a run folder or file. Raises InputError for other folders."""
    if not source.is_dir() or (source / RUN_FILE).is_file():
        return False
    if not (source / CONFIG_FILE).exists():
        raise InputError(
            f"{str(source)!r} is not a run folder: {RUN_FILE} is missing; nor a model folder: {CONFIG_FILE} is missing "
            f"(looked in {source.absolute()})"
        )
    return True


def _is_converted(settings: ExportSettings) -> bool:
    """Return whether the format is made from a folder in another format."""
    return settings.storage.made_from(plain=settings.plain) != settings.format


def _convert(export: Callable[[Path, ExportSettings], Facts], out: Path, settings: ExportSettings) -> Facts:
    """Export to a temporary folder with ``export``, and convert it to ``out``."""
    with tempfile.TemporaryDirectory(prefix="pst-ds-") as scratch:
        packed = Path(scratch) / out.name
        source_format = settings.storage.made_from(plain=settings.plain)
        # plain and activation_bits are for the conversion; other formats would refuse them
        how = replace(settings, format=source_format, plain=False, activation_bits=16)
        facts = export(packed, how)
        return settings.storage.convert(packed, out, dict(facts), settings)


def _with_token_count(report: Facts) -> Facts:
    """Replace the list of kept tokens by their number."""
    if kept := report.pop("tokens_kept", None):
        report["tokens"] = len(kept)
    return report


def _tokens_of_splits(resolved: ResolvedRun) -> set[int]:
    """Return the tokens of the training and validation data, truncated as in training."""
    task = resolved.task
    tokenizer = resolved.require_tokenizer()
    splits = ["train"]
    if resolved.run.data.validation:
        splits.append("validation")
    tokens = set[int]()
    for split in splits:
        examples = resolved.load(split)
        # collated as in training, because templates and special tokens add tokens that no example contains
        for indices in evaluation_batches(examples.lengths, _BATCH, mixed=task.pads):
            batch = task.collate(examples, indices, tokenizer)
            tokens.update(batch["input_ids"].unique().tolist())
    return tokens


def _tokens_of_file(path: str, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens of the lines of a text file. Raises InputError."""
    tokens = set[int]()
    try:
        # with "-sig", which omits the byte order mark that some editors write before the first word
        with Path(path).open(encoding="utf-8-sig") as file:
            # in batches, which a tokenizer processes in parallel, and so that a large file need not fit in memory
            while lines := [line.rstrip("\n") for line in islice(file, _BATCH)]:
                tokens.update(*tokenizer(lines)["input_ids"])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"vocabulary = {path!r} cannot be read: {error}. Name a UTF-8 file with one text per line, or "
            'vocabulary = "seen"'
        ) from None
    return tokens
