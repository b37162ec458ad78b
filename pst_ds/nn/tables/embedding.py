"""Frozen tables with a low-rank update and no mask: PSTEmbedding, and the base class of other tables."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from pst_ds.config.pst import PSTConfig
from pst_ds.core.forms.low_rank import update_init_std
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.core.updates.rows import row_gradients, updated_rows
from pst_ds.nn.layer import seeded_normal
from pst_ds.nn.linear import LIBRARY
from pst_ds.nn.model_structure import modules_of
from pst_ds.nn.targets import places_by_module, put
from pst_ds.parallel import sharding

LIBRARY.define("updated_rows(Tensor ids, Tensor weight, Tensor left, Tensor right, float beta, int? padding) -> Tensor")
LIBRARY.define(
    "row_gradients(Tensor ids, Tensor grad_y, Tensor left, Tensor right, float beta, int? padding) -> (Tensor, Tensor)"
)


class UpdatedTable(nn.Module):
    """Base class of modules that compute with rows of W0 + beta U V.

    Parameters, for n rows of width d and update rank r: ``weight`` (n, d), frozen; ``pst_U`` (n, r), initially 0, so
    that rows without training data keep their pretrained values; ``pst_V`` (r, d), normal.
    """

    padding_idx: int | None = None
    """Row that is never trained."""

    def __init__(self, name: str, weight: nn.Parameter, config: PSTConfig, rank: int):
        super().__init__()
        self.beta = config.beta
        self.bypassed = False
        """True while only W0 is used; see :func:`pst_ds.nn.inject.bypassed`."""
        self.grid: Grid | None = None
        """Quantisation of the rows that are looked up; see :func:`pst_ds.nn.tables.rounded.round_tables`."""
        self.num_embeddings, self.embedding_dim = sharding.full_shape(weight)
        self.weight = weight
        std = update_init_std(config, self.embedding_dim)
        values = seeded_normal((rank, self.embedding_dim), std, f"{config.seed or 0}/{name}/V")
        self.pst_U = nn.Parameter(weight.new_zeros(self.num_embeddings, rank))
        self.pst_V = nn.Parameter(values.to(weight))

    @property
    def num_factor_parameters(self) -> int:
        return sharding.full_numel(self.pst_U) + sharding.full_numel(self.pst_V)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the updated rows of numbers (...,): (..., d), with a gradient of U and V."""
        return _UpdatedRows.apply(ids, self, self.pst_U, self.pst_V)

    def updated_weight(self) -> Tensor:
        """Return W0 + beta U V, (n, d): the rows that ``forward`` uses. The parameters must be gathered."""
        rows = updated_rows(self.weight.detach(), self.pst_U.detach(), self.pst_V.detach(), self.beta)
        if self.grid is None:
            return rows
        return round_to_grid(rows, None, self.grid)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, update_rank={sharding.full_shape(self.pst_V)[0]}"


class PSTEmbedding(UpdatedTable):
    """Replacement of an ``nn.Embedding`` that adopts its ``weight`` Parameter: y = (W0 + beta U V)[ids].

    This is LoRA of an embedding (PEFT initialises it the same way); the row of the padding index is never trained.
    """

    def __init__(self, name: str, base: nn.Embedding, config: PSTConfig):
        super().__init__(name, base.get_parameter("weight"), config, config.update_rank)
        self.padding_idx = base.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Map row numbers (...,) to rows (..., d)."""
        if self.bypassed:
            return functional.embedding(ids, self.weight)
        if not torch.compiler.is_compiling():
            return self.rows(ids)
        if self.grid is not None or sharding.is_partitioned(self.pst_U):
            return torch.compiler.disable(self.rows)(ids)
        return torch.ops.pst_ds.updated_rows(ids, self.weight, self.pst_U, self.pst_V, self.beta, self.padding_idx)


def replace_embeddings(model: nn.Module, found: Mapping[str, nn.Embedding], config: PSTConfig) -> None:
    """Replace the embeddings ``found`` in ``model`` by PSTEmbedding. Collective under ZeRO-3."""
    if not found:
        return
    places = places_by_module(model)
    for name, module in found.items():
        embedding = PSTEmbedding(name, module, config)
        sharding.split_as(embedding.get_parameter("weight"), embedding.parameters(recurse=False))
        put(embedding.train(module.training), places[module])


def pst_embeddings(model: nn.Module) -> dict[str, PSTEmbedding]:
    """Return the updated embeddings of ``model`` by name, in model order."""
    return modules_of(model, PSTEmbedding)


def updated_tables(model: nn.Module) -> dict[str, UpdatedTable]:
    """Return the updated embeddings and routers of ``model`` by name, in model order."""
    return modules_of(model, UpdatedTable)


def _rows(ids: Tensor, weight: Tensor, left: Tensor, right: Tensor, beta: float, padding: int | None) -> Tensor:
    # torch's lookup, not an index: a row number of -1 is an error, as in nn.Embedding
    base_rows = functional.embedding(ids.reshape(-1), weight.detach())  # (tokens, d)
    left_rows = functional.embedding(ids.reshape(-1), left.detach())  # (tokens, r)
    rows = updated_rows(base_rows, left_rows, right.detach(), beta)
    # detach: see PSTLinear.product
    return rows.view(*ids.shape, base_rows.shape[1]).detach()


def _gradients(
    ids: Tensor, grad_y: Tensor, left: Tensor, right: Tensor, beta: float, padding: int | None
) -> tuple[Tensor, Tensor]:
    rows = grad_y.reshape(-1, grad_y.shape[-1])  # (tokens, d)
    left = left.detach()
    right = right.detach()
    of_left, of_right = row_gradients(ids.reshape(-1), rows, left, right, beta, padding_idx=padding)
    return of_left.to(left.dtype), of_right.to(right.dtype)


class _UpdatedRows(torch.autograd.Function):
    """Save only the row numbers; the backward pass reads U and V from the module, where ZeRO-3 gathers them again."""

    @staticmethod
    def forward(ctx, ids, module, left, right):
        ctx.module = module
        ctx.save_for_backward(ids)
        rows = _rows(ids, module.weight, left, right, module.beta, module.padding_idx)
        if module.grid is None:
            return rows
        # The gradient passes straight through the quantisation.
        return round_to_grid(rows.flatten(0, -2), None, module.grid).view_as(rows)

    @staticmethod
    def backward(ctx, grad_y):
        (ids,) = ctx.saved_tensors
        module = ctx.module
        left = module.pst_U
        right = module.pst_V
        with sharding.gathered([p for p in (left, right) if sharding.is_released(p)]):
            return None, None, *_gradients(ids, grad_y, left, right, module.beta, module.padding_idx)


LIBRARY.impl("updated_rows", _rows, "CompositeExplicitAutograd")
LIBRARY.impl("row_gradients", _gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("pst_ds::updated_rows", lib=LIBRARY)
def _(ids: Tensor, weight: Tensor, left: Tensor, right: Tensor, beta: float, padding: int | None) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.register_fake("pst_ds::row_gradients", lib=LIBRARY)
def _(
    ids: Tensor, grad_y: Tensor, left: Tensor, right: Tensor, beta: float, padding: int | None
) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape), right.new_empty(right.shape)


def _save(ctx, inputs, output):
    ids, _, left, right, ctx.beta, ctx.padding = inputs
    ctx.save_for_backward(ids, left, right)


def _differentiate(ctx, grad_y):
    ids, left, right = ctx.saved_tensors
    of_left, of_right = torch.ops.pst_ds.row_gradients(ids, grad_y, left, right, ctx.beta, ctx.padding)
    return None, None, of_left, of_right, None, None


torch.library.register_autograd("pst_ds::updated_rows", _differentiate, setup_context=_save, lib=LIBRARY)
