"""Compare an export with the masked model of the run it came from: weights, logits, predictions, generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pst_ds.config.run import RunConfig
from pst_ds.core.packings import COMPRESSED_TENSORS, FOR_COMPRESSED_TENSORS
from pst_ds.data.tasks import ExampleSet
from pst_ds.data.tasks.data_to_text import DataToText, Pairs
from pst_ds.data.text_metrics import missing_libraries
from pst_ds.errors import InputError
from pst_ds.export.encoding import Encoding
from pst_ds.export.prompt_file import attach_saved_prompt
from pst_ds.inference.runtime import sparse_layers
from pst_ds.inference.runtime.experts import SparseExperts
from pst_ds.inference.verify.as_exported import (
    cast_model,
    count_same_tokens,
    encoding_of_folder,
    narrower_dtypes,
    quantise_model,
    tokens_of_folder,
    trim_model,
)
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.layer import exact_inputs
from pst_ds.nn.model_structure import is_conv1d
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.train.evaluate import compare, predict
from pst_ds.train.model import attention_options
from pst_ds.train.run import RunContext, masked_model, prepare_single
from pst_ds.train.run_folder import open_checkpoint
from pst_ds.train.sequences.documents import keep_documents_apart

ROUNDINGS = 2.0
"""Roundings of a logit: one for each of the two computations that are compared."""
LINE_BYTES = 64
"""Alignment of memory that torch allocates; weights in a mapped file may start anywhere."""


@dataclass(frozen=True, slots=True)
class RunToCompare:
    """A run, and the data to compare on."""

    config: RunConfig
    checkpoint: str
    split: str
    limit: int | None
    """Number of examples; None for all."""

    def examples(self, context: RunContext) -> ExampleSet:
        """Load the examples. Raises InputError."""
        found = context.load(self.split)
        return found.first(self.limit) if self.limit else found


@dataclass(frozen=True, slots=True)
class Rounding:
    """Effect of quantising, or casting, the masked model as the export was."""

    differing_predictions: int
    max_logit_difference: float
    metrics_before: dict[str, float]


@dataclass(frozen=True, slots=True)
class FewerTokens:
    """Effect of the export's smaller vocabulary."""

    tokens: int
    metrics_before: dict[str, float]
    same_tokens: int | None = None
    """Examples whose tokens did not change; None if examples are packed into sequences."""


@dataclass(frozen=True, slots=True)
class QuantisedInputs:
    """Effect of the int8 activations that the run was trained with."""

    differing_predictions: int
    max_logit_difference: float
    metrics_as_trained: dict[str, float]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts that both models generate.

    A text depends on every logit before it, so texts may differ where the order of sums varies, as on a GPU: they need
    not be equal.
    """

    texts: int
    differing_texts: int
    text_metrics: dict[str, float]
    """Scores of the export's texts; empty if the libraries are not installed."""


@dataclass(frozen=True, slots=True)
class KeptSparse:
    """The export with its weights kept packed, compared with the masked model."""

    layers: int
    differing_weights: int
    differing_predictions: int
    max_logit_difference: float
    allowed_logit_difference: float
    rule: str
    """Formula of the allowed difference."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An export compared with the masked model of its run."""

    examples: int
    unit: str
    """What the task counts: "examples", "tokens" and so on."""
    compared_weights: int
    differing_weights: int
    differing_predictions: int
    max_logit_difference: float
    """Largest absolute difference of a logit."""
    allowed_logit_difference: float
    metrics: dict[str, float]
    """Metrics of the export."""
    rounding: Rounding | None = None
    vocabulary: FewerTokens | None = None
    texts: Texts | None = None
    kept_sparse: KeptSparse | None = None
    """None for an ordinary dense folder."""
    inputs: QuantisedInputs | None = None

    @property
    def problem(self) -> str:
        """Why the export is not the trained model; "" if it is."""
        kept = self.kept_sparse
        if self.differing_weights or self.differing_predictions:
            return f"{self.differing_weights} weight tensors and {self.differing_predictions} predictions differ"
        if kept and kept.differing_weights:
            return f"kept sparse, {kept.differing_weights} weights differ"
        for how, result in (("", self), ("kept sparse, ", kept)):
            if result and not result.max_logit_difference <= result.allowed_logit_difference:  # also true for NaN
                return f"{how}its logits differ by more than rounding explains"
        return ""


@dataclass(frozen=True, slots=True)
class OnnxComparison:
    """An ONNX file compared with the masked model of a run, which is quantised in the same way and computes in fp32."""

    examples: int
    unit: str
    """What the task counts: "examples", "tokens" and so on."""
    differing_predictions: int
    """With int8 activations: compared with the model as trained."""
    max_logit_difference: float
    """Largest absolute difference of a logit, with 16-bit activations."""
    allowed_logit_difference: float
    metrics: dict[str, float]
    """Metrics of the file."""
    max_logit_difference_in_8_bits: float | None = None
    """The same difference with int8 activations, if the file has them."""

    @property
    def problem(self) -> str:
        """Why the file is not the model; "" if it is."""
        if not self.max_logit_difference <= self.allowed_logit_difference:  # also true for NaN
            return "its logits differ by more than rounding explains"
        return ""


def compare_with_run(folder: Path, run: RunToCompare) -> Comparison:
    """Rebuild the masked training model and load the export, and compare them on the same batches.

    The masked model is first quantised or cast as the export is; ``rounding`` has the effect. Activations are not
    quantised, also if the run was trained with int8 activations; ``inputs`` has their effect. Raises InputError.
    """
    encoding = encoding_of_folder(folder)
    if encoding.packing in FOR_COMPRESSED_TENSORS:
        raise InputError(
            f"{folder} is for {COMPRESSED_TENSORS}, which computes in its own way. Compare a --format dense export, "
            "which has the same quantised values"
        )
    checkpoint = open_checkpoint(run.config, run.checkpoint)
    context = prepare_single(run.config, checkpoint)
    examples = run.examples(context)
    masked = _aligned(masked_model(context, checkpoint))
    with exact_inputs(masked) as rounds_inputs:
        compared, context, examples, plain = _compare_exact(folder, run, context, examples, masked, encoding)
    if not rounds_inputs:
        return compared
    differing, largest, metrics = _on_examples(context, examples, plain, masked)
    return replace(compared, inputs=QuantisedInputs(differing, largest, metrics))


def _compare_exact(
    folder: Path, run: RunToCompare, context: RunContext, examples: ExampleSet, masked: nn.Module, encoding: Encoding
) -> tuple[Comparison, RunContext, ExampleSet, nn.Module]:
    """Compare without int8 activations; return also the final ``context`` and examples, and the dense export."""
    fewer, rounding = None, None
    if kept := tokens_of_folder(folder):
        context, examples, fewer = trimmed_to_export(folder, run, context, examples, masked, kept)
    plain = _aligned(_loaded(context, folder, "" if encoding.is_plain else "dense"))
    dtypes = narrower_dtypes(masked, folder)
    if dtypes or encoding.is_quantized:
        rounding = Rounding(*_on_examples(context, examples, plain, masked))
    cast_model(masked, dtypes)
    quantised = quantise_model(masked, folder, context.run.model.path) if encoding.is_quantized else {}
    pairs = _weights_of_both(folder, run, masked, plain, quantised)
    largest = LargestLogit(masked)
    differing, difference, metrics = _on_examples(context, examples, largest, plain)
    dtype, inputs = next(plain.parameters()).dtype, max(w.shape[-1] for w, _ in pairs if w.dim())
    compared = Comparison(
        examples=len(examples),
        unit=context.task.unit,
        compared_weights=len(pairs),
        differing_weights=sum(not torch.equal(ours, theirs) for ours, theirs in pairs),
        differing_predictions=differing,
        max_logit_difference=difference,
        allowed_logit_difference=allowed_difference(dtype, len(pairs), inputs)[0] * largest.value,
        metrics=metrics,
        rounding=rounding,
        vocabulary=fewer,
        texts=_compare_texts(context, examples, masked, plain),
        kept_sparse=None if encoding.is_plain else _compare_sparse(context, examples, masked, plain, folder),
    )
    return compared, context, examples, plain


def _weights_of_both(
    folder: Path, run: RunToCompare, masked: nn.Module, plain: nn.Module, quantised: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return (weight that ``masked`` multiplies with, the export's weight) for all trained and quantised weights.

    Persistent buffers are included. Raises InputError if the export lacks one, or has it in another shape.
    """
    merged: dict[str, Tensor] = {
        plain_name(name, layer): layer.masked_weight().view(layer.weight_shape)
        for name, layer in pst_layers(masked).items()
    }
    merged |= {f"{n}.weight": embedding.updated_weight() for n, embedding in pst_embeddings(masked).items()}
    merged = merged or dict(masked.named_parameters())  # method "dense" changes no module
    merged |= quantised | persistent_buffers(masked)
    loaded = {**dict(plain.named_parameters()), **persistent_buffers(plain)}
    foreign = [n for n, weight in merged.items() if n not in loaded or loaded[n].shape != weight.shape]
    if foreign:
        raise InputError(
            f"{folder} has no {foreign[0]} as in the model of --against {run.config.output_dir} ({len(foreign)} "
            "weights differ in name or shape): it is the export of another model. Name the run it came from"
        )
    return [(weight, loaded[n]) for n, weight in merged.items()]


def trimmed_to_export(
    folder: Path, run: RunToCompare, context: RunContext, examples: ExampleSet, masked: nn.Module, kept: list[int]
) -> tuple[RunContext, ExampleSet, FewerTokens]:
    """Trim ``masked`` to the tokens ``kept``; return the export's tokenizer and examples, and the effect."""
    outcomes = predict(masked, context, examples)
    after = trim_model(masked, context, folder, kept)
    fewer = run.examples(after)
    same = count_same_tokens(context, examples, after, fewer, kept)
    return after, fewer, FewerTokens(len(kept), context.task.metrics(outcomes, examples), same)


def _compare_texts(context: RunContext, examples: ExampleSet, masked: nn.Module, plain: nn.Module) -> Texts | None:
    """Let both models generate the texts of ``examples``; None for tasks without generation."""
    task = context.task
    if not isinstance(task, DataToText) or not isinstance(examples, Pairs):
        return None
    ours, theirs = (
        task.write(model, examples, context.tokenizer, context.run.eval_batch_size, context.device)
        for model in (masked, plain)
    )
    differing = sum(one != other for one, other in zip(ours, theirs, strict=True))
    return Texts(len(theirs), differing, {} if missing_libraries() else task.text_metrics(theirs, examples))


def _compare_sparse(
    context: RunContext, examples: ExampleSet, masked: nn.Module, plain: nn.Module, folder: Path
) -> KeptSparse:
    """Compare the export with its weights kept packed: weights exactly, logits up to rounding."""
    sparse = _loaded(context, folder, "sparse")
    layers, differing = sparse_layers(sparse), 0
    for name, layer in layers.items():
        if isinstance(layer, SparseExperts):
            experts: Any = plain.get_submodule(name.rpartition(".")[0])
            stack = plain.get_parameter(name)
            weight = (stack.transpose(1, 2) if experts.is_transposed else stack).flatten(0, 1)
        else:
            module = plain.get_submodule(name)
            weight = module.get_parameter("weight").t() if is_conv1d(module) else module.get_parameter("weight")
        differing += not torch.equal(layer.dense_weight().to(weight.device), weight)
    largest = LargestLogit(masked)
    predictions, difference, _ = _on_examples(context, examples, largest, sparse)
    dtype = next(plain.parameters()).dtype
    allowed, rule = allowed_difference(dtype, len(layers), max((n.in_features for n in layers.values()), default=1))
    return KeptSparse(len(layers), differing, predictions, difference, allowed * largest.value, rule)


def allowed_difference(dtype: torch.dtype, num_layers: int, inputs: int) -> tuple[float, str]:
    """Return how far two computations of the same logits may differ, relative to the largest logit, and the formula.

    Each layer rounds its outputs by at most one unit, u = eps / 2, and independent errors add up like the square root
    of their number; there are two computations: 2 u sqrt(layers). An fp32 product is also summed in another order,
    which is one more rounding per input: times sqrt(inputs). Products of bf16 and fp16 are summed in fp32, whose
    rounding errors are negligible in comparison.

    Args:
        dtype: dtype of the computation.
        num_layers: layers between the input and the logits.
        inputs: largest number of inputs of a layer.
    """
    unit = torch.finfo(dtype).eps / 2
    share = ROUNDINGS * unit * math.sqrt(max(num_layers, 1))
    rule = f"{ROUNDINGS:g} x {unit:.3g} x sqrt({num_layers} layers)"
    if dtype in (torch.float32, torch.float64):
        share, rule = share * math.sqrt(inputs), f"{rule} x sqrt({inputs} inputs)"
    return share, f"{rule} x the largest logit"


class LargestLogit:
    """A model that records its largest absolute logit."""

    def __init__(self, model: nn.Module):
        self._model, self.value = model, 0.0

    def __call__(self, **inputs: object) -> ModelOutput:
        result: ModelOutput = self._model(**inputs)
        self.value = max(self.value, float(result["logits"].abs().max()))
        return result


def _loaded(context: RunContext, folder: Path, load_as: Literal["", "dense", "sparse"]) -> nn.Module:
    """Load the export with transformers; ``load_as``: "" for an ordinary folder, else how to load packed weights."""
    options: dict[str, object] = {**attention_options(context.run)}
    if load_as:
        from pst_ds.inference.hf.config import PackedWeightsConfig  # ordinary folders must load without it

        options["quantization_config"] = PackedWeightsConfig(load_as=load_as)
    dtype = DTYPES[context.run.train.precision]
    model = context.task.model_class().from_pretrained(folder, dtype=dtype, **options)
    model.config.use_cache = False  # with a cache, transformers expects the positions of a single text
    keep_documents_apart(model)
    attach_saved_prompt(model, folder)
    return model.to(context.device).eval()


def _aligned(model: nn.Module) -> nn.Module:
    """Align weights to cache lines: otherwise products are summed in another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % LINE_BYTES:
            tensor.data = tensor.data.clone()
    return model


def _on_examples(
    context: RunContext, examples: ExampleSet, one: Callable[..., object], other: Callable[..., object]
) -> tuple[int, float, dict[str, float]]:
    """Return (differing predictions, largest logit difference, metrics of ``other``)."""
    found, metrics = compare(one, other, context, examples)
    return int(found["differing_predictions"]), found["max_logit_difference"], metrics
