"""What decoders predict on a text: perplexity, and the KL divergence from a reference whose logits are in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pst_ds.core.kl_divergence import KLDivergence

if TYPE_CHECKING:
    from tools.bench.peers.engines import Engine

ROWS = 128
"""Predictions whose logits are compared together."""


def write_logits(engine: Engine, threads: int, chunks: Sequence[Sequence[int]], file: Path) -> None:
    """Write the logits that predict the tokens of ``chunks``, which are equally long, except the first of each.

    fp32, (chunks, tokens - 1, vocabulary).
    """
    engine.use(threads)
    partial = file.with_suffix(".part")
    with partial.open("wb") as out:
        for chunk in chunks:
            engine.all_logits(chunk)[:-1].tofile(out)
    partial.replace(file)


def quality(
    engine: Engine, threads: int, chunks: Sequence[Sequence[int]], references: Mapping[str, Path]
) -> tuple[float, dict[str, dict[str, float]]]:
    """Return the mean loss in nats over separate chunks, without the first token of each, and for each reference the
    result of :class:`KLDivergence`. ``references``: files of :func:`write_logits` for the same chunks, by name."""
    engine.use(threads)
    loss, divergences = 0.0, {name: KLDivergence() for name in references}
    for number, chunk in enumerate(chunks):
        logits, following = torch.from_numpy(engine.all_logits(chunk)[:-1]), torch.tensor(chunk[1:])
        for start in range(0, len(following), ROWS):
            part = slice(start, start + ROWS)
            losses = cross_entropy(logits[part], following[part], reduction="none")
            loss += float(losses.sum(dtype=torch.float64))
            for name, file in references.items():
                known = np.memmap(file, np.float32, "r", shape=(len(chunks), *logits.shape))
                divergences[name].add(torch.from_numpy(known[number, part].copy()), logits[part])
    predicted = sum(len(chunk) - 1 for chunk in chunks)
    return loss / predicted, {name: found.result() for name, found in divergences.items()}
