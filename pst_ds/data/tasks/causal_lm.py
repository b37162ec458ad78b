"""Predict the next token of text, in sequences of equal length cut from one stream of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pst_ds.config.run import DataConfig
from pst_ds.data.labelled import GlobalBatches
from pst_ds.data.model_limits import check_causal_model
from pst_ds.data.tasks.task import IGNORED, E, ExampleSet, Task
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

Indexed: TypeAlias = Sequences | MixedSequences


@dataclass(frozen=True, slots=True)
class SequenceBatches(GlobalBatches):
    """Batches in a shuffled order that is computed, not held. An incomplete last batch carries over into the next
    epoch."""

    sequences: Indexed = field(kw_only=True)

    def after(self, first: int) -> Iterator[list[int]]:
        for number in itertools.count(first):
            numbers = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            yield self.sequences.ordered(numbers, self.seed).tolist()


def collate_sequences(examples: Indexed, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return model inputs of sequences of equal length: input_ids and labels, (len(indices), length) int64.

    Labels equal the input, because models shift them. Without padding no attention mask is needed. With a document
    mask, ``position_ids`` restart at each document and its first label is -100; transformers then restricts attention
    to the document, if it gets no attention mask. Tokens that are not trained on also have the label -100.
    """
    sequences = [examples[i] for i in indices]
    # files have the smallest type of the vocabulary, which torch cannot index with
    ids = torch.from_numpy(np.stack([sequence.tokens for sequence in sequences]).astype(np.int64))
    labels = ids
    if examples.masks_tokens:
        is_predicted = torch.from_numpy(np.stack([sequence.predicted for sequence in sequences]))
        labels = ids.masked_fill(~is_predicted, IGNORED)
    if not examples.apart:
        return {"input_ids": ids, "labels": labels}
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    # The running maximum of the document starts is the start of each token's document.
    begun = np.zeros(ids.shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        begun[row, sequence.starts] = sequence.starts
    positions = torch.from_numpy(places - np.maximum.accumulate(begun, axis=1))
    return {"input_ids": ids, "position_ids": positions, "labels": labels.masked_fill(positions == 0, IGNORED)}


class CausalTask(Task[E]):
    """A task of language models; outcomes are the sums of the token losses of each example, (examples, 1) float64."""

    new_head = False
    lower_is_better = True

    def model_class(self) -> type[_BaseAutoModelClass]:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        sums: list[float] = []
        for logits_of_row, ids in zip(logits, batch["labels"], strict=True):
            sums.append(_loss_sum(logits_of_row, ids))
        return self.outcomes_of_sums(np.array(sums), batch)

    def outcomes_of_sums(self, sums: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        """Return the outcomes of a batch from the sums of its examples' token losses, (examples,) float64."""
        return sums[:, None]


class CausalLM(CausalTask[Indexed]):
    """Train on sequences of one length, without padding."""

    unit = "sequences"
    pads = False

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, "'causal-lm', which puts it between documents", pads=self.pads)

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Indexed:
        return load_sequences(data, split, tokenizer)

    def collate(self, examples: Indexed, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        return collate_sequences(examples, indices)

    def num_targets(self, examples: Indexed, indices: Sequence[int]) -> int:
        return sum(int(examples[i].predicted.sum()) for i in indices)

    def batches(self, examples: Indexed, batch_size: int, seed: int, *, group_by_length: bool = False) -> GlobalBatches:
        return SequenceBatches(examples.lengths, batch_size, seed, sequences=examples)

    def sample(self, examples: Indexed, count: int, seed: str | int) -> tuple[ExampleSet, list[int]]:
        """Return ``count`` sequences. Each source of a mixture has its fraction of them; a small source with a large
        weight may repeat."""
        if isinstance(examples, MixedSequences) and examples.weights:
            return examples, examples.ordered(np.arange(count), f"sample/{seed}").tolist()
        return super().sample(examples, count, seed)

    def metrics(self, outcomes: np.ndarray, examples: Indexed) -> dict[str, float]:
        # mixtures are for training, which counts no bytes
        num_bytes = None
        if isinstance(examples, Sequences):
            num_bytes = examples.predicted_bytes
        return language_model_metrics(outcomes[:, 0], examples.num_predicted, num_bytes)


def language_model_metrics(loss_sums: np.ndarray, num_predicted: int, num_bytes: int | None = None) -> dict[str, float]:
    """Return the mean loss per predicted token (nats) and its exponential, perplexity; and the same per byte of text.

    ``byte_perplexity`` is exp(sum of losses / bytes) and ``bits_per_byte`` its binary logarithm. Unlike perplexity they
    can be compared between tokenizers. The sum includes the loss of special tokens, which have no bytes.

    Args:
        loss_sums: (sequences,) float64. Their sum is correctly rounded, so it does not depend on their order.
        num_bytes: UTF-8 bytes that the predicted tokens represent, as pst_ds/data/tokens/tokenize.py counts them.
    """
    total = math.fsum(loss_sums.tolist())
    loss = total / num_predicted
    metrics = {"loss": loss, "perplexity": _exponential(loss)}
    if num_bytes:
        metrics["byte_perplexity"] = _exponential(total / num_bytes)
        metrics["bits_per_byte"] = total / num_bytes / math.log(2)
    return metrics


def _exponential(loss: float) -> float:
    """Return exp(loss), or infinity where math.exp raises OverflowError: above 709.78."""
    if loss < 700.0:
        return math.exp(loss)
    return math.inf


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    """Return the sum of the losses of one sequence, without its first token and labels of -100. ``logits`` (length,
    vocabulary), ``ids`` (length,). Several sequences would need too much memory for fp32 logits."""
    losses = cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    # in fp64, so that a sum of thousands of losses does not depend on how the device orders it
    return float(losses.sum(dtype=torch.float64))


TASK = CausalLM
