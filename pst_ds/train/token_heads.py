"""Losses of a language model's tokens, without the logits of a whole batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pst_ds.core.head_loss import token_losses
from pst_ds.data.tasks import Task
from pst_ds.data.tasks.causal_lm import CausalTask
from pst_ds.data.tasks.task import IGNORED
from pst_ds.nn.language_head import LanguageHead, UnknownHeadError, language_head


def head_of(model: object, task: Task) -> LanguageHead | None:
    """Return the head that predicts the tokens of ``task``, in ``model`` or the engine around it; None for other tasks,
    and if the loss needs all logits (see :func:`why_all_logits`)."""
    head_or_reason = _head_or_reason(model, task)
    return head_or_reason if isinstance(head_or_reason, LanguageHead) else None


def why_all_logits(model: object, task: Task) -> str:
    """Return why the loss of a language model needs the logits of a whole micro-batch; "" if it does not."""
    head_or_reason = _head_or_reason(model, task)
    return head_or_reason if isinstance(head_or_reason, str) else ""


def _head_or_reason(model: object, task: Task) -> LanguageHead | str | None:
    module = getattr(model, "module", model)
    if not isinstance(task, CausalTask) or not isinstance(module, nn.Module):
        return None
    try:
        return language_head(module)
    except UnknownHeadError as error:
        return str(error)


def following(labels: Tensor, more: int = 0) -> Tensor:
    """Return the label after each of ``labels``: (examples, length + more), -100 after the last one and in padding."""
    return pad(labels[:, 1:], (0, 1 + more), value=IGNORED)


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (indices of the tokens of the flat batch that predict a token, the predicted tokens), both (n,) int64.

    ``labels`` is the result of :func:`following`.
    """
    flat = labels.flatten()
    places = (flat != IGNORED).nonzero().squeeze(1)
    return places, flat[places]


@torch.no_grad()
def predictions(
    model: Callable[..., Any], head: LanguageHead | None, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[int, Callable[[slice], Tensor]]:
    """Return the number of predictions, one per example or predicted token, and a function that returns the logits of
    some, (n, classes).

    With the ``head`` of a language model, only those that are asked for are computed.
    """
    if labels.dim() == 1:  # (examples,): one class per example
        logits = model(**inputs).logits
        return len(logits), logits.__getitem__
    places, _ = predicted(following(labels))
    if head is None:
        logits = model(**inputs).logits.flatten(0, 1)[places]
        return len(places), logits.__getitem__
    # hidden: (examples, length, width); kept: (predicted tokens, width), far smaller than their logits
    with head.reading(lambda hidden: hidden.flatten(0, 1)[places]) as kept:
        model(**inputs)
    return len(places), lambda part: head.readout.final(head.readout.output(kept[0][part]))


@torch.no_grad()
def loss_sums(model: Callable[..., object], head: LanguageHead, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the summed loss of each example's predicted tokens: (examples,) fp64. Collective under ZeRO-3."""
    places, targets = predicted(following(labels))

    def read(hidden: Tensor) -> Tensor:
        losses = token_losses(hidden.flatten(0, 1), head.readout, targets, places)
        # fp64, so that the sum over a long text hardly depends on the order in which a GPU adds
        sums = torch.zeros(labels.shape[0], dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, places // labels.shape[1], losses.double())

    with head.reading(read) as sums:
        model(**inputs)
    return sums[0]
