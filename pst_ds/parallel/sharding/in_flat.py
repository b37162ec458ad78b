"""Factors that lie one after another in a flat parameter, which engines see in place of them.

A run flattens its factors (:mod:`pst_ds.nn.flat_factors`), since every tensor costs DeepSpeed's hooks and the optimizer
time on the host. A factor is then a view of a copy of the flat parameter, whole on every rank, and its master and
moments are ranges of those of the flat parameter, of which a rank may hold a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pst_ds.parallel.sharding.base import Fragment
from pst_ds.parallel.sharding.registry import sharding_of
from pst_ds.parallel.sharding.whole import Whole

_PLACE = "pst_place_in_flat"
"""Attribute of a factor in a flat parameter: its :class:`PlaceInFlat`."""


@dataclass(frozen=True, slots=True)
class PlaceInFlat:
    """Where a factor's values are: from index ``offset`` of the flat parameter ``flat``."""

    flat: nn.Parameter
    offset: int


def put_into_flat(param: nn.Parameter, place: PlaceInFlat) -> None:
    """Note that the values of ``param`` are at ``place``."""
    setattr(param, _PLACE, place)


class InFlat(Whole):
    """Factors in a flat parameter, whole on every rank, with masters wherever the flat parameter has its own."""

    def owns(self, param: Tensor) -> bool:
        return hasattr(param, _PLACE)

    def masters(self, params: Sequence[nn.Parameter], device: torch.device | None) -> list[Tensor]:
        """Return the full fp32 masters. Collective: those of each flat parameter are gathered at once."""
        # each once, in the order in which they come: the same order on every rank, for the collective
        flats: list[nn.Parameter] = []
        for param in params:
            flat = self._place(param).flat
            if not any(flat is other for other in flats):
                flats.append(flat)
        sharding = sharding_of(flats[0])  # one engine divides all of them alike
        flat_masters = dict(zip(flats, sharding.masters(flats, device), strict=True))
        masters: list[Tensor] = []
        for param in params:
            place = self._place(param)
            values = flat_masters[place.flat].view(-1)[place.offset : place.offset + param.numel()]
            masters.append(values.view(param.shape))
        return masters

    def fragment(self, name: str, param: nn.Parameter, optimizer: Optimizer) -> Fragment | None:
        place = self._place(param)
        sharding = sharding_of(place.flat)
        of_flat = sharding.fragment(name, place.flat, optimizer)
        if of_flat is None:
            return None
        part = of_flat.cut(place.offset, place.offset + param.numel())
        # a rank may hold other factors of the flat parameter only
        if part.start >= part.stop:
            return None
        return Fragment(
            name=name,
            start=part.start - place.offset,
            stop=part.stop - place.offset,
            owner=part.owner,
            offset=part.offset,
        )

    def replicates_optimizer(self, param: nn.Parameter) -> bool:
        flat = self._place(param).flat
        return sharding_of(flat).replicates_optimizer(flat)

    def cuts_optimizer_evenly(self, param: nn.Parameter) -> bool:
        # shares of the flat parameter end anywhere in a factor
        return self.replicates_optimizer(param)

    @staticmethod
    def _place(param: nn.Parameter) -> PlaceInFlat:
        place: PlaceInFlat = getattr(param, _PLACE)
        return place
