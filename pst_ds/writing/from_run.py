"""A run's tensors for an export: W = (W0 + beta U V) . M, from the base model's files and a checkpoint."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.bits import all_ones
from pst_ds.core.coded_weight import CodedWeight, CodeLayout
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import (
    SCALE_DTYPE,
    Grid,
    Rounding,
    StoredGrid,
    dequantize,
    quantize,
    require_scales,
    scales_of_bytes,
)
from pst_ds.core.scores import masked_weight, merged_weight
from pst_ds.core.updates.rows import updated_rows
from pst_ds.formats import mask_row_bits
from pst_ds.formats.base_weights import BaseWeights, is_text_part, may_be_missing, names_in_files, saved_tensors
from pst_ds.formats.rows import row_counts
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import persistent_buffers, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import plain_tensors
from pst_ds.nn.model_structure import is_conv1d, is_linear
from pst_ds.nn.tables.coded import plain_tables
from pst_ds.nn.tables.embedding import UpdatedTable, updated_tables
from pst_ds.nn.tables.rounded import quantisable_tables, table_grid
from pst_ds.parallel.optimizer_state import MASTER
from pst_ds.writing.encoding import Encoding, ExportError
from pst_ds.writing.expert_stacks import FilePart, StackRun, all_experts, kept_experts, parts_in_files
from pst_ds.writing.plan import Origin, TensorJob, TensorSpec, TensorValues
from pst_ds.writing.quantization import grids


@dataclass(frozen=True, slots=True)
class RunRecipe:
    """Recipe for one tensor of the trained model."""

    name: str
    in_base: str | None
    """Name in the base model's files."""
    dtype: torch.dtype
    """Dtype of the result, before the cast to ``--dtype``."""
    trained: bool = False
    layer: tuple[StackRun, Constants] | None = None
    """Part of a pruned layer, and the layer's constants."""
    rows_in_base: tuple[tuple[str, int, int], ...] = ()
    """For a stack of experts: (tensor of the base's files, first row of the stack in it, last row + 1)."""
    grid: StoredGrid | None = None
    """Quantisation that the layer was trained with."""
    base: CodeLayout | None = None
    """Layout of the frozen weight, if the model held it quantised."""
    table: Grid | None = None
    """Quantisation that a table of :mod:`pst_ds.nn.tables.rounded` was trained with."""
    embedding_beta: float | None = None
    masked: bool = True
    """False if pruned values may be anything, because the packing does not read them."""
    kept: tuple[int, ...] = ()
    """Numbers of the experts in the tensor, if others were removed."""
    whole: WeightLayout | None = None
    """For a stack of ``kept`` experts: layout of the stack with all experts."""
    in_files_form: bool = False
    """True if transformers saves it as several tensors, or under another name."""


class RunSource:
    """Values of the model in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, base: BaseWeights, model: nn.Module):
        self._checkpoint = checkpoint
        self._base = base
        self._model = model
        self._compute_dtype = DTYPES[checkpoint.state.precision]

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs. Raises ExportError."""
        recipe = job.recipe
        assert isinstance(recipe, RunRecipe)
        if recipe.layer is not None:
            run, constants = recipe.layer
            values = self._pruned(recipe, run, constants)
            yield replace(values, tensor=values.tensor.view(job.outputs[0].shape))
        elif not recipe.in_files_form:
            yield self._unpruned(recipe)
        else:
            whole = self._unpruned(recipe)
            saved = saved_tensors(self._model, {recipe.name: whole.tensor})
            for output in job.outputs:
                # a copy, since transformers returns views, and the parts of a file must be contiguous
                yield replace(whole, tensor=saved.pop(output.name).clone(memory_format=torch.contiguous_format))

    def _unpruned(self, recipe: RunRecipe) -> TensorValues:
        """Make a tensor that is not pruned."""
        values = self._unrounded(recipe)
        if recipe.kept:
            return replace(values, tensor=values.tensor[list(recipe.kept)])
        if recipe.table is None:
            return values
        codes, scales = quantize(values.tensor.to(self._compute_dtype), None, recipe.table)
        rounded = dequantize(codes, scales, self._compute_dtype).to(recipe.dtype)
        return replace(values, tensor=rounded, scales=scales)

    def _unrounded(self, recipe: RunRecipe) -> TensorValues:
        """Make a tensor that is not pruned, before it is quantised as in training."""
        beta = recipe.embedding_beta
        trained = self._checkpoint.trained
        compute = self._compute_dtype
        if recipe.trained and beta is None:
            # the model computed with masters rounded to its precision, and its export has those values
            return TensorValues(trained[recipe.name].to(compute).to(recipe.dtype).contiguous())
        assert recipe.in_base is not None
        stored = self._base.read(recipe.in_base)
        if recipe.base is not None:
            # the model computed with the quantised table, so the export has its values, not those of the base
            weight = stored.to(compute)
            quantised = CodedWeight(recipe.base, *recipe.base.encode(weight, 0), compute).dense()
            return TensorValues(quantised.to(recipe.dtype))
        if beta is None:
            return TensorValues(stored.contiguous())
        owner = recipe.name.removesuffix(".weight")
        left = trained[f"{owner}.pst_U"].to(compute)  # (rows, r)
        right = trained[f"{owner}.pst_V"].to(compute)  # (r, width)
        return TensorValues(updated_rows(stored.to(compute), left, right, beta).to(recipe.dtype))

    def _pruned(self, recipe: RunRecipe, run: StackRun, constants: Constants) -> TensorValues:
        """Compute M . (W0 + beta U V) as the model did: same function, same dtype, same type of device."""
        if run.num_pieces == 1:
            return self._piece(recipe, run, constants, piece=run.first)
        height, width = run.piece.shape
        # filled piece by piece, so that memory holds the stack once, next to one piece
        tensor = torch.empty(run.num_pieces * height, width, dtype=recipe.dtype)
        keep = list[Tensor]()
        scales = list[Tensor]()
        pruned = list[int]()
        for i, piece in enumerate(range(run.first, run.last)):
            values = self._piece(recipe, run, constants, piece=piece)
            tensor[i * height : (i + 1) * height] = values.tensor
            pruned += values.pruned_per_matrix
            if values.keep is not None:
                keep.append(values.keep)
            if values.scales is not None:
                scales.append(values.scales)
        return TensorValues(
            tensor=tensor,
            keep=torch.cat(keep),
            pruned_per_matrix=tuple(pruned),
            scales=torch.cat(scales) if scales else None,
        )

    def _start(self, recipe: RunRecipe, run: StackRun, piece: int) -> Tensor:
        """Return W0 of a piece, or the weight that was trained in its place, in storage shape."""
        shape = run.piece.shape
        if recipe.trained:
            start, stop = run.share(run.stack.numel, piece)
            return self._checkpoint.values(recipe.name, MASTER, start, stop).view(shape)
        if not recipe.rows_in_base:
            return self._base.read(recipe.in_base or "")
        height = shape[0]
        first_row = piece * height
        last_row = first_row + height
        rows: list[Tensor] = []
        # a tensor of the files may have several pieces, or a piece several tensors
        for name, first_in_file, last_in_file in recipe.rows_in_base:
            first = max(first_in_file, first_row)
            last = min(last_in_file, last_row)
            if first < last:
                rows.append(self._base.read_rows(name, first - first_in_file, last - first_in_file))
        if len(rows) == 1:
            return rows[0]  # torch.cat would copy it
        return torch.cat(rows)

    def _piece(self, recipe: RunRecipe, run: StackRun, constants: Constants, piece: int) -> TensorValues:
        """Make one piece of a stack, or a whole layer."""
        checkpoint = self._checkpoint
        compute = self._compute_dtype
        owner = recipe.name.removesuffix(".weight")
        layout = run.piece
        if recipe.whole is not None:
            # the checkpoint has all experts; the piece is looked up among them
            run, piece = run.in_whole(piece, recipe.whole, recipe.kept)
        device = "cpu"
        if torch.accelerator.is_available():
            # products of another kind of device round differently
            device = checkpoint.state.device_type
        start = self._start(recipe, run, piece).to(compute).to(device)
        weight: Tensor | CodedWeight = start
        if recipe.base is not None:  # quantised in the same way when the layer was created
            base = replace(recipe.base, stored=StoredGrid(layout, recipe.base.stored.grid))
            weight = CodedWeight(base, *base.encode(start, 0), compute)
        # each "del" here frees a copy of the weight before the next step allocates another
        del start
        start_of_piece, end_of_piece = run.share(run.stack.numel, piece)
        mask = checkpoint.mask_bits(owner, start_of_piece, end_of_piece)
        factors = Factors.of(self._factors(owner, run, piece, device), constants.form)
        rounding: Rounding | None = None
        if recipe.grid is not None:
            rounding = self._rounding(owner, run=run, piece=piece, stored=recipe.grid, device=device)
        if recipe.masked:
            merged = masked_weight(
                weight,
                bits=mask.to(device),
                num_shards=1,
                layout=layout,
                factors=factors,
                constants=constants,
                rounding=rounding,
            )
        else:
            # the packing reads kept values only
            merged = merged_weight(weight, layout, factors, constants)
            if rounding is not None:
                merged = rounding.round_(merged)
        del weight
        merged = merged.cpu().to(recipe.dtype).contiguous()
        if recipe.masked:
            merged.add_(0.0)  # turns a kept -0.0 into +0.0
        keep = mask_row_bits(mask, layout)
        scales: Tensor | None = None
        if rounding is not None:
            scales = rounding.scales_by_output.cpu()
        return TensorValues(tensor=merged, keep=keep, pruned_per_matrix=_pruned_per_matrix(layout, keep), scales=scales)

    def _factors(self, owner: str, run: StackRun, piece: int, device: str) -> dict[str, Tensor]:
        """Return the factors of a piece, by name, in the dtype that the model computed with.

        They are all that the checkpoint has for the layer, so that no update form is known here.
        """
        checkpoint = self._checkpoint
        prefix = f"{owner}.pst_"
        factors: dict[str, Tensor] = {}
        for name, shape in checkpoint.contents.trained.items():
            if name.startswith(prefix):
                start, stop = run.share(math.prod(shape), piece)
                by_row = checkpoint.values(name, MASTER, start, stop).view(-1, *shape[1:])
                factors[name.removeprefix(prefix)] = by_row.to(device=device, dtype=self._compute_dtype)
        return factors

    def _rounding(self, owner: str, run: StackRun, piece: int, stored: StoredGrid, device: str) -> Rounding:
        """Return the quantisation that a piece was trained with. Raises ExportError for damaged scales."""
        checkpoint = self._checkpoint
        grid = StoredGrid(run.piece, stored.grid)
        num_bytes = SCALE_DTYPE.itemsize * math.prod(stored.shape)
        start, stop = run.share(num_bytes, piece)
        scales = scales_of_bytes(checkpoint.scale_bytes(owner, start, stop), grid.shape)
        try:
            require_scales(scales, grid.grid)
        except ValueError as error:
            raise ExportError(f"{checkpoint.folder}: {owner}: {error}. Choose another checkpoint") from None
        return Rounding(grid, scales.to(device))


def _pruned_per_matrix(layout: WeightLayout, keep: Tensor) -> tuple[int, ...]:
    """Return the number of pruned weights of each matrix, given the row bits of the kept ones."""
    kept_per_row = row_counts(keep)
    pruned: list[int] = []
    for matrix in layout.matrices():
        num_kept = int(kept_per_row[matrix.outputs].sum())
        pruned.append(matrix.rect.numel - num_kept)
    return tuple(pruned)


def plan_run(
    model: nn.Module,
    checkpoint: Checkpoint,
    base: BaseWeights,
    encoding: Encoding,
    dtype: str | None,
    whole: nn.Module | None = None,
) -> list[TensorJob]:
    """Return a job for every tensor that ``save_pretrained`` of the plain model would write, under its name there.

    ``model`` has PST modules, and may be on the meta device. If it is the text part of its base, all tensors of the
    base are included, under the base's names. ``dtype``: dtype to cast all tensors to. ``whole``: the model of the run,
    if ``model`` lacks the experts that it removed. Raises ExportError.
    """
    planner = _Planner(model=model, checkpoint=checkpoint, base=base, encoding=encoding, dtype=dtype, whole=whole)
    return list(planner.jobs())


class _Planner:
    """Plans an export of a run tensor by tensor: where its values come from, and how the export stores them."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        base: BaseWeights,
        encoding: Encoding,
        dtype: str | None,
        whole: nn.Module | None,
    ):
        self._model = model
        self._checkpoint = checkpoint
        self._base = base
        self._whole = model
        self._kept: dict[str, tuple[int, ...]] = {}
        if whole is not None:
            self._whole = whole
            self._kept = kept_experts(whole, checkpoint)
        self._whole_layers = pst_layers(self._whole)
        self._whole_tensors = plain_tensors(self._whole)
        self._state = checkpoint.state
        self._trained = checkpoint.contents.trained
        self._encoding = encoding
        self._cast: torch.dtype | None = None
        if dtype is not None:
            self._cast = DTYPES[dtype]
        values = encoding.values
        self._table_grid: Grid | None = None
        if checkpoint.state.rounds:
            self._table_grid = table_grid(model)
            if checkpoint.contents.value_grid:
                # other layers were trained without quantisation, and stay unchanged, so that the export computes what
                # was trained
                values = None
        self._grids = grids(model, values, encoding.embeddings)
        self._rounded = quantisable_tables(model) if self._table_grid else {}
        self._layers = pst_layers(model)
        self._embeddings = updated_tables(model)
        self._tables = plain_tables(model)
        self._tensors = plain_tensors(model)  # of plain tables
        self._linear = {name: module for name, module in model.named_modules() if is_linear(module)}
        self._buffers = persistent_buffers(model)
        self._keeps_rest = is_text_part(model, base.folder)

    def jobs(self) -> Iterator[TensorJob]:
        """Yield the jobs in the order of the model's tensors, and last the other tensors of a complete base."""
        tensors = self._tensors
        in_files = {name: saved for saved, name in names_in_files(self._model, tensors).items()}
        done: set[str] = set()
        for name, tensor in tensors.items():
            jobs = self._of_stack(name) if name in self._layers else self._jobs_of(name, tensor, in_files.get(name))
            for job in jobs:
                if all(output.name in done for output in job.outputs):
                    continue  # a tensor of the files that several layers are made of
                done.update(output.name for output in job.outputs)
                yield job
        if not self._keeps_rest:
            return
        for name in self._base.names:
            if name not in done:
                _, shape = self._base.size(name)
                yield self._job(name=name, in_base=name, out_name=name, shape=shape)

    def _jobs_of(self, name: str, tensor: Tensor, in_files: str | None) -> Iterator[TensorJob]:
        """Plan one tensor; ``in_files``: the name that ``save_pretrained`` gives it, None if it is split."""
        shape = tuple(tensor.shape)
        if name in self._base.names:
            # the base's files have the model's name for it, and so has the export
            yield self._job(name=name, in_base=name, out_name=name, shape=shape)
        elif in_files is None:
            yield from self._in_parts(name, saved_tensors(self._model, {name: tensor}))
        else:
            in_base = self._base.find(in_files) or self._base.find(name)
            # transformers computes some buffers itself, and saves no files with them
            is_computed = name in self._buffers and may_be_missing(self._model, name)
            if in_base or not is_computed:
                yield self._job(name=name, in_base=in_base, out_name=in_files, shape=shape)

    def _of_stack(self, name: str) -> Iterator[TensorJob]:
        """Plan a stack: packed as one tensor, or as the tensors of the base's files, such as a matrix per expert.

        GGUF files have stacks again, but are filled expert by expert.
        """
        layer = self._layers[name]
        parts = self._parts_of_stack(self._whole, name, self._whole_layers[name])
        recipe = self._recipe(f"{name}.weight", next(iter(parts)))
        recipe = replace(recipe, rows_in_base=tuple((at, *part.run.rows) for at, part in parts.items()))
        as_one = self._spec(recipe, name, layer.weight_shape)
        if as_one.form is not None and not self._encoding.storage.fills_stacks_by_expert:
            yield TensorJob((as_one,), replace(recipe, masked=not as_one.is_packed))
            return
        if recipe.kept:
            parts = self._named_parts(self._model, name, layer)
        for in_base, part in parts.items():
            out_name = in_base if self._keeps_rest else part.name
            out = replace(as_one, name=out_name, shape=part.shape)
            yield TensorJob((out,), replace(recipe, layer=(part.run, layer.constants)))

    def _named_parts(self, model: nn.Module, name: str, layer: PSTLayer) -> dict[str, FilePart]:
        """Return the tensors that ``save_pretrained`` makes of a stack, by their names. Raises ExportError."""
        if name in self._base.names:
            return {name: FilePart(name, all_experts(layer.layout), layer.weight_shape)}
        try:
            return {part.name: part for part in parts_in_files(model, name, layer.layout)}
        except ValueError as error:
            raise ExportError(
                f"{name} becomes {error} in the files of the model, which does not consist of whole experts. Exclude "
                f"it with exclude_modules = [{json.dumps(name)}]"
            ) from None

    def _parts_of_stack(self, model: nn.Module, name: str, layer: PSTLayer) -> dict[str, FilePart]:
        """Return the tensors that a stack consists of, by their names in the base's files. Raises ExportError."""
        parts = self._named_parts(model, name, layer)
        if name in parts:
            return parts
        by_name_in_base: dict[str, FilePart] = {}
        for part in parts.values():
            in_base = self._base.find(part.name)
            if in_base is None:
                raise ExportError(f"{part.name} is not in the base model {self._state.base_path!r}")
            _, shape = self._base.size(in_base)
            if shape != part.shape:
                raise ExportError(
                    f"{part.name} has shape {shape} in the base model, and {part.shape} in the trained model"
                )
            by_name_in_base[in_base] = part
        return by_name_in_base

    def _job(self, name: str, in_base: str | None, out_name: str, shape: tuple[int, ...]) -> TensorJob:
        """Plan the model's tensor ``name`` as ``out_name``; an export of a whole base uses the base's names."""
        recipe = self._recipe(name, in_base)
        if in_base and self._keeps_rest:
            out_name = in_base
        spec = self._spec(recipe, out_name, shape)
        return TensorJob((spec,), replace(recipe, masked=not spec.is_packed))

    def _recipe(self, name: str, in_base: str | None, dtype_of: str | None = None) -> RunRecipe:
        """Return how to make the tensor ``name``; ``dtype_of``: a tensor of the base with the dtype, if not in_base."""
        owner, _, last = name.rpartition(".")
        state = self._state
        trained = name in self._trained
        layer: PSTLayer | None = None
        embedding: UpdatedTable | None = None
        if last == "weight":
            layer = self._layers.get(owner)
            embedding = self._embeddings.get(owner)
        coded = self._tables.get(name)
        if layer is not None and layer.base_codes is not None:
            coded = layer.base_codes.layout
        if in_base is None and embedding is not None:
            raise ExportError(f"{name} is not in the base model {state.base_path!r}")
        if in_base is None and not trained:
            raise ExportError(f"{name} is neither trained nor in the base model {state.base_path!r}")
        is_computed = layer is not None or trained or embedding is not None or coded is not None
        dtype = self._dtype_of_values(in_base or dtype_of, is_computed=is_computed)
        kept = self._kept_of(name)
        base: CodeLayout | None = None
        if coded is not None:
            # one shard, because an export quantises the whole weight in one process
            base = replace(coded, num_shards=1)
        run: tuple[StackRun, Constants] | None = None
        grid: StoredGrid | None = None
        whole: WeightLayout | None = None
        if layer is not None:
            run = (all_experts(layer.layout), layer.constants)
            if state.rounds:
                grid = self._whole_layers[owner].stored_grid
            if kept:
                whole = self._whole_layers[owner].layout
        return RunRecipe(
            name=name,
            in_base=in_base,
            dtype=dtype,
            trained=trained,
            layer=run,
            grid=grid,
            table=self._table_grid if name in self._rounded else None,
            base=base,
            embedding_beta=None if embedding is None else embedding.beta,
            kept=kept,
            whole=whole,
        )

    def _dtype_of_values(self, stored: str | None, *, is_computed: bool) -> torch.dtype:
        """Return the dtype of a tensor: that of the tensor ``stored`` in the base.

        Computed values have the precision of the run, but are stored at least as wide as the base's, to keep files
        uniform.
        """
        compute = DTYPES[self._state.precision]
        if stored is None:
            return compute
        dtype, _ = self._base.size(stored)
        if is_computed:
            return torch.promote_types(compute, dtype)
        return dtype

    def _kept_of(self, name: str) -> tuple[int, ...]:
        """Return the experts in the model's tensor ``name``; () if none were removed from it."""
        plain = name
        if name not in self._whole_tensors:
            # the recipe of a stack has the name of its layer's weight, and the stack is a Parameter without this ending
            plain = name.removesuffix(".weight")
        for block, kept in self._kept.items():
            if name.startswith(f"{block}."):
                has_lost_experts = self._whole_tensors[plain].shape != self._tensors[plain].shape
                return kept if has_lost_experts else ()
        return ()

    def _spec(self, recipe: RunRecipe, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """Return the tensor that ``recipe`` makes, under its ``name`` in the export."""
        self._require_shape(recipe, shape)
        owner, _, last = recipe.name.rpartition(".")
        linear: nn.Module | None = None
        if last == "weight":
            linear = self._linear.get(owner)
        origin: Origin = "base"
        transposed = linear is not None and is_conv1d(linear)
        if recipe.layer is not None:
            transposed = recipe.layer[0].piece.transposed
            origin = "pruned"
        elif recipe.trained or recipe.embedding_beta is not None:
            origin = "trained"
        dtype = recipe.dtype
        if self._cast and recipe.dtype.is_floating_point:
            dtype = self._cast
        spec = TensorSpec(
            name=name,
            shape=shape,
            dtype=dtype,
            origin=origin,
            transposed=transposed,
            is_linear=linear is not None or recipe.layer is not None,
        )
        if recipe.layer is None:
            return spec.stored_as(self._encoding, self._grids.get(recipe.name))
        stack = recipe.layer[0].stack

        def bits(_: TensorSpec) -> Tensor:
            if recipe.kept:
                # experts that are kept are whole
                return mask_row_bits(all_ones(stack.numel, 1), stack)
            return mask_row_bits(self._checkpoint.masks[owner], stack)

        return spec.stored_as(self._encoding, self._encoding.values, bits)

    def _require_shape(self, recipe: RunRecipe, shape: tuple[int, ...]) -> None:
        """Raise ExportError unless the values of ``recipe`` have the shape of the trained model."""
        if (recipe.rows_in_base and not recipe.trained) or recipe.in_files_form:
            return  # checked by _parts_of_stack, or split by transformers
        if recipe.trained:
            stored = tuple(self._trained[recipe.name])
        else:
            _, stored = self._base.size(recipe.in_base or "")
        expected = shape
        if recipe.kept:
            # the rows of other experts are read, and dropped
            expected = tuple(self._whole_tensors[recipe.name].shape)
        if stored != expected:
            raise ExportError(
                f"{recipe.name} has shape {stored} in the base model or checkpoint, and {shape} in the trained "
                "model. Use the base model that the run was trained from"
            )

    def _in_parts(self, name: str, saved: dict[str, Tensor]) -> Iterator[TensorJob]:
        """Plan the tensor ``name``, which the base's files hold as the tensors ``saved``."""
        in_base = {part: self._base.find(part) for part in saved}
        if name.removesuffix(".weight") in self._layers:
            raise ExportError(
                f"{name} is built from {', '.join(saved)} by transformers, and cannot be split again once it is "
                f"pruned. Exclude it with exclude_modules = [{json.dumps(name.rpartition('.')[0])}]"
            )
        if self._kept_of(name):
            raise ExportError(
                f"{name} is stored as {', '.join(saved)}, from which no experts can be removed. Report it"
            )
        if name not in self._trained:
            for part, tensor in saved.items():
                stored = in_base[part]  # with all tensors that transformers makes of it
                shape = tuple(tensor.shape)
                if stored is not None:
                    _, shape = self._base.size(stored)
                yield self._job(name=part, in_base=stored, out_name=part, shape=shape)
            return
        # the parts of a tensor have one dtype in the base; the first one tells it
        first_in_base = next(iter(in_base.values()))
        recipe = replace(self._recipe(name, None, dtype_of=first_in_base), in_files_form=True)
        outputs: list[TensorSpec] = []
        for part, tensor in saved.items():
            outputs.append(self._spec(recipe, part, tuple(tensor.shape)))
        yield TensorJob(tuple(outputs), recipe)
