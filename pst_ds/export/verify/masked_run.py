"""The masked model of a run, changed in place as its export was: trimmed to fewer tokens, cast, quantised."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import InputError
from pst_ds.export.reference import kl_from_folder
from pst_ds.formats.base_weights import BaseWeights, names_in_files, saved_tensors
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import plain_tensors
from pst_ds.nn.model_structure import is_conv1d
from pst_ds.nn.tables.embedding import UpdatedTable, updated_tables
from pst_ds.nn.tables.rounded import rounded_grid
from pst_ds.train.evaluate import Differences, compare, kl_divergence, predict
from pst_ds.train.resolved import ResolvedRun
from pst_ds.train.run import RunContext, masked_model, prepare_single
from pst_ds.writing.encoding import Encoding, ExportError, encoding_of
from pst_ds.writing.manifest import ExportedTensor, Facts, read_manifest
from pst_ds.writing.quantization import grids
from pst_ds.writing.trimmed_vocabulary import take_rows


@dataclass(frozen=True, slots=True)
class FewerTokens:
    """Effect of the export's smaller vocabulary."""

    tokens: int
    metrics_before: dict[str, float]
    same_tokens: int | None = None
    """Examples whose tokens did not change; None if examples are packed into sequences."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Predictions and logits of an export, compared with the masked model."""

    examples: int
    unit: str
    """Unit of the task's predictions: "examples", "tokens" and so on."""
    differing_predictions: int
    max_logit_difference: float
    """Largest absolute difference of a logit."""
    allowed_logit_difference: float
    metrics: dict[str, float]
    """Metrics of the export."""
    kl: dict[str, float] | None = None
    """Divergence from the model before quantisation or the cast; None without them, and of numbers."""
    kl_from_reference: dict[str, float] | None = None
    """Divergence from the model of another folder, if one was given."""

    @property
    def problem(self) -> str:
        """Why the export is not the trained model; "" if it is."""
        # in this direction, because a comparison with NaN is False
        if self.max_logit_difference <= self.allowed_logit_difference:
            return ""
        return "its logits differ by more than rounding explains"


@dataclass(slots=True)
class MaskedRun:
    """The masked training model of a run, and the examples on which it is compared with the export in ``folder``."""

    folder: Path
    split: str
    limit: int | None
    """Number of examples; None for all."""
    context: RunContext
    examples: ExampleSet
    model: nn.Module
    tensors: list[ExportedTensor]
    facts: Facts
    encoding: Encoding

    @classmethod
    def of(
        cls,
        folder: Path,
        resolved: ResolvedRun,
        checkpoint: Checkpoint,
        split: str,
        limit: int | None,
        encoding: Encoding | None,
    ) -> "MaskedRun":
        """Rebuild the model, and load the examples; ``encoding``: of a file that is not read. Raises InputError."""
        tensors: list[ExportedTensor] = []
        facts: Facts = {}
        if encoding is None:
            tensors, facts = read_manifest(folder)
            encoding = encoding_of(facts["kind"], facts)
        engine = encoding.storage.engine
        if facts and engine:
            raise InputError(
                f"{folder} is for {engine}, which computes in its own way. Compare a dense "
                "export, which has the same quantised values"
            )
        context = prepare_single(resolved)
        examples = _examples(context, split, limit)
        model = masked_model(context, checkpoint)
        return cls(
            folder=folder,
            split=split,
            limit=limit,
            context=context,
            examples=examples,
            model=model,
            tensors=tensors,
            facts=facts,
            encoding=encoding,
        )

    def metrics_of(self, model: Callable[..., object]) -> dict[str, float]:
        """Return the task's metrics of a model on the examples."""
        predictions = predict(model, self.context, self.examples)
        return self.context.task.metrics(predictions, self.examples)

    def compare(self, one: Callable[..., object], other: Callable[..., object]) -> Differences:
        """Compare the logits of two models on the examples; the metrics are those of ``other``."""
        return compare(one, other, self.context, self.examples)

    def kl_of(self, exported: Callable[..., object]) -> dict[str, float] | None:
        """Return how far the export's predictions are from those of the model; None for numbers."""
        if self.context.run.task_facts.no_teacher:
            return None
        return kl_divergence(self.model, exported, self.context, self.examples)

    def kl_from(self, reference: str | Path | None, exported: Callable[..., object]) -> dict[str, float] | None:
        """Return how far the export's predictions are from those of the folder ``reference``. Raises InputError."""
        if reference is None:
            return None
        if kept := self.facts.get("tokens_kept"):
            before = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
            raise InputError(
                f"reference = {str(reference)!r}: {self.folder} has {len(kept):,} of {before:,} tokens, so their "
                "distributions cannot be compared. Verify an export with all tokens"
            )
        return kl_from_folder(reference, exported, self.context, self.examples)

    def trim(self) -> FewerTokens | None:
        """Keep only the export's tokens, and tokenise as it does; None if it has all tokens. Raises ExportError."""
        kept = self.facts.get("tokens_kept")
        if not kept:
            return None
        before = self.context
        whole = self.examples
        metrics = self.metrics_of(self.model)
        tokenizer = type(before.tokenizer).from_pretrained(self.folder)
        # a larger id would read a row that the trimmed model does not have
        if max(tokenizer.get_vocab().values()) >= len(kept):
            raise ExportError(f"{self.folder}: the manifest has {len(kept)} tokens, and the tokenizer has more")
        take_rows(self.model, kept)
        self.context = before.with_tokenizer(tokenizer)
        self.examples = _examples(self.context, self.split, self.limit)
        if before.run.task_facts.packs_text or len(whole) != len(self.examples):
            # one longer or shorter text shifts all later sequences, so they cannot be paired
            return FewerTokens(len(kept), metrics)
        same = 0
        for i in range(len(whole)):
            # ids of the trimmed model are positions in the list of kept tokens
            renumbered_back = [kept[new] for new in _ids(self.context, self.examples, i)]
            same += renumbered_back == _ids(before, whole, i)
        return FewerTokens(len(kept), metrics, same)

    def narrower_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the export's tensors that are narrower than the model's, by plain name.

        ``pst-ds export --dtype bf16`` of a run in fp32 has such tensors.
        """
        tensors = plain_tensors(self.model)
        model_names = self._model_names()
        narrower = dict[str, torch.dtype]()
        for exported in self.tensors:
            name = model_names.get(exported.name)
            if name is None:
                continue
            dtype = exported.spec.dtype
            if tensors[name].is_floating_point() and dtype.itemsize < tensors[name].dtype.itemsize:
                narrower[name] = dtype
        return narrower

    def _model_names(self) -> dict[str, str]:
        """Return the name in the model of each tensor, by its names in the model and in files."""
        tensors = plain_tensors(self.model)
        model_names = names_in_files(self.model, tensors)
        for name in tensors.keys() - set(model_names.values()):  # saved as several tensors, such as single experts
            model_names |= dict.fromkeys(saved_tensors(self.model, {name: tensors[name]}), name)
        return model_names | {name: name for name in tensors}

    @torch.no_grad()
    def to_fp32(self) -> None:
        """Merge all updates and convert the model to fp32, with the frozen values that the export has.

        A run in bf16 rounds its frozen weights, such as embeddings and norms; the export has those of the base model's
        files. Masks stay.
        """
        compute_dtype = DTYPES[self.context.run.train.precision]
        for layer in pst_layers(self.model).values():
            if not layer.rounds:
                settle(layer, layer.masked_weight())
        # not self.model.float(): transformers raises for a model that was loaded with quantised weights
        nn.Module.float(self.model)
        base = BaseWeights(self.context.run.model.path, getattr(self.model, "base_model_prefix", ""))
        params = dict(self.model.named_parameters())
        model_names = self._model_names()
        kept = self.facts.get("tokens_kept")
        for tensor in self.tensors:
            name = model_names.get(tensor.name, "")
            source = base.find(name) or base.find(tensor.name)
            if tensor.origin != "base" or name not in params or source is None:
                continue
            param = params[name]
            stored = base.read(source)
            # only a table with a row per token has fewer rows in the export than in the base model
            if kept and stored.dim() == param.dim() and len(stored) > len(param) == len(kept):
                stored = stored[list(kept)]
            rounded = stored.to(compute_dtype).float()
            # a parameter that is not the rounded base was quantised in training, and has its final values already
            if rounded.shape == param.shape and torch.equal(rounded, param.cpu()):
                param.copy_(stored.to(tensor.spec.dtype))

    @torch.no_grad()
    def cast(self, dtypes: dict[str, torch.dtype]) -> None:
        """Round tensors to the values of ``dtypes``; they keep their own dtypes.

        Layers that were trained with quantisation stay unchanged.
        """
        layers = {plain_name(name, layer): layer for name, layer in pst_layers(self.model).items()}
        embeddings = {f"{name}.weight": embedding for name, embedding in updated_tables(self.model).items()}
        # buffers, too: an export in bf16 has all its tensors in bf16
        tensors = {**dict(self.model.named_parameters()), **persistent_buffers(self.model)}
        for name, dtype in dtypes.items():
            if name in layers:
                if not layers[name].rounds:
                    settle(layers[name], layers[name].masked_weight().to(dtype))
            elif name in embeddings:
                settle(embeddings[name], embeddings[name].updated_weight().to(dtype))
            else:
                tensors[name].copy_(tensors[name].to(dtype))

    @torch.no_grad()
    def quantise(self, *, in_fp32: bool = False) -> dict[str, Tensor]:
        """Quantise the weights that the export has quantised, and merge their updates. Masks stay.

        Layers and tables that were trained with quantisation stay unchanged. Frozen weights are read from the base
        model. ``in_fp32`` converts the quantised modules to fp32, which holds every value exactly; otherwise values are
        rounded to the model's dtype, which loading the export does too. Returns the quantised parameters of modules
        that are not pruned layers, by name.
        """
        by_name = {tensor.name: tensor for tensor in self.tensors}
        values = self.encoding.values
        layers = pst_layers(self.model)
        for name, layer in layers.items():
            if values is not None and not layer.rounds:
                _quantise_layer(layer, values, by_name.get(plain_name(name, layer)), in_fp32=in_fp32)
        if any(layer.rounds for layer in layers.values()):
            values = None  # the export leaves other linear layers unchanged
        base = BaseWeights(self.context.run.model.path, getattr(self.model, "base_model_prefix", ""))
        params = dict(self.model.named_parameters())
        embeddings = updated_tables(self.model)
        tables = self.encoding.embeddings
        if rounded_grid(self.model):
            tables = None  # trained with quantisation: they have their quantised values already
        quantised = dict[str, Tensor]()
        for name, grid in grids(self.model, values, tables).items():
            owner = name.removesuffix(".weight")
            exported = by_name.get(name)
            if owner in embeddings:
                weight = embeddings[owner].updated_weight()
                settle(embeddings[owner], _quantised(weight, grid, exported, in_fp32=in_fp32))
            elif name in params:
                module = self.model.get_submodule(owner)
                weight = _stored(params[name], name, base)
                if is_conv1d(module):
                    transposed = weight.t().contiguous()  # (I, O) to (O, I), since scales belong to outputs
                    weight = _quantised(transposed, grid, exported, in_fp32=in_fp32).t()
                else:
                    weight = _quantised(weight, grid, exported, in_fp32=in_fp32)
                if in_fp32:
                    nn.Module.float(module)
                # read again, since the conversion may have replaced the Parameter
                self.model.get_parameter(name).copy_(weight)
            else:
                continue  # the name in the files of a parameter that has another name in the model
            quantised[name] = self.model.get_parameter(name)
        return quantised


def without_document_mask(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run as an ONNX graph computes it: without position_ids, which a graph does not have."""
    run = resolved.run
    return resolved.with_run(replace(run, data=replace(run.data, document_mask=False)))


def settle(module: PSTLayer | UpdatedTable, weight: Tensor) -> None:
    """Make ``weight`` the whole weight, apart from the mask: the update becomes zero."""
    if weight.dtype == torch.float32:
        nn.Module.float(module)
    if isinstance(module, PSTLayer):
        module.hold(weight)
        module.drop_update()
    else:
        module.weight.copy_(weight)
        module.pst_U.zero_()


def _examples(context: RunContext, split: str, limit: int | None) -> ExampleSet:
    """Return the first ``limit`` examples of a split, or all."""
    examples = context.load(split)
    if limit:
        return examples.first(limit)
    return examples


def _ids(context: RunContext, examples: ExampleSet, index: int) -> list[int]:
    """Return the tokens of one example."""
    batch = context.task.collate(examples, [index], context.tokenizer)
    ids: list[int] = batch["input_ids"].flatten().tolist()
    return ids


def _quantise_layer(layer: PSTLayer, grid: Grid, exported: ExportedTensor | None, *, in_fp32: bool) -> None:
    """Quantise a layer's masked weight, or each expert of a stack, along its inputs."""
    is_transposed = layer.layout.transposed
    weight = layer.masked_weight().view(layer.weight_shape)
    if is_transposed:
        weight = weight.transpose(-1, -2)  # (..., outputs, inputs)
    weight = weight.contiguous()
    matrix = weight.flatten(0, -2)  # a stack of E experts: (E * outputs, inputs)
    weight = _quantised(matrix, grid, exported, in_fp32=in_fp32).view(weight.shape)
    if is_transposed:
        weight = weight.transpose(-1, -2)
    settle(layer, weight.contiguous())


def _stored(param: nn.Parameter, name: str, base: BaseWeights) -> Tensor:
    """Return the values that an export quantises: of a frozen parameter those in the base model's files.

    They may be fp32 although the run is in bf16.
    """
    if param.requires_grad:
        return param
    source = base.find(name)
    if source is None:
        return param
    _, shape = base.size(source)
    if shape != tuple(param.shape):  # trimmed to fewer tokens
        return param
    return base.read(source).to(param.device)


def _quantised(weight: Tensor, grid: Grid, exported: ExportedTensor | None, *, in_fp32: bool) -> Tensor:
    """Return the quantised values of ``weight`` (O, I), in fp32 or its own dtype."""
    unquantised = weight
    if exported is not None:
        # an export casts before it quantises
        unquantised = weight.to(exported.spec.dtype)
    # on the CPU, as exports quantise: a scale that another device rounds differently would change many values
    quantised = round_to_grid(unquantised.detach().float().cpu(), None, grid)
    if in_fp32:
        return quantised.to(weight.device, torch.float32)
    return quantised.to(weight.device, weight.dtype)
