"""Losses of a language model's tokens, without the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pst_ds.core.head_loss import token_losses
from pst_ds.data.tasks import Task
from pst_ds.data.tasks.causal_lm import CausalTask
from pst_ds.data.tasks.task import IGNORED
from pst_ds.nn.language_head import LanguageHead, UnknownHeadError, language_head


def head_of(model: Any, task: Task) -> LanguageHead | None:
    """Return the head that predicts the tokens of ``task``, in ``model`` or the engine around it; None for a task of
    another kind, and where the loss needs all logits (see :func:`why_all_logits`)."""
    found = _found(model, task)
    return found if isinstance(found, LanguageHead) else None


def why_all_logits(model: nn.Module, task: Task) -> str:
    """Return why a language model's loss is made from the logits of a whole micro-batch; "" where it is not."""
    found = _found(model, task)
    return found if isinstance(found, str) else ""


def _found(model: Any, task: Task) -> LanguageHead | str | None:
    module = getattr(model, "module", model)
    if not isinstance(task, CausalTask) or not isinstance(module, nn.Module):
        return None
    try:
        return language_head(module)
    except UnknownHeadError as error:
        return str(error)


def following(labels: Tensor, more: int = 0) -> Tensor:
    """Return the label after each of ``labels``, (texts, length + more): -100 after the last of a text, and behind."""
    return pad(labels[:, 1:], (0, 1 + more), value=IGNORED)


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (places in the flat batch that predict a token, the tokens), both (n,) int64, of labels that
    :func:`following` returned."""
    flat = labels.flatten()
    places = (flat != IGNORED).nonzero().squeeze(1)
    return places, flat[places]


@torch.no_grad()
def loss_sums(model: Any, head: LanguageHead, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum of the losses of each text's predicted tokens: (texts,) fp64. Collective under ZeRO-3."""
    places, targets = predicted(following(labels))

    def read(hidden: Tensor) -> Tensor:
        losses = token_losses(hidden.flatten(0, 1), head.readout, targets, places)
        sums = torch.zeros(labels.shape[0], dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, places // labels.shape[1], losses.double())

    with head.reading(read) as sums:
        model(**inputs)
    return sums[0]
