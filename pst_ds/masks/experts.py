"""Remove whole experts during training: those with the lowest REAP scores so far."""

import torch
from torch import Tensor, nn

from pst_ds.core.bits import pack_shard
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.nn.cut_config import experts_left
from pst_ds.nn.expert_scores import ExpertScores, highest
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import text_config
from pst_ds.nn.router import pst_routers, stacks_of


@torch.no_grad()
def remove_experts(model: nn.Module, scores: ExpertScores, sparsity: float) -> MaskStats:
    """Remove experts of every block until floor(``sparsity`` * E) are gone; a removed expert never comes back.

    The masks of a removed expert prune all its weights, and its router gives it no token. ``scores`` must be those of
    all ranks. Collective. Raises InputError if fewer experts would be left than a token is routed to.
    """
    config, written = text_config(model), dict[PSTLayer, Tensor]()
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
        first, last = (min(max(at, start), stop) - start for at in stack.whole_layout.expert_range(expert))
        keep[first:last] = 1
    return pack_shard(keep, own.numel())
