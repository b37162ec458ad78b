"""The next token of text: a language model on one stream of tokens, cut into sequences of equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import file_and_slice
from pst_ds.data.labelled import GlobalBatches
from pst_ds.data.model_limits import check_causal_model
from pst_ds.data.preparation.pieces import format_of
from pst_ds.data.tasks.task import E, ExampleSet, Task
from pst_ds.data.tokens.batches import SequenceBatches, collate_sequences
from pst_ds.data.tokens.drawn import DrawnSequences, MixedReader
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


_SHORT_DOCUMENT = 4
"""A median document with less than this part of a sequence is short."""


class CausalTask(Task[E]):
    """A task of language models; outcomes are the sums of the token losses of each example, (examples, 1) float64."""

    new_head = False
    lower_is_better = True

    def model_class(self) -> type[_BaseAutoModelClass]:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        sums = np.array([_loss_sum(of, ids) for of, ids in zip(logits, batch["labels"], strict=True)])
        return self.outcomes_of_sums(sums, batch)

    def outcomes_of_sums(self, sums: np.ndarray, batch: dict[str, Tensor]) -> np.ndarray:
        """Return the outcomes of a batch from the sums of its examples' token losses, (examples,) float64."""
        return sums[:, None]


class CausalLM(CausalTask[Sequences | MixedSequences]):
    """Sequences of one length, and nothing padded."""

    unit = "sequences"
    pads = False

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, "'causal-lm', which puts it between documents", pads=self.pads)

    def load(
        self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]
    ) -> Sequences | MixedSequences:
        return load_sequences(data, split, tokenizer)

    def collate(
        self, examples: Sequences | MixedSequences | DrawnSequences, indices: Sequence[int], tokenizer: Tokenizer
    ) -> dict[str, Tensor]:
        return collate_sequences(examples, indices)

    def num_targets(self, examples: Sequences | MixedSequences | DrawnSequences, indices: Sequence[int]) -> int:
        if not examples.masks_tokens:
            return sum(examples.length - 1 - len(examples.starts_in(i)) for i in indices)
        return sum(int(examples.predicted_in(i).sum()) for i in indices)

    def batches(
        self, examples: Sequences | MixedSequences, batch_size: int, seed: int, *, group_by_length: bool = False
    ) -> GlobalBatches:
        return SequenceBatches(examples.lengths, batch_size, seed, sequences=examples)

    def has_streams(self, examples: Sequences | MixedSequences) -> bool:
        return isinstance(examples, MixedSequences) and examples.has_streams

    def reader(
        self,
        examples: Sequences | MixedSequences,
        seed: int,
        part: int,
        parts: int,
        places: Sequence[Sequence[int]],
    ) -> MixedReader | None:
        if not isinstance(examples, MixedSequences) or not examples.has_streams:
            return None
        return MixedReader(examples, seed, part, parts, places)

    def sample(self, examples: Sequences | MixedSequences, count: int, seed: str | int) -> tuple[ExampleSet, list[int]]:
        """Return ``count`` sequences, of a mixture as many of each source as its weight says: the others without
        repetition, those of a small source with a large weight in several passes."""
        if isinstance(examples, MixedSequences) and examples.has_streams:
            turns = examples.ordered(np.arange(count), 0).tolist()
            return MixedReader(examples, 0, 0, 1, window=1).take(turns), list(range(count))
        if isinstance(examples, MixedSequences) and examples.weights:
            return examples, examples.ordered(np.arange(count), f"sample/{seed}").tolist()
        return super().sample(examples, count, seed)

    def require_enough(self, examples: Sequences | MixedSequences, count: int) -> None:
        most = examples.most if isinstance(examples, MixedSequences) else None
        if most is not None and most < count:
            raise ConfigError(
                f"data.sources have {most} sequences within their epochs, and the run takes {count} (steps x "
                "train.batch_size); allow more epochs, or train fewer steps"
            )

    def remark(self, data: DataConfig, examples: Sequences | MixedSequences) -> str:
        if isinstance(examples, Sequences):
            return _remark_on_documents(data, f"data.train = {data.train!r}", data.train, examples)
        remarks = (
            _remark_on_documents(data, f"data.sources.path = {source.path!r}", source.path, of)
            for source, of in zip(data.sources, examples.sources, strict=True)
            if isinstance(of, Sequences)
        )
        return next(filter(None, remarks), "")

    def metrics(self, outcomes: np.ndarray, examples: Sequences | MixedSequences) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], examples.num_predicted, examples.predicted_bytes)


def language_model_metrics(loss_sums: np.ndarray, num_predicted: int, num_bytes: int | None = None) -> dict[str, float]:
    """Return the mean loss of a predicted token (nats) and perplexity, its exponential; and the same of a byte of text.

    ``loss_sums`` is (sequences,) float64; its sum is correctly rounded, so it does not depend on an order.
    ``num_bytes``: of the text that the predicted tokens stand for, in UTF-8, as pst_ds/data/tokens/tokenize.py counts
    them. ``byte_perplexity`` is exp(sum / bytes) and ``bits_per_byte`` its binary logarithm; unlike perplexity
    they can be compared between tokenizers. The loss of end-of-text and other special tokens, which have no bytes, is
    in the sum.
    """
    total = math.fsum(loss_sums.tolist())
    loss = total / num_predicted
    metrics = {"loss": loss, "perplexity": _exponential(loss)}
    if num_bytes:
        metrics["byte_perplexity"] = _exponential(total / num_bytes)
        metrics["bits_per_byte"] = total / num_bytes / math.log(2)
    return metrics


def _remark_on_documents(data: DataConfig, setting: str, where: str, sequences: Sequences) -> str:
    """Return a warning about documents that are far shorter than a sequence; conversations are, and meant to be."""
    median = None if sequences.masks_tokens else sequences.median_document
    if median is None or median * _SHORT_DOCUMENT >= sequences.length:
        return ""
    kind, _ = format_of(file_and_slice(where)[0]) or ("", "")
    fix = 'data.sample_by = "document"' if kind == "text" and data.sample_by == "line" else "data.document_mask = false"
    return (
        f"{setting}: the median document has {median} tokens, far fewer than data.max_length = {sequences.length}, and "
        f"each is learnt without the text before it. If documents are parts of longer ones, set {fix}"
    )


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    """Sum the losses of all tokens of one sequence but its first, and but those with the label -100.

    ``logits`` (length, vocabulary), ``ids`` (length,): one sequence at a time, for its fp32 logits may be large.
    """
    losses = cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    return float(losses.sum(dtype=torch.float64))


TASK = CausalLM
