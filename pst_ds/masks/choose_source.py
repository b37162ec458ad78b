"""Choose what makes the masks of a run, once, from its model and schedules."""

import torch
from torch import nn

from pst_ds.core.schedule import Schedules
from pst_ds.errors import InputError
from pst_ds.masks.base_zeros import BaseZeros
from pst_ds.masks.experts import ExpertRemoval
from pst_ds.masks.mask_source import MaskSource, NoMasks
from pst_ds.masks.ranking import Ranking
from pst_ds.masks.solve import Solving
from pst_ds.nn.inject import injected_config
from pst_ds.nn.router import pst_routers


def choose_source(
    model: nn.Module,
    schedules: Schedules,
    *,
    criterion: object = None,
    device: torch.device | None = None,
    by_token: bool = False,
) -> MaskSource:
    """Return what chooses the masks of ``model``, which has PST layers unless ``schedules`` never change masks.

    Args:
        criterion: What ranks the weights: a Criterion, or a function of a slice; None for that of the model's config.
        device: Device of the computation, which solves use; None for the CPU.
        by_token: Weight tokens by their gradients in solves, see :class:`pst_ds.nn.gradient_sums.GradientSums`.

    Raises InputError for what is not a criterion, and for a criterion of a model whose weights are not ranked.
    """
    if schedules.masks is None:
        return NoMasks()
    # before the routers: masks of zeros fit stacks of experts too
    if injected_config(model).initial_mask == "zeros":
        if criterion is not None:
            raise InputError(
                'criterion: initial_mask = "zeros" keeps the non-zeros of the base model, and ranks no weights. Remove '
                "one of them"
            )
        return BaseZeros(model)
    if pst_routers(model):
        return ExpertRemoval(model)
    if schedules.has_solves:
        return Solving(model, device or torch.device("cpu"), by_token=by_token)
    return Ranking(model, criterion)
