"""Remove whole experts during training: those with the lowest REAP scores so far."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pst_ds.core.bits import pack_shard
from pst_ds.masks.mask_source import MaskSource
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.nn.cut_config import experts_left
from pst_ds.nn.expert_scores import ExpertScores, highest
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import text_config
from pst_ds.nn.router import pst_routers, scores_of_routers, stacks_of
from pst_ds.parallel.ranks import sum_over_ranks


class ExpertRemoval(MaskSource):
    """Removes the experts with the lowest scores on calibration examples and all batches so far."""

    needs_calibration = True

    def __init__(self, model: nn.Module):
        self._model = model
        self._scores: ExpertScores | None = scores_of_routers(model)
        """None once no more experts are removed."""

    def expect(self, inputs: Mapping[str, Tensor]) -> None:
        if self._scores is not None:
            self._scores.expect(inputs)

    def observing(self) -> AbstractContextManager[object]:
        if self._scores is None:
            return nullcontext()
        return self._scores.listening()

    def after_batch(self) -> None:
        if self._scores is not None:
            self._scores.add_up(sum_over_ranks)

    def update(self, target: float, progress: float) -> MaskStats:
        assert self._scores is not None
        return remove_experts(self._model, self._scores, target)

    def collected(self) -> dict[str, list[list[int]]]:
        if self._scores is None:
            return {}
        # integers, which JSON keeps exactly
        return {name: sums.tolist() for name, sums in self._scores.sums.items()}

    def restore(self, collected: Mapping[str, Sequence[Sequence[int]]]) -> None:
        if self._scores is not None:
            self._scores.sums |= {name: torch.tensor(sums) for name, sums in collected.items()}

    def close(self) -> None:
        self._scores = None


@torch.no_grad()
def remove_experts(model: nn.Module, scores: ExpertScores, sparsity: float) -> MaskStats:
    """Remove experts of every block until floor(``sparsity`` * E) are gone; a removed expert never comes back.

    The masks of a removed expert prune all its weights, and its router gives it no token. ``scores`` must be those of
    all ranks. Collective. Raises InputError if fewer experts would be left than a token is routed to.
    """
    config = text_config(model)
    written: dict[PSTLayer, Tensor] = {}
    for router in pst_routers(model).values():
        left = experts_left(router.num_embeddings, sparsity, config, "schedule.final_sparsity =")
        before = router.kept.cpu()
        kept = before[highest(scores.scores(router.experts)[before], min(left, len(before)))]
        for stack in stacks_of(model, router):
            written[stack] = _bits(stack, kept)
        router.kept = kept.to(router.kept.device)
    return mask_stats(model, written)


def _bits(stack: PSTExpertStack, kept: Tensor) -> Tensor:
    """Return this rank's mask bits of a stack of which the experts ``kept`` stay whole."""
    start, stop = stack.own_range()
    own = stack.own_bits()
    keep = torch.zeros(stop - start, dtype=torch.uint8, device=own.device)
    for expert in kept.tolist():
        first, last = stack.whole_layout.expert_range(expert)
        # the part of the expert that lies in this rank's shard; empty for most
        first = min(max(first, start), stop) - start
        last = min(max(last, start), stop) - start
        keep[first:last] = 1
    return pack_shard(keep, own.numel())
