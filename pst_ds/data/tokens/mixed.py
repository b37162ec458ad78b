"""Sequences of several sources, mixed by weight."""

import hashlib
from collections.abc import Sequence

import numpy as np

from pst_ds.data.tokens.order import Mixture, in_passes
from pst_ds.data.tokens.sequences import Sequences, TokenSequence


class MixedSequences:
    """The concatenated sequences of several sources; a run uses them in the order of :meth:`ordered`.

    Without ``weights``, each sequence occurs once per epoch. With weights, each source has its fraction of any number
    of sequences, and restarts in another order when it is used up.

    Args:
        sources: Training sequences of equal length.
    """

    def __init__(self, sources: Sequence[Sequences], weights: tuple[float, ...] = ()):
        self.sources = tuple(sources)
        self.weights = weights
        self._mixture: Mixture | None = None
        if weights:
            self._mixture = Mixture(weights)
        # (sources + 1,): index of the first sequence of each source, and of the end
        self._starts = np.cumsum([0, *map(len, sources)], dtype=np.int64)
        self.apart = any(source.apart for source in sources)
        self.masks_tokens = any(source.masks_tokens for source in sources)
        self.several_documents = any(source.several_documents for source in sources)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: a broadcast view."""
        return np.broadcast_to(np.int64(self.sources[0].length), len(self))

    def __getitem__(self, index: int) -> TokenSequence:
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[source][index - int(self._starts[source])]

    @property
    def digest(self) -> str:
        """SHA-256 of all sources and their mixture."""
        about = [*(source.digest for source in self.sources), repr(self.weights)]
        return hashlib.sha256(" ".join(about).encode()).hexdigest()

    @property
    def num_predicted(self) -> int:
        """Predicted tokens of all sequences."""
        return sum(source.num_predicted for source in self.sources)

    def ordered(self, numbers: np.ndarray, seed: int | str) -> np.ndarray:
        """Return the sequences at ``numbers`` of the shuffled mixture: int64."""
        if self._mixture is None:
            return in_passes(numbers, len(self), f"{seed}")
        sources, before = self._mixture.at(numbers)
        # The key names the source, so that two sources of one size are not read in the same order.
        indices = np.empty_like(before)
        for source in np.unique(sources):
            chosen = sources == source
            inside = in_passes(before[chosen], len(self.sources[source]), f"{seed}/{source}")
            indices[chosen] = self._starts[source] + inside
        return indices

    def first(self, count: int) -> "MixedSequences":
        """Return the first ``count`` sequences by index."""
        parts: list[Sequences] = []
        for source, start in zip(self.sources, self._starts.tolist(), strict=False):
            part = source.first(max(0, count - start))
            if len(part):
                parts.append(part)
        return MixedSequences(parts)
