"""What a run is trained to do: everything in which one task differs from another, chosen once by its name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pst_ds.config.run import ConfigError, DataConfig, EvalConfig, RunConfig, TaskName
from pst_ds.data import causal_lm as packing
from pst_ds.data import data_to_text, generation, regression
from pst_ds.data import labelled as texts
from pst_ds.data.text_metrics import text_metrics


class ExampleSet(Protocol):
    """The examples of one split."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        ...

    @property
    def digest(self) -> str:
        """A SHA-256 of all that a model reads of them."""
        ...

    def first(self, count: int) -> Any:
        """The first ``count`` of them."""
        ...


class Task(Protocol):
    """Reading, batching, the model's class and scoring. Example sets go back only to the task that loaded them."""

    unit: str
    """What its examples are called."""
    pads: bool
    """Whether examples of different length go into one batch; the tokenizer and the model then have a padding token."""
    new_head: bool
    """Whether the model may have weights that the pretrained one lacks; they are drawn anew."""
    lower_is_better: bool
    """Of the metric that chooses the best checkpoint."""

    def model_class(self) -> Any:
        """The ``Auto`` class of transformers that builds its model."""
        ...

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        """Raise ConfigError when the model of a transformers ``config`` cannot do the task; without a ``tokenizer`` its
        vocabulary may be any."""
        ...

    def label_names(self, data: DataConfig) -> list[str]:
        """Names of the classes, in the order of their ids; none if the task has no classes."""
        ...

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """What the transformers config is told beside the pretrained model's own."""
        ...

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> Any:
        """The examples of a split. Raises ConfigError."""
        ...

    def collate(self, examples: Any, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """Model inputs of some examples, with their ``labels``: the model's loss is the mean over them."""
        ...

    def num_targets(self, examples: Any, indices: Sequence[int]) -> int:
        """How many values that mean is over, up to a factor that all examples have in common."""
        ...

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        """What the metrics need of each example of a batch: (examples, k)."""
        ...

    def metrics(self, outcomes: np.ndarray, examples: Any) -> dict[str, float]:
        """Metrics of all examples, from their outcomes in the order of ``examples``."""
        ...


class Classification:
    """One of several classes for a text or a pair of texts; outcomes are logits, (examples, classes) fp32."""

    unit = "examples"
    pads = True
    new_head = True
    lower_is_better = False

    def __init__(self, metric: str = ""):
        self._metric = metric

    def model_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        if tokenizer is not None:
            _require_vocabulary(config, tokenizer, pads=self.pads)
        _require_positions(data, config)

    def label_names(self, data: DataConfig) -> list[str]:
        names = texts.label_names(data)
        if self._metric == "f1" and len(names) != 2:
            raise ConfigError(
                f"eval.metric = 'f1' is that of the second of two classes, and data.train has {len(names)}; set "
                'eval.metric = "macro_f1"'
            )
        return names

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        ids = dict(enumerate(labels))
        return {
            "num_labels": len(labels),
            "id2label": ids,
            "label2id": {label: i for i, label in ids.items()},
            "problem_type": "single_label_classification",  # whatever the base was trained for
        }

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> texts.Examples:
        return texts.load_examples(data, split, tokenizer, labels)

    def collate(self, examples: texts.Examples, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        return texts.collate(examples, indices, tokenizer)

    def num_targets(self, examples: Any, indices: Sequence[int]) -> int:
        return len(indices)

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        return logits.float().cpu().numpy()

    def metrics(self, outcomes: np.ndarray, examples: texts.Examples) -> dict[str, float]:
        return classification_metrics(outcomes, examples.labels)


class Regression(Classification):
    """A number for a text or a pair of texts, by the squared error; outcomes are predictions, (examples, 1) fp32."""

    def __init__(self, metric: str = ""):
        super().__init__(metric)
        self.lower_is_better = metric == "mse"

    def label_names(self, data: DataConfig) -> list[str]:
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> texts.Examples:
        return regression.load_scored_texts(data, split, tokenizer)

    def metrics(self, outcomes: np.ndarray, examples: texts.Examples) -> dict[str, float]:
        return regression.regression_metrics(outcomes[:, 0], examples.labels)


class CausalLM:
    """The next token of text; outcomes are the sums of the token losses of each sequence, (sequences, 1) float64."""

    unit = "sequences"
    pads = False
    new_head = False
    lower_is_better = True

    def model_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        _check_causal_model(data, config, tokenizer, "'causal-lm', which puts it between documents", pads=self.pads)

    def label_names(self, data: DataConfig) -> list[str]:
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> packing.Sequences:
        return packing.load_sequences(data, split, tokenizer)

    def collate(self, examples: packing.Sequences, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        return packing.collate_sequences(examples, indices)

    def num_targets(self, examples: Any, indices: Sequence[int]) -> int:
        return len(indices)  # all sequences have one length

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        return np.array([[_loss_sum(of, ids)] for of, ids in zip(logits, batch["labels"], strict=True)])

    def metrics(self, outcomes: np.ndarray, examples: packing.Sequences) -> dict[str, float]:
        num_predicted = sum(examples.lengths) - len(examples)
        return language_model_metrics(outcomes[:, 0], num_predicted, examples.predicted_bytes)


class DataToText(CausalLM):
    """The text that tells some data, after the data; outcomes are the sum of the losses of its tokens, and how many
    these are: (examples, 2) float64. ``pst-ds eval`` and ``verify`` also have texts written, and score them."""

    unit = "examples"
    pads = True

    def __init__(self, settings: EvalConfig):
        self.settings = settings

    def check_model(self, data: DataConfig, config: Any, tokenizer: Any) -> None:
        _check_causal_model(data, config, tokenizer, "'data-to-text', which ends texts with it", pads=self.pads)
        positions = positions_of(config)
        if 0 < positions <= self.settings.max_new_tokens + 1:
            raise ConfigError(
                f"eval.max_new_tokens = {self.settings.max_new_tokens} leaves no room for data in the {positions} "
                "positions of the model (max_position_embeddings); lower it"
            )

    def load(self, data: DataConfig, split: str, tokenizer: Any, labels: Sequence[str]) -> Any:
        return data_to_text.load_pairs(data, split, tokenizer)

    def collate(self, examples: Any, indices: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        return data_to_text.collate_pairs(examples, indices, tokenizer)

    def num_targets(self, examples: Any, indices: Sequence[int]) -> int:
        return sum(examples.num_targets(i) for i in indices)

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        predicted = (batch["labels"] != data_to_text.IGNORED).sum(1).tolist()
        sums = super().outcomes(logits, batch)[:, 0]
        return np.array([*zip(sums, predicted, strict=True)], dtype=np.float64)

    def metrics(self, outcomes: np.ndarray, examples: Any) -> dict[str, float]:
        return language_model_metrics(outcomes[:, 0], int(outcomes[:, 1].sum()))

    def write(self, model: Any, examples: Any, tokenizer: Any, batch_size: int, device: str) -> list[str]:
        """What a whole ``model`` of transformers writes for each distinct piece of data."""
        positions = positions_of(model.config)
        room = positions - self.settings.max_new_tokens if positions else examples.max_length
        return generation.write_texts(model, examples.prompts(room), tokenizer, self.settings, batch_size, device)

    def text_metrics(self, written: Sequence[str], examples: Any) -> dict[str, float]:
        """BLEU, ROUGE-L and chrF of the texts that :meth:`write` returned."""
        return text_metrics(written, examples.references)


def task_of(run: RunConfig) -> Task:
    """The task of a run."""
    return _TASKS[run.task](run)


_TASKS: dict[TaskName, Callable[[RunConfig], Task]] = {
    "classification": lambda run: Classification(run.metric),
    "regression": lambda run: Regression(run.metric),
    "causal-lm": lambda run: CausalLM(),
    "data-to-text": lambda run: DataToText(run.eval),
}


def classification_metrics(logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """Accuracy, macro-averaged F1 and Matthews' correlation, as scikit-learn computes them; of two classes also the F1
    of the second, as GLUE has it."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
    if logits.shape[1] == 2:
        metrics["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
    return metrics


def language_model_metrics(loss_sums: np.ndarray, num_predicted: int, num_bytes: int | None = None) -> dict[str, float]:
    """Mean loss of a predicted token (nats) and perplexity, its exponential; and the same of a byte of text.

    ``loss_sums`` is (sequences,) float64; its sum is correctly rounded, so it does not depend on an order.
    ``num_bytes``: of the text that the predicted tokens stand for, in UTF-8, as :func:`packing.counted_token_stream`
    counts them. ``byte_perplexity`` is exp(sum / bytes) and ``bits_per_byte`` its binary logarithm; unlike perplexity
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
    """Sum of the losses of all tokens of one sequence but its first, and but those with the label -100.

    ``logits`` (length, vocabulary), ``ids`` (length,): one sequence at a time, for its fp32 logits may be large.
    """
    losses = cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    return float(losses.sum(dtype=torch.float64))


def _check_causal_model(data: DataConfig, config: Any, tokenizer: Any, task: str, *, pads: bool) -> None:
    _refuse_encoder(config, task.partition(",")[0])
    if tokenizer is not None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer has no end-of-text token (eos_token) for task {task}; name the language model's own "
                "tokenizer with model.tokenizer"
            )
        _require_vocabulary(config, tokenizer, pads=pads)
    _require_positions(data, config)


def _require_vocabulary(config: Any, tokenizer: Any, *, pads: bool) -> None:
    vocabulary, end = getattr(config.get_text_config(), "vocab_size", None), tokenizer.eos_token_id
    if vocabulary is None:
        return
    if max(tokenizer.vocab_size, (end or 0) + 1) > vocabulary:
        also = f" and the end-of-text token {end}" if end is not None else ""
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens{also}, the model only {vocabulary} (vocab_size); name the "
            "model's own tokenizer with model.tokenizer"
        )
    if pads and (tokenizer.pad_token_id or 0) >= vocabulary:
        raise ConfigError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the model "
            f"only {vocabulary} tokens (vocab_size); name a tokenizer whose pad_token is one of them (model.tokenizer)"
        )


def _require_positions(data: DataConfig, config: Any) -> None:
    positions = positions_of(config)
    if 0 < positions < data.max_length:
        raise ConfigError(
            f"data.max_length = {data.max_length} is more than the {positions} positions of the model "
            f"(max_position_embeddings); set it to at most {positions}"
        )


def positions_of(config: Any) -> int:
    """How many tokens of a text a model of transformers ``config`` has positions for; 0 for no limit that the config
    names, or for positions that are relative alone."""
    if getattr(config, "position_biased_input", True) is False:  # DeBERTa
        return 0
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return positions - (config.pad_token_id or 0) - 1 if positions and _counts_from_padding(config) else positions


def _counts_from_padding(config: Any) -> bool:
    """Whether the first token has the position after the padding token's id, as in RoBERTa and all that took its
    embeddings over: their code has a function of its own for it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_class = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):
        return False
    code = sys.modules[model_class.__module__]
    return any(hasattr(thing, "create_position_ids_from_input_ids") for thing in (code, *vars(code).values()))


def is_causal(config: Any) -> bool:
    """Whether transformers has a language model for ``config`` that sees no token it is to predict."""
    from transformers.models.auto import modeling_auto as known

    return config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _sees_both_ways(config)


def _sees_both_ways(config: Any) -> bool:
    """BERT and its like have a causal class in transformers, which looks both ways unless the config says otherwise."""
    from transformers.models.auto import modeling_auto as known

    both_ways = config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return both_ways and not getattr(config, "is_decoder", True)


def _refuse_encoder(config: Any, task: str) -> None:
    if _sees_both_ways(config):
        raise ConfigError(
            f"the model is a {config.model_type} whose config says is_decoder = false: it sees the tokens that task "
            f"{task} has it predict. Name a causal language model (GPT-2, Llama, Qwen, ...)"
        )
