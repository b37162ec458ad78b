"""Batches of sequences: their indices, computed from the batch number, and their model inputs."""

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
    """Batches in a shuffled order that is computed, not held. An incomplete last batch carries over into the next
    epoch."""

    sequences: Sequences | MixedSequences = field(kw_only=True)

    def after(self, first: int) -> Iterator[list[int]]:
        for number in itertools.count(first):
            numbers = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            yield self.sequences.ordered(numbers, self.seed).tolist()


def collate_sequences(
    sequences: Sequences | MixedSequences | DrawnSequences, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Return model inputs of sequences of equal length: input_ids and labels, (len(indices), length) int64.

    Labels equal the input, because models shift them. Without padding no attention mask is needed. With a document
    mask, ``position_ids`` restart at each document and its first label is -100; transformers then restricts attention
    to the document, as long as there is no attention mask. Tokens that are not trained on also have the label -100.
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
