"""The Kullback-Leibler divergence of a model's predictions from those of a reference model, over batches of rows."""

import numpy as np
import torch
from torch import Tensor


class KLDivergence:
    """Accumulates KL(reference || model) of softmax distributions, in nats per row. Keeps 8 bytes per row."""

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []
        self._agreeing = 0

    @torch.no_grad()
    def add(self, reference_logits: Tensor, logits: Tensor) -> None:
        """Add rows of logits, both (rows, classes) of any floating dtype; they are copied to fp32.

        Classes that the reference excludes with a logit of -inf add 0. Those that only the model excludes make a row
        infinite.
        """
        log_p = torch.log_softmax(reference_logits.float(), -1)
        log_q = torch.log_softmax(logits.float(), -1)
        p = log_p.exp()
        terms = p * (log_p - log_q)
        # 0 times minus infinity would be NaN: the limit of p log p is 0
        terms.masked_fill_(p == 0.0, 0.0)
        self._divergences.append(terms.sum(-1, dtype=torch.float64).cpu())
        self._agreeing += int((reference_logits.argmax(-1) == logits.argmax(-1)).sum())

    def result(self) -> dict[str, float]:
        """Return figures of all rows so far, at least one.

        "kl_mean"; "kl_p99", which 99 % of the rows do not exceed; "same_top", the share of rows whose most likely class
        is the reference's.
        """
        rows = torch.cat(self._divergences).numpy()
        high = np.quantile(rows, 0.99, method="inverted_cdf")  # interpolation would subtract infinities
        return {"kl_mean": float(rows.mean()), "kl_p99": float(high), "same_top": self._agreeing / len(rows)}
