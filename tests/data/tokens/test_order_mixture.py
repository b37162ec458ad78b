"""Mixtures keep to their weights at every step, and are computed from a number alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.data.tokens.order import MOST_PARTS, Mixture, parts_of_weights, turns

_weights = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(_weights)
def test_counts_are_never_a_sequence_off_the_weights(weights):
    order = turns(weights)
    total = sum(weights)
    counts = np.zeros(len(weights), int)
    for number, source in enumerate(order, 1):
        counts[source] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - Fraction(weight * number, total)) < 1
    assert counts.tolist() == weights


@given(_weights, st.integers(0, 10**12))
def test_any_sequence_is_found_by_its_number(weights, first):
    mixture = Mixture([float(weight) for weight in weights])
    numbers = np.arange(first, first + 50)
    source, before = mixture.at(numbers)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    for i, share in enumerate(shares):
        own = before[source == i]
        assert own.tolist() == list(range(own[0], own[0] + len(own))) if len(own) else True
        for number, count in zip(numbers[source == i].tolist(), own.tolist(), strict=True):
            assert abs(count - share * number) < 1
    one_by_one = [mixture.at(np.array([number])) for number in numbers]
    assert [int(s[0]) for s, _ in one_by_one] == source.tolist()
    assert [int(b[0]) for _, b in one_by_one] == before.tolist()


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1.0], [1]),
        ([0.12345, 0.87655], [2469, 17531]),
        ([2.0, 4.0], [1, 2]),
        ([1e-9, 1.0], [1, MOST_PARTS - 1]),
    ],
)
def test_weights_become_whole_numbers(weights, parts):
    assert parts_of_weights(weights) == parts


def test_rounded_weights_are_a_hundred_thousandth_off_at_most():
    weights = [0.333333333, 0.222222222, 0.444444445]
    parts = parts_of_weights(weights)
    assert sum(parts) == MOST_PARTS
    assert all(abs(part / MOST_PARTS - weight) <= 1e-5 for part, weight in zip(parts, weights, strict=True))
