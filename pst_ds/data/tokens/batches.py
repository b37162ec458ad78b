"""Batches of sequences: which they are, from the number of the batch alone, and the inputs that a model takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pst_ds.data.labelled import GlobalBatches
from pst_ds.data.tasks.task import IGNORED
from pst_ds.data.tokens.drawn import DrawnSequences
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences


@dataclass(frozen=True, slots=True)
class SequenceBatches(GlobalBatches):
    """Batches in the keyed order of their sequences, of which nothing is held; what an epoch leaves over begins the
    next."""

    sequences: Sequences | MixedSequences = field(kw_only=True)

    def after(self, first: int) -> Iterator[list[int]]:
        for number in itertools.count(first):
            numbers = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            yield self.sequences.ordered(numbers, self.seed).tolist()


def collate_sequences(
    sequences: Sequences | MixedSequences | DrawnSequences, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Return model inputs of sequences of equal length: input_ids and labels, (len(indices), length) int64.

    Labels are the input: the model predicts each from those before it. There is no padding, so no attention mask.
    Where documents do not run on, ``position_ids`` begin anew with each and its first label is -100; a model of
    transformers that is given such positions without an attention mask keeps the documents apart in its attention.
    Tokens that are not to be learned have the label -100 as well.
    """
    ids = torch.from_numpy(np.stack([sequences[i] for i in indices]).astype(np.int64))
    labels = ids
    if sequences.masks_tokens:
        predicted = torch.from_numpy(np.stack([sequences.predicted_in(i) for i in indices]))
        labels = ids.masked_fill(~predicted, IGNORED)
    if not sequences.apart:
        return {"input_ids": ids, "labels": labels}
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begun = np.zeros(ids.shape, dtype=np.int64)
    for row, index in enumerate(indices):
        starts = sequences.starts_in(index)
        begun[row, starts] = starts
    positions = torch.from_numpy(places - np.maximum.accumulate(begun, axis=1))
    return {"input_ids": ids, "position_ids": positions, "labels": labels.masked_fill(positions == 0, IGNORED)}
