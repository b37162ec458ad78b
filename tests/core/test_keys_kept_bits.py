"""Selection on the rank that has all keys of a matrix: what a stable sort does, with and without native code."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import keys as core_keys
from pst_ds.core.bits import unpack_shard
from pst_ds.core.keys import kept_bits, order_keys

SPREADS = ["normal", "equal", "few", "rising", "falling", "two far apart"]


@pytest.fixture(params=["native", "torch"])
def either(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(core_keys, "native_for", lambda *_: None)


def _scores(spread, size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    if spread == "equal":
        return torch.zeros(size)
    if spread == "few":
        return values.sign() * 0.0 + torch.randint(0, 3, (size,), generator=generator)
    if spread == "two far apart":  # a sample sees neither
        values = torch.zeros(size)
        values[size // 3] = -1e30
        values[size // 2] = 1e30
        return values
    return {"normal": values, "rising": values.sort().values, "falling": values.sort(descending=True).values}[spread]


def _stable(keys, count):
    keep = np.ones(keys.numel(), dtype=np.uint8)
    keep[np.argsort(keys.numpy(), kind="stable")[:count]] = 0
    return keep


@given(spread=st.sampled_from(SPREADS), size=st.integers(1, 300) | st.sampled_from([511, 513, 4097, 40_000]),
       share=st.sampled_from([0.0, 1.0]) | st.floats(0, 1), seed=st.integers(0, 10**6))  # fmt: skip
@pytest.mark.parametrize("twin", ["native", "torch"])
def test_it_keeps_what_a_stable_sort_does(twin, spread, size, share, seed):
    with pytest.MonkeyPatch.context() as patch:
        if twin == "torch":
            patch.setattr(core_keys, "native_for", lambda *_: None)
        keys, count = order_keys(_scores(spread, size, seed)), int(share * size)
        bits, not_finite = kept_bits(keys, count)
    assert np.array_equal(unpack_shard(bits, size).numpy(), _stable(keys, count))
    assert not_finite == 0
    assert bits.numel() == -(-size // 8)
    assert int(unpack_shard(bits, 8 * bits.numel()).sum()) == size - count  # padding bits are zero


def test_not_finite_keys_are_counted(either):
    scores = torch.randn(3000)
    scores[[1, 70, 2999]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert kept_bits(order_keys(scores), 1500)[1] == 3


def test_keys_of_a_matrix_are_taken_row_by_row(either):
    keys = torch.tensor([[3, 1], [1, 1]], dtype=torch.int32)
    bits, _ = kept_bits(keys, 2)
    assert unpack_shard(bits, 4).tolist() == [1, 0, 0, 1]
