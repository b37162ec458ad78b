"""PSTEmbedding: a frozen embedding with a low-rank update, which no mask prunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pst_ds.config.pst import PSTConfig
from pst_ds.core.updates.rows import row_gradients, updated_rows
from pst_ds.nn.layer import init_std, seeded_normal
from pst_ds.nn.targets import EmbeddingTarget, put
from pst_ds.parallel import zero3


class PSTEmbedding(nn.Module):
    """Takes the place of an ``nn.Embedding`` and adopts its ``weight`` Parameter: y = (W0 + beta U V)[ids].

    Parameters, for n rows of width d and update rank r: ``weight`` (n, d), frozen; ``pst_U`` (n, r), zero at the
    start, so that rows which the data never names keep their pretrained values; ``pst_V`` (r, d), normal. This is
    LoRA of an embedding (PEFT starts it the same way); a row of the padding index is never trained.
    """

    def __init__(self, name: str, base: nn.Embedding, config: PSTConfig):
        super().__init__()
        self.padding_idx, self.beta = base.padding_idx, config.beta
        self.bypassed = False
        """True while W0 alone is looked up; see :func:`pst_ds.nn.inject.bypassed`."""
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.weight = base.weight
        rank = config.update_rank
        std = config.update_init_scale * init_std(config.update_init, rank, base.embedding_dim)
        values = seeded_normal((rank, base.embedding_dim), std, f"{config.factor_seed}/{name}/V")
        self.pst_U = nn.Parameter(base.weight.new_zeros(base.num_embeddings, rank))
        self.pst_V = nn.Parameter(values.to(base.weight))

    @property
    def num_factor_parameters(self) -> int:
        return zero3.full_numel(self.pst_U) + zero3.full_numel(self.pst_V)

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) row numbers to (..., d)."""
        if self.bypassed:
            return functional.embedding(ids, self.weight)
        if not torch.compiler.is_compiling():
            return self._eager(ids)
        if zero3.is_partitioned(self.pst_U):
            return torch.compiler.disable(self._eager)(ids)
        return torch.ops.pst_ds.updated_rows(ids, self.weight, self.pst_U, self.pst_V, self.beta, self.padding_idx)

    def _eager(self, ids: Tensor) -> Tensor:
        return _UpdatedRows.apply(ids, self, self.pst_U, self.pst_V)

    def updated_weight(self) -> Tensor:
        """W0 + beta U V, (n, d): the rows that ``forward`` returns. The parameters must be gathered."""
        return updated_rows(self.weight.detach(), self.pst_U.detach(), self.pst_V.detach(), self.beta)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, update_rank={zero3.full_shape(self.pst_V)[0]}"


def replace_embeddings(targets: Sequence[EmbeddingTarget], config: PSTConfig) -> None:
    """Put a PSTEmbedding in the places of each of ``targets``. Collective under ZeRO-3."""
    for target in targets:
        embedding = PSTEmbedding(target.name, target.module, config)
        zero3.split_as(embedding.get_parameter("weight"), embedding.parameters(recurse=False))
        embedding.train(target.module.training)
        put(embedding, target.places)


def pst_embeddings(model: nn.Module) -> dict[str, PSTEmbedding]:
    """The updated embeddings of ``model`` by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PSTEmbedding)}


class _UpdatedRows(torch.autograd.Function):
    """Saves the row numbers alone; the backward pass reads U and V from the module, where ZeRO-3 has them again."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, module: PSTEmbedding, left: Tensor, right: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(ids)
        flat = ids.reshape(-1)
        # torch's own lookup, not an index: a row number of -1 is an error, as in the base embedding
        stored, own = (functional.embedding(flat, table) for table in (module.weight.detach(), left))
        rows = updated_rows(stored, own, right, module.beta)
        return rows.view(*ids.shape, stored.shape[1]).detach()  # detach: see PSTLinear.product

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, None, Tensor, Tensor]:
        (ids,) = ctx.saved_tensors
        module: PSTEmbedding = ctx.module
        left, right = module.pst_U, module.pst_V
        with zero3.gathered([p for p in (left, right) if zero3.is_released(p)]):
            flat_ids, flat_grad = ids.reshape(-1), grad_y.reshape(-1, grad_y.shape[-1])
            grads = row_gradients(
                flat_ids, flat_grad, left.detach(), right.detach(), module.beta, padding_idx=module.padding_idx
            )
            return None, None, grads[0].to(left.dtype), grads[1].to(right.dtype)
