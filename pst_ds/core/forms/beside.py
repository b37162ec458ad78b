"""The update next to the mask: y = x (M . W0)' + beta (x V') U', whose product the mask does not cut."""

from collections.abc import Mapping

from torch import Tensor

from pst_ds.core.forms.form import ParamSpec, Tile, UpdateForm, UpdateSettings
from pst_ds.core.forms.low_rank import LOW_RANK


class Beside(UpdateForm):
    """M . W0 + beta U V with U (O, r) and V (r, I), r = ``pst.update_rank``, which start like those of U V.

    Under a mask of 90 % sparsity, U V keeps a tenth of its entries. Here it keeps all of them, at two thin products per
    layer. The terms are never added up: layers multiply with each (``pst_ds.core.updates``).
    """

    is_beside = True

    def parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        """Return U and V as for U V; None for both at rank 0."""
        return LOW_RANK.parameters(outputs, inputs, settings)

    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        """Return ``weight`` unchanged: what the mask prunes, and what scores rank, is W0."""
        return weight
