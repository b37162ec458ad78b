"""Classify, score or embed texts with a model folder: dense or packed for transformers, or a graph for ONNX Runtime."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto import modeling_auto as known

from pst_ds.data.labelled import tokenized_columns
from pst_ds.data.model_limits import positions_of
from pst_ds.errors import InputError
from pst_ds.hf.model_folder import INPUTS, ModelFolder, input_names, open_model_folder
from pst_ds.inference.encoder.pooling import pooling_of
from pst_ds.nn.folder_facts import data_of_run, read_typed
from pst_ds.storage_format import format_opening

Text = str | tuple[str, str]
"""A text, or a pair of texts."""
Features = Mapping[str, Sequence[int]]
"""Tokens of a text as the tokenizer returns them: ``input_ids`` and, for some models, ``token_type_ids``."""
Arrays = dict[str, np.ndarray]
CLASSIFIER = "classifier"
REGRESSOR = "regressor"
EMBEDDER = "embedder"
MOST_TEXTS = 16
"""Default number of texts of a batch."""
MOST_TOKENS = 2048
"""Tokens of a batch, with padding, above which it has fewer texts."""
_SENTENCE_FILE = "sentence_bert_config.json"
"""File of sentence-transformers."""


# total=False: each kind of model has some of the keys
class Prediction(TypedDict, total=False):
    """The prediction for a text: of a classifier, a regressor, or an embedding model."""

    label: str
    probabilities: dict[str, float]
    """By label, which add up to 1 unless the model was trained for several labels per text."""
    number: float
    embedding: list[float]


class Encoder:
    """A model in memory that predicts a label, a number or an embedding for each text. Runs on the CPU."""

    def __init__(
        self, path: str | Path, *, threads: int | None = None, max_length: int | None = None, batch: int | None = None
    ):
        """Open a model folder; :func:`pst_ds.load` has the arguments. Raises InputError."""
        folder = open_model_folder(path)
        config = folder.config
        self.kind = kind_of(folder)
        self.path = folder.path
        self.tokenizer = folder.tokenizer()
        self.labels: list[str] = []
        if self.kind == CLASSIFIER:
            # by number: "10" precedes "2" in files
            in_order = sorted((config.id2label or {}).items())
            self.labels = [str(name) for _, name in in_order]
        self.max_length = _length_limit(folder, self.tokenizer.model_max_length, max_length)
        self.batch = batch or MOST_TEXTS
        # otherwise a text may have several labels, each with its probability
        self._is_exclusive = config.problem_type != "multi_label_classification"
        self._pool = pooling_of(folder.path) if self.kind == EMBEDDER else None
        output = "last_hidden_state" if self.kind == EMBEDDER else "logits"
        storage = format_opening(folder.path)
        self._model: Callable[[Arrays], np.ndarray]
        # None: transformers computes with the folder, packed or not
        if storage is None:
            self._model = _torch_model(folder, output, threads)
        else:
            self._model = storage.encoder(folder.path, output, threads)

    def predict(self, texts: Sequence[Text]) -> list[Prediction]:
        """Return the prediction for each text, or pair of texts; see :meth:`outputs`."""
        return self.described(self.outputs(texts))

    def outputs(self, texts: Sequence[Text]) -> np.ndarray:
        """Return probabilities (texts, labels), numbers (texts, 1) or embeddings (texts, width), in fp32.

        Longer texts are truncated to ``max_length`` tokens. A batch has texts of similar length. Raises InputError.
        """
        features = self.tokenized(texts, self.max_length)
        # placeholders, since batches come in another order than the texts
        rows: list[np.ndarray] = [np.empty(0)] * len(features)
        for batch in batches(_lengths(features), self.batch):
            outputs = self.compute([features[index] for index in batch])
            for index, row in zip(batch, outputs, strict=True):
                rows[index] = row
        return np.array(rows, np.float32)

    def tokenized(
        self, texts: Sequence[Text], max_length: int | None, tokenizer: Tokenizer | None = None
    ) -> Sequence[Features]:
        """Return the tokens of each text, truncated unless ``max_length`` is None. Raises InputError.

        ``tokenizer``: a copy of the model's, which another thread may use at the same time.
        """
        is_single = all(isinstance(text, str) for text in texts)
        are_pairs = all(_is_pair(text) for text in texts)
        # a string is a sequence of strings too, so it would pass as a list of single letters
        if isinstance(texts, str) or not (is_single or are_pairs):
            raise InputError("texts: expected a list of strings, or of pairs of strings. Put a single text into a list")
        columns: list[Sequence[str]] = [list(map(str, texts))]
        if not is_single:
            # the first texts of all pairs, and the second ones
            columns = list(zip(*texts, strict=True))
        features = tokenized_columns(columns, max_length, tokenizer or self.tokenizer)
        for index, length in enumerate(_lengths(features)):
            # a tokenizer without special tokens returns none for an empty text, of which no model makes anything
            if not length:
                raise InputError(f"texts[{index}]: the tokenizer returns no tokens for it. Give a text")
        return features

    def compute(self, features: Sequence[Features]) -> np.ndarray:
        """Return what :meth:`outputs` does, for one batch of tokenised texts."""
        feed = self._padded(features)
        outputs = self._model(feed)
        if self._pool is not None:
            outputs = self._pool(outputs, feed["attention_mask"])
        elif self.kind == CLASSIFIER:
            logits = torch.from_numpy(outputs)
            probabilities = logits.softmax(-1) if self._is_exclusive else logits.sigmoid()
            outputs = probabilities.numpy()
        # JSON has no NaN, and a label chosen from NaNs would look like an answer
        if not np.isfinite(outputs).all():
            raise FloatingPointError(f"{self.path}: the model's outputs are not finite. Export it in fp32")
        return outputs

    def _padded(self, features: Sequence[Features]) -> Arrays:
        """Return the inputs of a batch, (texts, tokens of the longest text) each, with padding at the end."""
        lengths = _lengths(features)
        shape = (len(features), max(lengths))
        feed: Arrays = {}
        for name in INPUTS:
            feed[name] = np.zeros(shape, np.int64)
        # padding is masked, so that any token does for a tokenizer without a padding token
        feed["input_ids"] += self.tokenizer.pad_token_id or 0
        for row, tokens in enumerate(features):
            for name, values in tokens.items():
                feed[name][row, : len(values)] = values
            feed["attention_mask"][row, : lengths[row]] = 1
        return feed

    def plain(self, outputs: np.ndarray) -> list[list[float]]:
        """Return :meth:`outputs` as JSON values. Except numbers, they are rounded: fp32 has more digits in decimal."""
        if self.kind != REGRESSOR:
            # fp32 would round to the nearest fp32 value, which has more digits again
            outputs = outputs.astype(np.float64).round(7)
        rows: list[list[float]] = outputs.tolist()
        return rows

    def described(self, outputs: np.ndarray) -> list[Prediction]:
        """Return the predictions for :meth:`outputs`, as JSON values."""
        predictions: list[Prediction] = []
        for output, row in zip(outputs, self.plain(outputs), strict=True):
            predictions.append(self._prediction(output, row))
        return predictions

    def _prediction(self, output: np.ndarray, row: list[float]) -> Prediction:
        """Return the prediction for one row of :meth:`outputs`. ``row``: the same as JSON values, rounded."""
        if self.kind == REGRESSOR:
            return {"number": row[0]}
        if self.kind == EMBEDDER:
            return {"embedding": row}
        # of the unrounded probabilities: rounding may make two equal
        label = self.labels[output.argmax()]
        return {"label": label, "probabilities": dict(zip(self.labels, row, strict=True))}


def _is_pair(text: object) -> bool:
    # a tuple or a list, as Python and JSON have pairs
    if not isinstance(text, tuple | list) or len(text) != 2:
        return False
    return all(isinstance(part, str) for part in text)


def _lengths(features: Sequence[Features]) -> list[int]:
    """Return the number of tokens of each text."""
    return [len(tokens["input_ids"]) for tokens in features]


def batches(lengths: Sequence[int], most_texts: int) -> Iterator[list[int]]:
    """Yield the indices of texts that are computed together, the longest first; none is half padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch:
            # every text of the batch is padded to this
            longest = lengths[batch[0]]
            is_full = len(batch) == most_texts or (len(batch) + 1) * longest > MOST_TOKENS
            if is_full or 2 * lengths[index] < longest:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def kind_of(folder: ModelFolder) -> str:
    """Return what a model predicts. Raises InputError for a model that is none of the three."""
    config = folder.config
    name = (config.architectures or ["nothing"])[0]
    if name in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        if config.num_labels == 1:
            return REGRESSOR
        # several numbers per text are none of the three
        if config.problem_type != "regression":
            return CLASSIFIER
    elif name in known.MODEL_MAPPING_NAMES.values():
        return EMBEDDER
    raise InputError(
        f"{folder.path}: config.json names {name}, which predicts neither a label, a number nor an embedding per text. "
        "Name the folder of a classifier, a regressor, or an encoder without a head"
    )


class _SentenceConfig(BaseModel):
    """What is read of :data:`_SENTENCE_FILE`."""

    model_config = ConfigDict(strict=True)

    max_seq_length: int | None = None


def _length_limit(folder: ModelFolder, of_tokenizer: int, asked: int | None) -> int:
    """Return the maximum tokens of a text. Raises InputError if ``asked`` is more than the positions."""
    # a model without position embeddings has no limit
    positions = (positions_of(folder.config) or 1 << 20) - folder.extra_tokens
    if asked:
        if asked > positions:
            raise InputError(f"max_length = {asked}: {folder.path} has {positions} positions. Set at most as many")
        return asked
    sentences = read_typed(folder.path / _SENTENCE_FILE, _SentenceConfig, "Copy it from the original model")
    # tokenizers without a limit state a huge number, and files may state none
    limits = [positions, of_tokenizer, data_of_run(folder.path).max_length, sentences.max_seq_length]
    return min(limit for limit in limits if isinstance(limit, int) and limit > 0)


def _torch_model(folder: ModelFolder, output: str, threads: int | None) -> Callable[[Arrays], np.ndarray]:
    """Load the model for transformers. Return a function of a batch's inputs to its ``output``, (texts, ...) fp32."""
    module = folder.load()
    names = input_names(module)
    # of the whole process: torch has no threads per model
    if threads:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def model(feed: Arrays) -> np.ndarray:
        inputs = {name: torch.from_numpy(feed[name]) for name in names}
        outputs = module(**inputs, return_dict=True)
        return outputs[output].float().numpy()  # numpy has no bf16

    return model
