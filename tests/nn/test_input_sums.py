"""Sums of layers' inputs do not depend on the order of the batches, or on which rank has which."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.nn.input_sums import InputGatherer, products, squares
from pst_ds.parallel.ranks import all_ranks

BATCHES = [torch.randn(7, 6, generator=torch.Generator().manual_seed(i)) * 10.0 ** (i % 3) for i in range(5)]
RARE = (3, 4)
"""Batches that run the second layer too."""


def _sums(order, sum_of):
    """The sums of two layers on this rank's share of the batches, of which rank 0 has the first."""
    layers, ranks = {"often": nn.Linear(6, 2), "rarely": nn.Linear(6, 3)}, all_ranks()
    gatherer = InputGatherer(sum_of)
    own = [0, *order][ranks.own :: ranks.number]
    with gatherer.listening(layers):
        for place, number in enumerate(own):
            layers["often"](BATCHES[number])
            if number in RARE:
                layers["rarely"](BATCHES[number])
            if not place:
                gatherer.settle(list(layers), ranks)
    gatherer.add_ranks(dict.fromkeys(layers, 6), torch.device("cpu"), ranks)
    return {name: gatherer.sums[name].total for name in layers}


@pytest.mark.zero3
@pytest.mark.parametrize("sum_of", [squares, products])
def test_every_order_and_number_of_ranks_gives_the_same_bits(run_ranks, sum_of):
    expected = _sums([1, 2, 3, 4], sum_of)
    for name, numbers in (("often", range(5)), ("rarely", RARE)):
        x = torch.cat([BATCHES[i] for i in numbers]).double()
        exact = x.square().sum(0) if sum_of is squares else x.T @ x
        torch.testing.assert_close(expected[name], exact, rtol=1e-6, atol=1e-6 * float(exact.max()))
    for ranks, order in ((1, [4, 2, 3, 1]), (2, [3, 1, 2, 4]), (3, [1, 2, 4, 3])):
        for found in run_ranks(_sums, ranks, order, sum_of):
            assert all(torch.equal(found[name], expected[name]) for name in expected)
