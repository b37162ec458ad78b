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
        return low_rank_pair(outputs, inputs, settings)

    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        left = parameters["U"][tile.outputs]
        right = parameters["V"][:, tile.inputs]
        return weight + beta * (left @ right)


def low_rank_pair(outputs: int, inputs: int, settings: UpdateSettings) -> dict[str, ParamSpec | None]:
    """Return U and V of a product at a rank above 0."""
    rank = settings.update_rank
    u_std = 0.0
    v_std = 0.0
    # One of them starts at zero, so that training starts at W0. The other does not, or neither would have a gradient.
    if settings.update_init == "lora":
        v_std = update_init_std(settings, inputs)
    else:
        u_std = update_init_std(settings, inputs)
    return {"U": ParamSpec((outputs, rank), std=u_std), "V": ParamSpec((rank, inputs), std=v_std)}


def update_init_std(settings: UpdateSettings, inputs: int) -> float:
    """Return the initial standard deviation of that of U and V which does not start at zero."""
    if settings.update_init != "lora":
        return settings.update_init_scale
    # That of LoRA's A, which is Kaiming-uniform with a = sqrt(5).
    return settings.update_init_scale * (1.0 / math.sqrt(3.0 * inputs))


LOW_RANK = LowRank()
