"""Evaluation on a whole split: every example counts once, and the batches do not depend on the number of ranks."""

from collections.abc import Callable, Sequence
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
    task, head = context.task, head_of(model, context.task)
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    own: list[tuple[list[int], np.ndarray]] = []
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
                own.append((indices, outcomes))
            progress.at(min(first + world_size(), len(batches)))
    return _in_order([batch for of_rank in all_gather_objects(own) for batch in of_rank])


@torch.no_grad()
def kl_divergence(reference: Model, model: Model, context: RunContext, examples: ExampleSet) -> dict[str, float]:
    """Return how far the predictions of ``model`` are from those of ``reference``; see :class:`KLDivergence`.

    Both run on one process, batch by batch, in evaluation mode. A prediction is a distribution over classes, or over
    the next tokens that the loss counts; both models have the same ones.
    """
    task, kl = context.task, KLDivergence()
    models = [(one, head_of(one, task)) for one in (reference, model)]
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    with Progress("KL divergence", len(batches), "batches") as progress:
        for indices in batches:
            batch = task.collate(examples, indices, context.tokenizer)
            inputs, labels = _inputs(batch, context.device), batch["labels"].to(context.device)
            (count, of_reference), (_, of_model) = (predictions(one, head, inputs, labels) for one, head in models)
            for start in range(0, count, _ROWS):
                kl.add(*(rows(slice(start, start + _ROWS)) for rows in (of_reference, of_model)))
            progress.add(1)
    return kl.result()


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
    task, device = context.task, context.device
    differing, apart, largest = 0, torch.zeros((), device=device), torch.zeros((), device=device)
    pieces: list[tuple[list[int], np.ndarray]] = []
    batches = evaluation_batches(examples.lengths, context.run.eval_batch_size, mixed=task.pads)
    with Progress("compare", len(batches), "batches") as progress:
        for indices in batches:
            batch = task.collate(examples, indices, context.tokenizer)
            ours, theirs = (model(**_inputs(batch, device)).logits for model in (one, other))
            pieces.append((indices, task.outcomes(theirs.float(), batch)))
            if ours.dim() == 3 and "attention_mask" in batch:  # drop padding
                real = batch["attention_mask"].to(device).bool()
                ours, theirs = ours[real], theirs[real]
            differing += _differing(ours, theirs)
            apart = torch.maximum(apart, (ours.float() - theirs.float()).abs().max())  # keeps a NaN
            largest = torch.maximum(largest, ours.float().abs().max())
            progress.add(1)
    return Differences(differing, float(apart), float(largest), task.metrics(_in_order(pieces), examples))


def _differing(ours: Tensor, theirs: Tensor) -> int:
    if ours.shape[-1] > 1:
        return int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    rounding = _ROUNDINGS * torch.finfo(theirs.dtype).eps
    return int((~torch.isclose(ours.float(), theirs.float(), rtol=rounding, atol=rounding)).sum())


def evaluation_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, *, mixed: bool) -> list[list[int]]:
    """Return batches of indices, short examples first; unless ``mixed``, all examples of a batch have one length."""
    order = np.argsort(lengths, kind="stable")
    groups = [order] if mixed else np.split(order, np.flatnonzero(np.diff(np.asarray(lengths)[order])) + 1)
    return [group[i : i + batch_size].tolist() for group in groups for i in range(0, len(group), batch_size)]


def _inputs(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items() if k != "labels"}


def _in_order(pieces: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Return the outcomes of all ``pieces`` (indices, outcomes), sorted by index."""
    order = np.argsort(np.concatenate([indices for indices, _ in pieces]))
    return np.concatenate([outcomes for _, outcomes in pieces])[order]
