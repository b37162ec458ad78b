"""Evaluation on a whole split: every example counts once, and the batches do not depend on the number of ranks."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.kl_divergence import KLDivergence
from pst_ds.data.tasks import ExampleSet
from pst_ds.data.tasks.causal_lm import CausalTask
from pst_ds.parallel.ranks import all_gather_objects, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress
from pst_ds.train.run_context import RunContext
from pst_ds.train.token_heads import head_of, loss_sums, predictions

Model = Callable[..., Any]
"""A transformers model, or the engine around one."""
_ROUNDINGS = 8
"""Rounding errors by which equal predictions of two models may differ."""
_ROWS = 128
"""Predictions whose logits two models hold together."""


@torch.no_grad()
def predict(model: Model, context: RunContext, examples: ExampleSet) -> np.ndarray:
    """Return the task's outcomes, (num examples, k) in the order of ``examples``, on every rank.

    Collective. ``model`` must be in evaluation mode. If a language model's head is known, only the logits of a chunk of
    tokens are in memory.
    """
    task = context.task
    head = head_of(model, task)
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    pieces_of_rank: list[Piece] = []
    with Progress("evaluate", len(batches), "batches") as progress:
        for first in range(0, len(batches), world_size()):
            heartbeat("evaluation")
            turn = first + rank()
            # a rank that runs out repeats its last batch: under ZeRO-3 all ranks must run the same layers
            indices = batches[min(turn, len(batches) - 1)]
            batch = task.collate(examples, indices, context.tokenizer)
            inputs = _inputs(batch, context.device)
            if head is None:
                outcomes = task.outcomes(model(**inputs).logits, batch)
            else:
                assert isinstance(task, CausalTask)
                sums = loss_sums(model, head, inputs, batch["labels"].to(context.device))
                outcomes = task.outcomes_of_sums(sums.cpu().numpy(), batch)
            if turn < len(batches):
                pieces_of_rank.append(Piece(indices, outcomes))
            progress.at(min(first + world_size(), len(batches)))
    return _in_order(list(chain.from_iterable(all_gather_objects(pieces_of_rank))))


@torch.no_grad()
def kl_divergence(reference: Model, model: Model, context: RunContext, examples: ExampleSet) -> dict[str, float]:
    """Return how far the predictions of ``model`` are from those of ``reference``; see :class:`KLDivergence`.

    Both run on one process, batch by batch, in evaluation mode. A prediction is a distribution over classes, or over
    the next tokens that the loss counts; both models have the same ones.
    """
    task = context.task
    kl = KLDivergence()
    reference_head = head_of(reference, task)
    head = head_of(model, task)
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    with Progress("KL divergence", len(batches), "batches") as progress:
        for indices in batches:
            batch = task.collate(examples, indices, context.tokenizer)
            inputs = _inputs(batch, context.device)
            labels = batch["labels"].to(context.device)
            count, reference_logits = predictions(reference, reference_head, inputs, labels)
            _, model_logits = predictions(model, head, inputs, labels)
            # in pieces: the logits of all tokens of a batch, twice, can be larger than the models
            for start in range(0, count, _ROWS):
                rows = slice(start, start + _ROWS)
                kl.add(reference_logits(rows), model_logits(rows))
            progress.add(1)
    return kl.result()


class Piece(NamedTuple):
    """Outcomes of one batch."""

    indices: list[int]
    """Indices of its examples."""
    outcomes: np.ndarray
    """(num examples, k), in the order of ``indices``."""


class Differences(NamedTuple):
    """How the outputs of two models differ."""

    predictions: int
    """Differing ones: the index of the largest logit, which is an example's class, or the next token. With a single
    output (regression) it is the number, and numbers within a few rounding errors are equal."""
    logit: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """Largest absolute logit of the first model."""
    metrics: dict[str, float]
    """Metrics of the second model."""


@torch.no_grad()
def compare(one: Model, other: Model, context: RunContext, examples: ExampleSet) -> Differences:
    """Compare two models on one process. Only one batch of logits of each is in memory; padding is ignored."""
    task = context.task
    device = context.device
    num_differing = 0
    largest_difference = torch.zeros((), device=device)
    largest_logit = torch.zeros((), device=device)
    pieces: list[Piece] = []
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    with Progress("compare", len(batches), "batches") as progress:
        for indices in batches:
            batch = task.collate(examples, indices, context.tokenizer)
            inputs = _inputs(batch, device)
            ours = one(**inputs).logits
            theirs = other(**inputs).logits
            pieces.append(Piece(indices, task.outcomes(theirs.float(), batch)))
            predicts_tokens = ours.dim() == 3  # (examples, length, vocabulary)
            if predicts_tokens and "attention_mask" in batch:
                # the logits of padding depend on how a model attends to it, and nobody reads them
                is_real = batch["attention_mask"].to(device).bool()
                ours = ours[is_real]
                theirs = theirs[is_real]
            num_differing += _num_differing(ours, theirs)
            # torch's maximum keeps a NaN, where Python's max would lose it
            largest_difference = torch.maximum(largest_difference, (ours.float() - theirs.float()).abs().max())
            largest_logit = torch.maximum(largest_logit, ours.float().abs().max())
            progress.add(1)
    return Differences(
        predictions=num_differing,
        logit=float(largest_difference),
        largest_logit=float(largest_logit),
        metrics=task.metrics(_in_order(pieces), examples),
    )


def _num_differing(ours: Tensor, theirs: Tensor) -> int:
    if ours.shape[-1] > 1:
        return int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    rounding = _ROUNDINGS * torch.finfo(theirs.dtype).eps
    return int((~torch.isclose(ours.float(), theirs.float(), rtol=rounding, atol=rounding)).sum())


def evaluation_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, *, mixed: bool) -> list[list[int]]:
    """Return batches of indices, short examples first; unless ``mixed``, all examples of a batch have one length."""
    order = np.argsort(lengths, kind="stable")
    groups = [order]
    if not mixed:
        sorted_lengths = np.asarray(lengths)[order]
        groups = np.split(order, np.flatnonzero(np.diff(sorted_lengths)) + 1)  # where the next length starts
    batches = []
    for group in groups:
        for first in range(0, len(group), batch_size):
            batches.append(group[first : first + batch_size].tolist())
    return batches


def _inputs(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    # given labels, a model would also compute its own loss
    return {name: values.to(device) for name, values in batch.items() if name != "labels"}


def _in_order(pieces: list[Piece]) -> np.ndarray:
    """Return the outcomes of all ``pieces``, sorted by index."""
    order = np.argsort(np.concatenate([piece.indices for piece in pieces]))
    return np.concatenate([piece.outcomes for piece in pieces])[order]
