"""Batches made ahead: the same in the same order, errors in their place, and no thread left."""

from __future__ import annotations

import itertools
import threading

import pytest

from pst_ds.train.batches import AHEAD, Prefetched


def _threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_their_order_and_the_thread_is_never_further_ahead():
    made = []

    def make():
        for number in range(20):
            made.append(number)
            yield number

    with Prefetched(make()) as items:
        for number, item in enumerate(items):
            assert item == number
            assert len(made) <= number + 1 + AHEAD + 1  # one is made and waits for room
    assert made == list(range(20))
    assert not _threads()


def test_an_error_is_raised_where_its_item_would_be():
    def make():
        yield 1
        raise ValueError("row 7 has no text")

    with Prefetched(make()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="row 7 has no text"):
            next(items)


def test_an_endless_stream_ends_with_the_context():
    with Prefetched(itertools.count()) as items:
        assert next(items) == 0
    assert not _threads()
