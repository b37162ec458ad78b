"""Compare an export with the masked model of its run: weights, logits, predictions, accuracy lost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.errors import InputError
from pst_ds.export.reference import load_folder
from pst_ds.export.verify.masked_run import Compared, FewerTokens, MaskedRun, without_document_mask
from pst_ds.hf.config import LoadAs
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.model_structure import is_conv1d
from pst_ds.nn.router import pst_routers
from pst_ds.nn.tables.embedding import updated_tables
from pst_ds.runtime import sparse_layers
from pst_ds.runtime.experts import SparseExperts
from pst_ds.storage_format import storage_format
from pst_ds.train.resolved import ResolvedRun
from pst_ds.writing.encoding import Encoding
from pst_ds.writing.manifest import Facts
from pst_ds.writing.to_folder import ExportOptions

ROUNDINGS = 2.0
"""Roundings of a logit: one for each of the two computations that are compared."""
LINE_BYTES = 64
"""Alignment of memory that torch allocates; weights in a mapped file may start anywhere."""

MEASURED_TOKENS = 1 << 14
"""Tokens of the first validation examples on which the accuracy lost is measured; at least one example."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """Effect of quantising, or casting, the masked model as the export was."""

    differing_predictions: int
    max_logit_difference: float
    metrics_before: dict[str, float]


@dataclass(frozen=True, slots=True)
class KeptSparse:
    """The export with its weights kept packed, compared with the masked model."""

    layers: int
    differing_weights: int
    differing_predictions: int
    max_logit_difference: float
    allowed_logit_difference: float


@dataclass(frozen=True, kw_only=True)
class Comparison(Compared):
    """An export compared with the masked model of its run."""

    compared_weights: int
    differing_weights: int
    rounding: Rounding | None = None
    vocabulary: FewerTokens | None = None
    kept_sparse: KeptSparse | None = None
    """None for an ordinary dense folder."""

    @property
    def problem(self) -> str:
        """Why the export is not the trained model; "" if it is."""
        kept = self.kept_sparse
        if self.differing_weights or self.differing_predictions:
            return f"{self.differing_weights} weight tensors and {self.differing_predictions} predictions differ"
        if kept and kept.differing_weights:
            return f"kept sparse, {kept.differing_weights} weights differ"
        if kept and not kept.max_logit_difference <= kept.allowed_logit_difference:  # also true for NaN
            return super().problem or "kept sparse, its logits differ by more than rounding explains"
        return super().problem


def compare_with_run(
    folder: Path,
    resolved: ResolvedRun,
    checkpoint: Checkpoint,
    split: str,
    limit: int | None,
    reference: str | Path | None,
) -> Comparison:
    """Rebuild the masked training model and load the export, and compare them on the same batches.

    The masked model is first quantised or cast as the export is; ``rounding`` and ``kl`` have the effect. Raises
    InputError.
    """
    run = MaskedRun.of(folder=folder, resolved=resolved, checkpoint=checkpoint, split=split, limit=limit, encoding=None)
    _align(run.model)
    encoding = run.encoding
    fewer = run.trim()
    plain = _loaded(run, "dense")
    kl_from_reference = run.kl_from(reference, plain)
    # compared with the tensors of the model before the cast below
    dtypes = run.narrower_dtypes()
    rounding: Rounding | None = None
    kl: dict[str, float] | None = None
    if dtypes or encoding.is_quantized:
        # before the masked model is changed below
        changed = run.compare(plain, run.model)
        rounding = Rounding(changed.predictions, changed.logit, changed.metrics)
        kl = run.kl_of(plain)
    run.cast(dtypes)
    quantised: dict[str, Tensor] = {}
    if encoding.is_quantized:
        quantised = run.quantise()
    pairs = _weights_of_both(run, plain, quantised)
    differences = run.compare(run.model, plain)
    dtype = next(plain.parameters()).dtype
    num_differing, longest_row = _compare_weights(pairs)
    allowed = allowed_difference(dtype, num_layers=len(pairs), inputs=longest_row)
    kept_sparse: KeptSparse | None = None
    if not encoding.is_plain:
        kept_sparse = _compare_sparse(run, plain)
    return Comparison(
        examples=len(run.examples),
        unit=run.context.task.unit,
        compared_weights=len(pairs),
        differing_weights=num_differing,
        differing_predictions=differences.predictions,
        max_logit_difference=differences.logit,
        allowed_logit_difference=allowed * differences.largest_logit,
        metrics=differences.metrics,
        kl=kl,
        kl_from_reference=kl_from_reference,
        rounding=rounding,
        vocabulary=fewer,
        kept_sparse=kept_sparse,
    )


@torch.no_grad()
def quantisation_loss(out: Path, resolved: ResolvedRun, checkpoint: Checkpoint, storage: ExportOptions) -> Facts:
    """Return metrics of the run ("trained") and of its export ``out`` ("exported"), and how they were computed ("by").

    transformers or ONNX Runtime loads the file. GGUF and compressed-tensors need other engines: in place of such a
    file, the trained model gets the same quantised weights. Raises InputError, also for unreadable data.
    """
    kind = storage_format(storage.packing)
    foreign: Encoding | None = None
    if kind.runtime:
        resolved = without_document_mask(resolved)
    elif kind.engine:
        foreign = Encoding(storage.packing, storage.values, storage.embeddings)
    run = MaskedRun.of(
        folder=out, resolved=resolved, checkpoint=checkpoint, split="validation", limit=None, encoding=foreign
    )
    tokens_up_to = np.cumsum(run.examples.lengths)
    # the limit is kept in the run, because trimming tokenises the examples again
    run.limit = max(1, int(np.searchsorted(tokens_up_to, MEASURED_TOKENS, "right")))
    run.examples = run.examples.first(run.limit)
    trained = run.metrics_of(run.model)
    run.trim()
    if kind.runtime:
        by = kind.runtime
        exported = run.metrics_of(kind.model_of(out))
    elif foreign:
        run.quantise()
        by = "its weights in the trained model"
        exported = run.metrics_of(run.model)
    else:
        by = "transformers"
        exported = run.metrics_of(_loaded(run, "dense"))
    return {
        "examples": len(run.examples),
        "unit": run.context.task.unit,
        "trained": trained,
        "exported": exported,
        "by": by,
    }


def _weights_of_both(run: MaskedRun, plain: nn.Module, quantised: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (weight that the masked model multiplies with, the export's) for all trained and quantised weights.

    Persistent buffers are included. Raises InputError if the export lacks one, or has it in another shape.
    """
    merged = _merged_weights(run.model)
    if not merged:
        # method "dense" changes no module
        merged = dict(run.model.named_parameters())
    merged |= quantised | persistent_buffers(run.model)
    loaded = {**dict(plain.named_parameters()), **persistent_buffers(plain)}
    _take_kept_experts(run.model, merged, loaded)
    foreign: list[str] = []
    for name, weight in merged.items():
        if name not in loaded or loaded[name].shape != weight.shape:
            foreign.append(name)
    if foreign:
        raise InputError(
            f"{run.folder} has no {foreign[0]} as in the model of against = {run.context.run.output_dir!r} "
            f"({len(foreign)} weights differ in name or shape). Name the run it came from"
        )
    return [(weight, loaded[name]) for name, weight in merged.items()]


def _compare_weights(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Return (number of pairs of weights that differ, most inputs of a weight)."""
    num_differing = 0
    longest_row = 0
    for ours, theirs in pairs:
        # exactly: an export has the values that the masked model multiplies with
        num_differing += not torch.equal(ours, theirs)
        if ours.dim():  # a buffer may be a number
            longest_row = max(longest_row, ours.shape[-1])
    return num_differing, longest_row


def _merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the masked weights of pruned layers and the updated tables, in their shapes and by their plain names."""
    merged: dict[str, Tensor] = {}
    for name, layer in pst_layers(model).items():
        merged[plain_name(name, layer)] = layer.masked_weight().view(layer.weight_shape)
    for name, table in updated_tables(model).items():
        merged[f"{name}.weight"] = table.updated_weight()
    return merged


def _take_kept_experts(model: nn.Module, merged: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    """Reduce tensors in ``merged`` to the experts that the run has not removed, where ``loaded`` has only these."""
    for router in pst_routers(model).values():
        # the router and the experts are next to each other in a block
        block = f"{router.experts.rpartition('.')[0]}."
        for name, weight in merged.items():
            if not name.startswith(block) or name not in loaded:
                continue
            if weight.shape[0] == router.num_embeddings != loaded[name].shape[0]:
                merged[name] = weight[router.kept]


def _compare_sparse(run: MaskedRun, plain: nn.Module) -> KeptSparse:
    """Compare the export with its weights kept packed: weights exactly, logits up to rounding."""
    sparse = _loaded(run, "sparse")
    layers = sparse_layers(sparse)
    differing = 0
    weight: Tensor
    for name, layer in layers.items():
        # both branches bring the dense weight into the orientation of packed ones: outputs x inputs
        if isinstance(layer, SparseExperts):
            stack: Tensor = plain.get_parameter(name)
            experts = plain.get_submodule(name.rpartition(".")[0])
            if experts.is_transposed:
                stack = stack.transpose(1, 2)
            weight = stack.flatten(0, 1)  # (experts * outputs, inputs)
        else:
            module = plain.get_submodule(name)
            weight = module.get_parameter("weight")
            if is_conv1d(module):
                weight = weight.t()
        differing += not torch.equal(layer.dense_weight().to(weight.device), weight)
    differences = run.compare(run.model, sparse)
    dtype = next(plain.parameters()).dtype
    inputs = max((layer.in_features for layer in layers.values()), default=1)
    allowed = allowed_difference(dtype, num_layers=len(layers), inputs=inputs)
    return KeptSparse(
        layers=len(layers),
        differing_weights=differing,
        differing_predictions=differences.predictions,
        max_logit_difference=differences.logit,
        allowed_logit_difference=allowed * differences.largest_logit,
    )


def allowed_difference(dtype: torch.dtype, num_layers: int, inputs: int) -> float:
    """Return how far two computations of the same logits may differ, relative to the largest logit.

    Each of ``num_layers`` rounds its outputs by at most one unit, u = eps / 2, and independent errors add up like the
    square root of their number; there are two computations: 2 u sqrt(layers). An fp32 product is also summed in another
    order, which is one more rounding for each of at most ``inputs``: times sqrt(inputs). Products of bf16 and fp16 are
    summed in fp32, whose rounding errors are negligible in comparison.
    """
    unit = torch.finfo(dtype).eps / 2
    share = ROUNDINGS * unit * math.sqrt(max(num_layers, 1))
    if dtype in (torch.float32, torch.float64):
        share *= math.sqrt(inputs)
    return share


def _loaded(run: MaskedRun, load_as: LoadAs) -> nn.Module:
    """Load the export with transformers; an ordinary folder needs no ``load_as``."""
    fix = f"Its model is not that of against = {run.context.run.output_dir!r}. Name the run it came from"
    model = load_folder(run.folder, run.context, load_as, fix)
    # logits of packed layers are compared up to rounding, which allows for another order of sums
    if load_as != "sparse":
        _align(model)
    return model


def _align(model: nn.Module) -> None:
    """Align weights to cache lines: otherwise products are summed in another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        # a copy is in memory that torch allocates, which is aligned
        if tensor.data_ptr() % LINE_BYTES:
            tensor.data = tensor.data.clone()
