"""Learned ranks: a low-rank update whose terms have gates, which a penalty closes (after arXiv 2509.03057)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.core.forms.form import ParamSpec, Tile, UpdateForm, UpdateSettings
from pst_ds.core.forms.low_rank import low_rank_pair

SHARPNESS = 8.0
"""Difference of a gate's logit between G = 1, where it starts, and G = 0, where it ends without gradients."""
RATE = 5.0
"""Multiplier of the rate of "updates" for G, which moves by 1/2 until a term is cut, farther than U and V move."""
DECAY = 0.5
"""Penalty of the gates at ``pst.update_penalty`` = 1, as weight decay."""


class LearnedRanks(UpdateForm):
    """W = W0 + beta U diag(g) V with one gate g = max(0, 2 sigmoid(SHARPNESS (G - 1/2)) - 1) per rank-one term.

    U (O, r), V (r, I) and G (r,) train; r = ``pst.update_rank`` is the largest rank. G starts at 1, where a gate is
    open. The penalty is half the square of G, which AdamW applies as weight decay, so the gate of a term that does not
    lower the loss falls. Its term is cut at G = 1/2: the gate is then exactly 0, and so are the gradients of the term,
    which stays cut while the others train on. No later step has to remove terms, and an export has the kept ones. A
    gate falls to 0 without a jump, so that the others can take over what a term did.
    """

    def parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        """Return U and V as for U V, and G; None for all at rank 0."""
        rank = settings.update_rank
        if rank == 0:
            return {"U": None, "V": None, "G": None}
        gate = ParamSpec((rank,), mean=1.0, rate=RATE, decay=DECAY * settings.update_penalty)
        return {**low_rank_pair(outputs, inputs, settings), "G": gate}

    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        left = parameters["U"][tile.outputs] * (beta * gates(parameters["G"]))
        right = parameters["V"][:, tile.inputs]
        updated = weight.clone()
        # Term by term, each rounded before it is added: a matrix product would round by the shape of the tile.
        for term in range(right.shape[0]):
            updated.add_(left[:, term : term + 1] * right[term])
        return updated

    def gradients(
        self, weight: Tensor, weight_gradient: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float
    ) -> dict[str, Tensor]:
        """Return dU = dW V' diag(beta g), dV = diag(beta g) U' dW and dG = beta g' . colsum(U . dW V')."""
        left = parameters["U"][tile.outputs]
        right = parameters["V"][:, tile.inputs]
        open_by = beta * gates(parameters["G"])
        by_left = weight_gradient @ right.t()  # (outputs of the tile, r)
        by_right = left.t() @ weight_gradient  # (r, inputs of the tile)
        # Other tiles add the terms of the outputs and inputs that this one does not have.
        of_left = torch.zeros_like(parameters["U"])
        of_right = torch.zeros_like(parameters["V"])
        of_left[tile.outputs] = by_left * open_by
        of_right[:, tile.inputs] = by_right * open_by.unsqueeze(1)
        of_gates = (left * by_left).sum(0) * (beta * _slopes(parameters["G"]))
        return {"U": of_left, "V": of_right, "G": of_gates}

    def describe(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over matrices of the terms whose gate is not 0."""
        kept = int((gates(parameters["G"]) > 0.0).sum())
        num_matrices = len(parameters["G"]) // parameters["U"].shape[1]
        return {"kept rank": kept / num_matrices}


def gates(G: Tensor) -> Tensor:
    """Return the gate of each term, in [0, 1): exactly 0 up to G = 1/2, where the sigmoid is 1/2."""
    return (2.0 * torch.sigmoid(SHARPNESS * (G - 0.5)) - 1.0).clamp(min=0.0)


def _slopes(G: Tensor) -> Tensor:
    """Return the derivative of :func:`gates`, exactly 0 for a term that is cut."""
    sigmoid = torch.sigmoid(SHARPNESS * (G - 0.5))
    slopes = 2.0 * SHARPNESS * sigmoid * (1.0 - sigmoid)
    return torch.where(gates(G) > 0.0, slopes, 0.0)
