"""The low-rank update W = W0 + beta U V (arXiv 2106.09685), which compiled kernels compute."""

import math
from collections.abc import Mapping

from torch import Tensor

from pst_ds.core.forms.form import ParamSpec, Tile, UpdateForm, UpdateSettings


class LowRank(UpdateForm):
    """W = W0 + beta U V with U (O, r) and V (r, I), r = ``pst.update_rank``.

    Layers compute it by the functions of :mod:`pst_ds.core.scores` and the kernels behind them, which round in a fixed
    order; :meth:`apply` is the formula in plain torch, for tests and readers.
    """

    has_kernels = True

    def parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        """Return U and V, one of which starts at zero; None for both at rank 0."""
        rank = settings.update_rank
        if rank == 0:
            return {"U": None, "V": None}
        std = update_init_std(settings, inputs)
        starts_at_v = settings.update_init == "lora"
        return {
            "U": ParamSpec((outputs, rank), std=0.0 if starts_at_v else std),
            "V": ParamSpec((rank, inputs), std=std if starts_at_v else 0.0),
        }

    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        left = parameters["U"][tile.outputs]
        right = parameters["V"][:, tile.inputs]
        return weight + beta * (left @ right)


def update_init_std(settings: UpdateSettings, inputs: int) -> float:
    """Return the initial standard deviation of U or V, whichever does not start at zero."""
    if settings.update_init != "lora":
        return settings.update_init_scale
    # LoRA's A is Kaiming-uniform with a = sqrt(5)
    return settings.update_init_scale * (1.0 / math.sqrt(3.0 * inputs))


LOW_RANK = LowRank()
