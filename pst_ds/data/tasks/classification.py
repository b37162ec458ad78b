"""Classify a text or a pair of texts, with a new head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data import labelled as texts
from pst_ds.data.model_limits import check_model
from pst_ds.data.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


class Classification(Task[texts.Examples]):
    """Classify a text or a pair of texts; outcomes are logits, (examples, classes) fp32."""

    def model_class(self) -> type[_BaseAutoModelClass]:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        check_model(data, config, tokenizer, pads=self.pads)

    def label_names(self, data: DataConfig) -> list[str]:
        names = texts.label_names(data)
        if self.evaluation.metric == "f1" and len(names) != 2:
            raise ConfigError(
                f"eval.metric = 'f1': F1 of the second class needs two classes, and data.train has {len(names)}. Set "
                'eval.metric = "macro_f1"'
            )
        return names

    def config_options(self, labels: Sequence[str]) -> dict[str, object]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            # the base may have been trained for another
            "problem_type": "single_label_classification",
        }

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> texts.Examples:
        return texts.load_examples(data, split, tokenizer, labels)

    def collate(self, examples: texts.Examples, indices: Sequence[int], tokenizer: Tokenizer) -> dict[str, Tensor]:
        return texts.collate(examples, indices, tokenizer)

    def num_labels(self, examples: texts.Examples) -> int:
        return len(set(examples.labels))

    def outcomes(self, logits: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        return logits.float().cpu().numpy()

    def metrics(self, outcomes: np.ndarray, examples: texts.Examples) -> dict[str, float]:
        return classification_metrics(outcomes, examples.labels)


def classification_metrics(logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """Return scikit-learn's accuracy, macro-averaged F1 and Matthews' correlation, and the mean cross-entropy (nats).
    For two classes also "f1", of the second class, as in GLUE. ``logits``: (examples, classes)."""
    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    metrics = {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
    if logits.shape[1] == 2:
        # 0 without a warning where the second class is neither predicted nor there, as early in training
        metrics["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
    log_probabilities = log_softmax(logits.astype(np.float64), -1)
    classes = np.asarray(labels, dtype=np.int64)
    log_probabilities_of_labels = log_probabilities[np.arange(len(labels)), classes]
    return {**metrics, "loss": -float(log_probabilities_of_labels.mean())}


TASK = Classification
