"""Compare an export with the masked model of the run it came from: weights, logits, predictions, texts."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import ModelOutput

from pst_ds.cli.verify.rounded import cast_model, encoding_of_folder, narrower_dtypes, round_model
from pst_ds.cli.verify.vocabulary import same_tokens, tokens_of_folder, trim_model
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
"""One for each of the two computations of a logit."""
LINE_BYTES = 64
"""Alignment of the memory that torch allocates; a weight in a mapped file may begin anywhere."""


def compare_with_run(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Rebuild the masked training model and the export, and compare them on the same batches.

    With values on a grid, or in a dtype of fewer bits, the masked model is rounded first; what that changes is under
    "rounding". Inputs are not rounded, whatever the run trained with; what 8 bits change is under "inputs". Raises
    InputError.
    """
    encoding = encoding_of_folder(args.export)
    if encoding.packing in FOR_COMPRESSED_TENSORS:
        raise InputError(
            f"{args.export} is for {COMPRESSED_TENSORS}, which computes in its own way; --against compares the same "
            "codes in a folder of --format dense"
        )
    checkpoint = open_checkpoint(config, args.checkpoint)
    context = prepare_single(config, checkpoint)
    examples = context.load(args.split)
    if args.limit:
        examples = examples.first(args.limit)
    masked = _aligned(masked_model(context, checkpoint))
    with exact_inputs(masked) as rounds_inputs:
        compared, context, examples, plain = _compare_exact(args, context, examples, masked, encoding)
    if rounds_inputs:
        differences, metrics = _on_examples(context, examples, plain, masked)
        compared["inputs"] = {**differences, "metrics_as_trained": metrics}
    return compared


def _compare_exact(
    args: argparse.Namespace, context: RunContext, examples: ExampleSet, masked: nn.Module, encoding: Encoding
) -> tuple[dict[str, Any], RunContext, ExampleSet, nn.Module]:
    """Return what :func:`compare_with_run` says, what read the examples and these, and the export made dense."""
    trimmed: dict[str, Any] = {}
    if kept := tokens_of_folder(args.export):
        context, examples, trimmed = trimmed_to_export(args, context, examples, masked, kept)
    plain = _aligned(_loaded(context, args.export, "" if encoding.is_plain else "dense"))
    changed: dict[str, Any] = {}
    dtypes = narrower_dtypes(masked, args.export)
    if dtypes or encoding.is_quantized:
        differences, metrics = _on_examples(context, examples, plain, masked)
        changed = {"rounding": {**differences, "metrics_before": metrics}}
    cast_model(masked, dtypes)
    rounded = round_model(masked, args.export, context.run.model.path) if encoding.is_quantized else {}
    pairs = _weights_of_both(args, masked, plain, rounded)
    largest = LargestLogit(masked)
    differences, metrics = _on_examples(context, examples, largest, plain)
    dtype, inputs = next(plain.parameters()).dtype, max(w.shape[-1] for w, _ in pairs if w.dim())
    compared = {
        "examples": len(examples),
        "unit": context.task.unit,
        "compared_weights": len(pairs),
        "differing_weights": sum(not torch.equal(ours, theirs) for ours, theirs in pairs),
        **differences,
        "allowed_logit_difference": allowed_difference(dtype, len(pairs), inputs)[0] * largest.value,
        "metrics": metrics,
        **changed,
        **trimmed,
        **_compare_texts(context, examples, masked, plain),
    }
    if not encoding.is_plain:
        compared["kept_sparse"] = _compare_sparse(context, examples, masked, plain, args.export)
    return compared, context, examples, plain


def _weights_of_both(
    args: argparse.Namespace, masked: nn.Module, plain: nn.Module, rounded: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what ``masked`` multiplies with, the export's) of every weight that training changed, ``rounded`` and buffers.

    Raises InputError for an export that lacks one, or has it in another shape.
    """
    merged: dict[str, torch.Tensor] = {
        plain_name(name, layer): layer.masked_weight().view(layer.weight_shape)
        for name, layer in pst_layers(masked).items()
    }
    merged |= {f"{n}.weight": embedding.updated_weight() for n, embedding in pst_embeddings(masked).items()}
    merged = merged or dict(masked.named_parameters())  # method "dense" changes no module
    merged |= rounded | persistent_buffers(masked)
    loaded = {**dict(plain.named_parameters()), **persistent_buffers(plain)}
    foreign = [n for n, weight in merged.items() if n not in loaded or loaded[n].shape != weight.shape]
    if foreign:
        raise InputError(
            f"{args.export} has no {foreign[0]} such as the model of --against {args.run} has ({len(foreign)} weights "
            "differ in name or shape): it is the export of another model; name the run it came from"
        )
    return [(weight, loaded[n]) for n, weight in merged.items()]


def trimmed_to_export(
    args: argparse.Namespace, context: RunContext, examples: ExampleSet, masked: nn.Module, kept: list[int]
) -> tuple[RunContext, ExampleSet, dict[str, Any]]:
    """Trim ``masked`` to the tokens ``kept``; return what reads the examples as the export does, these, and what it
    changes."""
    outcomes = predict(masked, context, examples)
    after = trim_model(masked, context, args.export, kept)
    fewer = after.load(args.split)
    if args.limit:
        fewer = fewer.first(args.limit)
    found = {"tokens": len(kept), **same_tokens(context, examples, after, fewer, kept)}
    found["metrics_before"] = context.task.metrics(outcomes, examples)
    return after, fewer, {"vocabulary": found}


def _compare_texts(context: RunContext, examples: ExampleSet, masked: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """Count the differing texts of the two models, and score the export's if the libraries are installed.

    A text depends on every logit before it, so texts may differ where the order of sums varies, as on a GPU: they are
    not required to be equal. Returns nothing for tasks that write no text.
    """
    task = context.task
    if not isinstance(task, DataToText) or not isinstance(examples, Pairs):
        return {}
    ours, theirs = (
        task.write(model, examples, context.tokenizer, context.run.eval_batch_size, context.device)
        for model in (masked, plain)
    )
    return {
        "texts": len(theirs),
        "differing_texts": sum(one != other for one, other in zip(ours, theirs, strict=True)),
        "text_metrics": {} if missing_libraries() else task.text_metrics(theirs, examples),
    }


def _compare_sparse(
    context: RunContext, examples: ExampleSet, masked: nn.Module, plain: nn.Module, folder: str
) -> dict[str, Any]:
    """Compare the export with its weights kept packed: weights to the bit, logits up to rounding."""
    sparse = _loaded(context, folder, "sparse")
    layers, differing = sparse_layers(sparse), 0
    for name, layer in layers.items():
        if isinstance(layer, SparseExperts):
            experts: Any = plain.get_submodule(name.rpartition(".")[0])
            stack = plain.get_parameter(name)
            weight = (stack.transpose(1, 2) if experts.is_transposed else stack).flatten(0, 1)
        else:
            module: Any = plain.get_submodule(name)
            weight = module.weight.t() if is_conv1d(module) else module.weight
        differing += not torch.equal(layer.dense_weight().to(weight.device), weight)
    largest = LargestLogit(masked)
    differences, _ = _on_examples(context, examples, largest, sparse)
    dtype = next(plain.parameters()).dtype
    allowed, rule = allowed_difference(dtype, len(layers), max((n.in_features for n in layers.values()), default=1))
    return {
        "layers": len(layers),
        "differing_weights": differing,
        **differences,
        "allowed_logit_difference": allowed * largest.value,
        "rule": rule,
    }


def allowed_difference(dtype: torch.dtype, num_layers: int, inputs: int) -> tuple[float, str]:
    """Return how far two computations of the same logits may differ, as a share of the largest logit, and the formula.

    Each layer rounds its outputs by at most one unit, u = eps / 2, and independent errors add up like the square root
    of their number; there are two computations: 2 u sqrt(layers). An fp32 product is also summed in another order,
    which is one more rounding for each of its ``inputs``: times their square root. Products of bf16 and fp16 are
    summed in fp32, whose rounding is small next to theirs.
    """
    unit = torch.finfo(dtype).eps / 2
    share = ROUNDINGS * unit * math.sqrt(max(num_layers, 1))
    rule = f"{ROUNDINGS:g} x {unit:.3g} x sqrt({num_layers} layers)"
    if dtype in (torch.float32, torch.float64):
        share, rule = share * math.sqrt(inputs), f"{rule} x sqrt({inputs} inputs)"
    return share, f"{rule} x the largest logit"


class LargestLogit:
    """A model that remembers its largest logit."""

    def __init__(self, model: nn.Module):
        self._model, self.value = model, 0.0

    def __call__(self, **inputs: object) -> ModelOutput:
        result: ModelOutput = self._model(**inputs)
        self.value = max(self.value, float(result["logits"].abs().max()))
        return result


def _loaded(context: RunContext, folder: str, load_as: Literal["", "dense", "sparse"]) -> nn.Module:
    """Load the export with transformers; ``load_as``: "" for a dense folder, else what to do with packed weights."""
    options: dict[str, object] = {**attention_options(context.run)}
    if load_as:
        from pst_ds.inference.hf.config import PackedWeightsConfig  # a dense export is to load without it

        options["quantization_config"] = PackedWeightsConfig(load_as=load_as)
    dtype = DTYPES[context.run.train.precision]
    model = context.task.model_class().from_pretrained(folder, dtype=dtype, **options)
    model.config.use_cache = False  # with a cache transformers takes positions for those of one text
    keep_documents_apart(model)
    attach_saved_prompt(model, Path(folder))
    return model.to(context.device).eval()


def _aligned(model: nn.Module) -> nn.Module:
    """Align weights to lines of memory: where they are not, products are summed in another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % LINE_BYTES:
            tensor.data = tensor.data.clone()
    return model


def _on_examples(
    context: RunContext, examples: ExampleSet, one: Callable[..., object], other: Callable[..., object]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return how far the logits of two models differ, and the metrics of ``other``."""
    return compare(one, other, context, examples)
