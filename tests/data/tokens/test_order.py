"""The keyed order is a permutation, the same everywhere, and mixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.data.tokens.order import permuted


def _reference(place, count, key):
    """The same network, with Python's numbers, one at a time."""
    import hashlib

    bits = (count - 1).bit_length()
    raw = hashlib.blake2b(key.encode(), digest_size=64).digest()
    keys = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 64, 8)]
    value = place
    while True:
        low_bits = bits // 2
        high_bits = bits - low_bits
        high, low = value >> low_bits, value % (1 << low_bits)
        for round_key in keys:
            mixed = (low + round_key) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            mixed ^= mixed >> 31
            high, low = low, high ^ mixed % (1 << high_bits)
            high_bits, low_bits = low_bits, high_bits
        value = high << low_bits | low
        if value < count:
            return value


@given(st.integers(1, 300), st.text(max_size=5))
def test_it_is_a_permutation_and_any_part_is_that_of_the_whole(count, key):
    whole = permuted(np.arange(count), count, key)
    assert sorted(whole.tolist()) == list(range(count))
    assert whole.tolist() == [_reference(i, count, key) for i in range(count)]
    places = np.arange(count)[::-3]
    assert permuted(places, count, key).tolist() == whole[places].tolist()


@pytest.mark.parametrize("count", [2**40, 2**62 + 3])
def test_large_counts_need_nothing_held(count):
    places = np.array([0, 1, count // 2, count - 1])
    found = permuted(places, count, "a")
    assert found.tolist() == [_reference(int(i), count, "a") for i in places]
    assert len(set(found.tolist())) == 4


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [7, 32, 100])
def test_every_place_takes_every_thing_about_as_often(count):
    """Of 4,000 keys; the sum of squares is below what one of 10^6 random orders would exceed."""
    table = np.array([permuted(np.arange(count), count, f"0/{key}") for key in range(4000)])
    expected = 4000 / count
    for place in (0, count // 2, count - 1):
        counts = np.bincount(table[:, place], minlength=count)
        freedom = count - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 6.5 * np.sqrt(2 * freedom) + 20
    neighbours = (np.diff(table, axis=1) == 1).mean()
    assert neighbours < 2 / count


def test_other_keys_give_other_orders():
    orders = {tuple(permuted(np.arange(50), 50, f"{seed}/{epoch}").tolist()) for seed in range(9) for epoch in range(9)}
    assert len(orders) == 81
