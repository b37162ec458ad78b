"""Evaluation on a whole split: every example counts once, and the batches do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pst_ds.data.tasks import ExampleSet, Task
from pst_ds.data.tasks.causal_lm import CausalTask
from pst_ds.nn.language_head import LanguageHead
from pst_ds.parallel.ranks import all_gather_objects, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress
from pst_ds.train.token_heads import head_of, loss_sums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = Callable[..., Any]
"""A transformers model, or the engine around one."""
_ROUNDINGS = 8
"""Rounding errors by which a number may differ that two models compute alike."""


@torch.no_grad()
def predict(
    model: Model, task: Task, examples: ExampleSet, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: str
) -> np.ndarray:
    """Return the outcomes of ``task``, (num examples, k) in the order of ``examples``, on every rank.

    Ranks take turns at the batches; one that runs out repeats its last and drops the answer, since under ZeRO-3 all
    must run the same layers. A language model's logits exist for a chunk of tokens at a time, where its head is known.
    Collective. ``model`` must be in evaluation mode.
    """
    head = head_of(model, task)
    batches = evaluation_batches(examples.lengths, batch_size, mixed=task.pads)
    own: list[tuple[list[int], np.ndarray]] = []
    with Progress("evaluate", len(batches), "batches") as progress:
        for first in range(0, len(batches), world_size()):
            heartbeat("evaluation")
            turn = first + rank()
            indices = batches[min(turn, len(batches) - 1)]
            batch = task.collate(examples, indices, tokenizer)
            outcomes = _outcomes(model, task, head, batch, device)
            if turn < len(batches):
                own.append((indices, outcomes))
            progress.at(min(first + world_size(), len(batches)))
    return _in_order([batch for of_rank in all_gather_objects(own) for batch in of_rank], len(examples))


@torch.no_grad()
def compare(
    one: Model, other: Model, task: Task, examples: ExampleSet, tokenizer: PreTrainedTokenizerBase, batch_size: int,
    device: str,
) -> tuple[dict[str, Any], dict[str, float]]:  # fmt: skip
    """Return how far the predictions of two models on one process differ, and the metrics of the ``other``.

    A prediction is the index of the largest logit: a text's class, or the token that would follow; of a single output
    (regression) it is the number, and others within a few roundings are the same. One batch of logits of each model is
    held at a time.
    """
    differing, largest = 0, torch.zeros((), device=device)
    pieces: list[tuple[list[int], np.ndarray]] = []
    batches = evaluation_batches(examples.lengths, batch_size, mixed=task.pads)
    with Progress("compare", len(batches), "batches") as progress:
        for indices in batches:
            batch = task.collate(examples, indices, tokenizer)
            ours, theirs = (_logits(model, batch, device) for model in (one, other))
            pieces.append((indices, task.outcomes(theirs.float(), batch)))
            ours, theirs = (_without_padding(logits, batch) for logits in (ours, theirs))
            differing += _differing(ours, theirs)
            largest = torch.maximum(largest, (ours.float() - theirs.float()).abs().max())  # keeps a NaN
            progress.add(1)
    metrics = task.metrics(_in_order(pieces, len(examples)), examples)
    return {"differing_predictions": differing, "max_logit_difference": float(largest)}, metrics


def _without_padding(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return logits without padding: (tokens, vocabulary) per token; logits per example unchanged."""
    real = batch.get("attention_mask")
    return logits if real is None or logits.dim() < 3 else logits[real.to(logits.device).bool()]


def _differing(ours: Tensor, theirs: Tensor) -> int:
    if ours.shape[-1] > 1:
        return int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    rounding = _ROUNDINGS * torch.finfo(theirs.dtype).eps
    return int((~torch.isclose(ours.float(), theirs.float(), rtol=rounding, atol=rounding)).sum())


def evaluation_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, *, mixed: bool) -> list[list[int]]:
    """Batch every example once, short ones first; unless ``mixed``, those of a batch have one length."""
    order = np.argsort(lengths, kind="stable")
    groups = [order] if mixed else np.split(order, np.flatnonzero(np.diff(np.asarray(lengths)[order])) + 1)
    return [group[i : i + batch_size].tolist() for group in groups for i in range(0, len(group), batch_size)]


def _outcomes(model: Model, task: Task, head: LanguageHead | None, batch: dict[str, Tensor], device: str) -> np.ndarray:
    if head is None:
        return task.outcomes(_logits(model, batch, device), batch)
    assert isinstance(task, CausalTask)
    sums = loss_sums(model, head, _inputs(batch, device), batch["labels"].to(device))
    return task.outcomes_of_sums(sums.cpu().numpy(), batch)


def _logits(model: Model, batch: dict[str, Tensor], device: str) -> Tensor:
    return model(**_inputs(batch, device)).logits


def _inputs(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items() if k != "labels"}


def _in_order(pieces: list[tuple[list[int], np.ndarray]], count: int) -> np.ndarray:
    first = pieces[0][1]
    everything = np.empty((count, first.shape[1]), dtype=first.dtype)
    for indices, outcomes in pieces:
        everything[indices] = outcomes
    return everything
