"""The next token of text: a language model on one stream of tokens, cut into sequences of equal length."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import read_rows, text_column
from pst_ds.data.model_limits import check_causal_model
from pst_ds.data.tasks.task import IGNORED, E, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_ROWS_AT_A_TIME = 100


class TokenStream(NamedTuple):
    """Documents one after another."""

    tokens: np.ndarray
    """(tokens,) int32."""
    document_starts: np.ndarray
    """Places in ``tokens`` at which documents begin, ascending: (documents,) int64."""
    num_bytes: np.ndarray
    """Bytes of text that each token stands for: (tokens,) int32. Empty if not counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Consecutive pieces of a token stream; sequence i starts at token ``i * (length - overlap)``.

    Without ``overlap`` (for training) every sequence has ``length`` tokens, and what is left at the end, less than
    ``length``, is in none. With an overlap of 1 (for evaluation) a sequence begins with the last token of the one
    before, so that each token but the stream's first is predicted in exactly one; the last may be shorter, down to 2.
    """

    tokens: np.ndarray
    """(tokens of the stream,) int32."""
    length: int
    overlap: int = 0
    num_bytes: np.ndarray | None = None
    """Bytes of text that each token stands for: (tokens of the stream,) int32. None if not counted."""
    document_starts: np.ndarray | None = None
    """Where documents begin, at which positions and attention begin anew, and whose first token is not predicted:
    (documents,) int64, ascending. None if they run on."""

    def __len__(self) -> int:
        if self.overlap:
            return max(0, -(-(len(self.tokens) - 1) // self._stride))
        return len(self.tokens) // self.length

    @property
    def _stride(self) -> int:
        return self.length - self.overlap

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(f"{self.length} {self.overlap} ".encode())
        digest.update(np.ascontiguousarray(self.tokens).data)
        if self.document_starts is not None:
            digest.update(np.ascontiguousarray(self.document_starts).data)
        return digest.hexdigest()

    @property
    def lengths(self) -> list[int]:
        starts = range(0, len(self) * self._stride, self._stride)
        return [min(self.length, len(self.tokens) - start) for start in starts]

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a view of the tokens of one sequence."""
        start = index * self._stride
        return self.tokens[start : start + self.length]

    def starts_in(self, index: int) -> np.ndarray:
        """Return the places in a sequence, behind its first, at which documents begin."""
        if self.document_starts is None:
            return np.empty(0, dtype=np.int64)
        first = index * self._stride
        behind, end = np.searchsorted(self.document_starts, [first + 1, first + self.length])
        return self.document_starts[behind:end] - first

    @property
    def num_predicted(self) -> int:
        """Predicted tokens of all sequences."""
        predicted = len(self.tokens) - 1 if self.overlap else len(self) * (self.length - 1)
        if self.document_starts is None:
            return max(0, predicted)
        starts = self.document_starts
        inside = starts > 0 if self.overlap else (starts < len(self) * self.length) & (starts % self.length > 0)
        return max(0, predicted - int(np.count_nonzero(inside)))

    @property
    def predicted_bytes(self) -> int | None:
        """The bytes of text that the predicted tokens stand for; with an overlap, all but those of first tokens."""
        if self.num_bytes is None or not self.overlap:
            return None
        firsts = [0] if self.document_starts is None else np.union1d([0], self.document_starts)
        return int(self.num_bytes.sum(dtype=np.int64) - self.num_bytes[firsts].sum(dtype=np.int64))

    def first(self, count: int) -> Sequences:
        """Return the first ``count`` sequences."""
        tokens = min(count, len(self)) * self._stride + self.overlap
        num_bytes = None if self.num_bytes is None else self.num_bytes[:tokens]
        starts = self.document_starts
        if starts is not None:
            starts = starts[: np.searchsorted(starts, tokens)]
        return replace(self, tokens=self.tokens[:tokens], num_bytes=num_bytes, document_starts=starts)


def load_sequences(data: DataConfig, split: str, tokenizer: Tokenizer) -> Sequences:
    """Return the sequences of one split: for "train" without overlap, for others with one of a token.

    Raises ConfigError for a missing file or column, a row without text, and too little text for one sequence.
    """
    column, where = data.text_columns[0], getattr(data, split)
    rows = read_rows(data, split, {column: "text_columns"})
    texts, trains = _batches_of_texts(rows, column, where), split == "train"
    stream = token_stream(texts, tokenizer, count=not trains)
    sequences = Sequences(
        stream.tokens,
        data.max_length,
        overlap=0 if trains else 1,
        num_bytes=None if trains else stream.num_bytes,
        document_starts=stream.document_starts if data.document_mask else None,
    )
    if not len(sequences):
        needed = f"one sequence of data.max_length = {data.max_length}" if split == "train" else "2, a token to predict"
        raise ConfigError(
            f"{where}: the text of column {column!r} has {len(sequences.tokens)} tokens in all, fewer than {needed}"
            + ("; lower it, or give more text" if split == "train" else "; give more text")
        )
    return sequences


def token_stream(batches: Iterable[Sequence[str]], tokenizer: Tokenizer, *, count: bool = False) -> TokenStream:
    """Return the tokens of all texts one after another, with the end-of-text token between two.

    A text is tokenised with the special tokens that the tokenizer adds by itself; where that puts the end-of-text token
    at the end of a text already, no second one follows. Texts of white space alone are left out. 4 bytes a token are
    held, and some 6 % to spare.

    With ``count``, every byte of a text in UTF-8 counts for one token: the first whose end lies at or behind it, as the
    tokenizer gives the places (offsets) of its tokens in the text. So white space between two tokens belongs to the
    second, special tokens have no bytes, and the counts of a text add up to its length. What stands behind the last
    place, if anything, belongs to the last token. A tokenizer that gives no places has a text's bytes spread evenly.
    """
    end, with_places = tokenizer.eos_token_id, count and tokenizer.is_fast
    stream, num_bytes, starts = array("i"), array("i"), array("q")
    assert stream.itemsize == 4
    for texts in batches:
        texts = [text for text in texts if text.strip()]
        if not texts:
            continue
        encoded = tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=with_places
        )
        for i, ids in enumerate(encoded["input_ids"]):
            if stream and stream[-1] != end:
                stream.append(end)
                num_bytes.extend([0] * count)
            starts.extend([len(stream)] * bool(ids))
            stream.extend(ids)
            if count:
                ends = [stop for _, stop in encoded["offset_mapping"][i]] if with_places else None
                num_bytes.extend(_bytes_of_tokens(texts[i], len(ids), ends))
    return TokenStream(_as_numpy(stream, np.int32), _as_numpy(starts, np.int64), _as_numpy(num_bytes, np.int32))


def _as_numpy(values: array[int], dtype: type[np.int32 | np.int64]) -> np.ndarray:
    return np.frombuffer(values, dtype=dtype) if values else np.empty(0, dtype=dtype)


def _bytes_of_tokens(text: str, num_tokens: int, ends: Sequence[int] | None) -> list[int]:
    """Count the bytes of ``text`` that each token stands for; ``ends``: where in the text each ends, in characters."""
    if not num_tokens:
        return []
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(widths)])
    if ends is None:
        reached = upto[-1] * np.arange(1, num_tokens + 1) // num_tokens
    else:
        places = np.maximum.accumulate(np.clip(ends, 0, len(text)))
        places[-1] = len(text)
        reached = upto[places]
    return np.diff(reached, prepend=0).tolist()


def collate_sequences(sequences: Sequences, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return model inputs of sequences of equal length: input_ids and labels, (len(indices), length) int64.

    Labels are the input: the model predicts each from those before it. There is no padding, so no attention mask.
    Where documents do not run on, ``position_ids`` begin anew with each and its first label is -100; a model of
    transformers that is given such positions without an attention mask keeps the documents apart in its attention.
    """
    ids = torch.from_numpy(np.stack([sequences[i] for i in indices]).astype(np.int64))
    if sequences.document_starts is None:
        return {"input_ids": ids, "labels": ids}
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begun = np.zeros(ids.shape, dtype=np.int64)
    for row, index in enumerate(indices):
        starts = sequences.starts_in(index)
        begun[row, starts] = starts
    positions = torch.from_numpy(places - np.maximum.accumulate(begun, axis=1))
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}


def _batches_of_texts(rows: Dataset, column: str, where: str) -> Iterable[list[str]]:
    rows = rows.select_columns([column])
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        yield text_column(rows[start : start + _ROWS_AT_A_TIME][column], column, where, first_row=start)


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


class CausalLM(CausalTask[Sequences]):
    """Sequences of one length, and nothing padded."""

    unit = "sequences"
    pads = False

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_causal_model(data, config, tokenizer, "'causal-lm', which puts it between documents", pads=self.pads)

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Sequences:
        return load_sequences(data, split, tokenizer)

    def collate(self, examples: Sequences, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        return collate_sequences(examples, indices)

    def num_targets(self, examples: Sequences, indices: Sequence[int]) -> int:
        return sum(examples.length - 1 - len(examples.starts_in(i)) for i in indices)

    def metrics(self, outcomes: np.ndarray, examples: Sequences) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], examples.num_predicted, examples.predicted_bytes)


def language_model_metrics(loss_sums: np.ndarray, num_predicted: int, num_bytes: int | None = None) -> dict[str, float]:
    """Return the mean loss of a predicted token (nats) and perplexity, its exponential; and the same of a byte of text.

    ``loss_sums`` is (sequences,) float64; its sum is correctly rounded, so it does not depend on an order.
    ``num_bytes``: of the text that the predicted tokens stand for, in UTF-8, as :func:`token_stream` counts
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


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    """Sum the losses of all tokens of one sequence but its first, and but those with the label -100.

    ``logits`` (length, vocabulary), ``ids`` (length,): one sequence at a time, for its fp32 logits may be large.
    """
    losses = cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    return float(losses.sum(dtype=torch.float64))


TASK = CausalLM
