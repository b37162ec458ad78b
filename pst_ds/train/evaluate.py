"""Predictions and metrics. Every example is counted once, and the batches do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pst_ds.parallel.ranks import all_gather_objects, rank, world_size
from pst_ds.train.data import Examples, collate


@torch.no_grad()
def predict(model: Callable[..., Any], examples: Examples, tokenizer: Any, batch_size: int, device: str) -> np.ndarray:
    """Logits, (num examples, num classes) fp32 in the order of ``examples``, on every rank.

    Ranks take turns at the batches; one that runs out repeats its last and drops the answer, since under ZeRO-3 all
    must run the same layers. Collective. ``model`` must be in evaluation mode.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples.features[i]["input_ids"]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own: list[tuple[list[int], np.ndarray]] = []
    for first in range(0, len(batches), world_size()):
        turn = first + rank()
        batch = batches[min(turn, len(batches) - 1)]
        inputs = {k: v.to(device) for k, v in collate(examples, batch, tokenizer).items() if k != "labels"}
        logits = model(**inputs).logits.float().cpu().numpy()
        if turn < len(batches):
            own.append((batch, logits))
    pieces = [piece for of_rank in all_gather_objects(own) for piece in of_rank]
    everything = np.empty((len(examples), pieces[0][1].shape[1]), dtype=np.float32)
    for indices, logits in pieces:
        everything[indices] = logits
    return everything


def classification_metrics(logits: np.ndarray, labels: list[int]) -> dict[str, float]:
    """Accuracy, macro-averaged F1 and Matthews' correlation, as scikit-learn computes them."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
