"""Masks as bits: round trips, zeroing to exact +0.0, and a checksum that adds over shards."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import bits as b
from tests.pairs import every_pair

INT_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

numels = st.integers(1, 200)
shard_counts = st.integers(1, 9)


def random_mask(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) > 0.5


def bit_at(data: torch.Tensor, numel: int, num_shards: int, index: int) -> int:
    """The bit of one flat weight, by the definition in the module's docstring."""
    per_shard = -(-numel // num_shards)
    num_bytes = -(-per_shard // 8)
    shard, inside = divmod(index, per_shard)
    return int(data[shard * num_bytes + inside // 8]) >> (inside % 8) & 1


@given(numel=numels, num_shards=shard_counts)
def test_every_bit_lies_where_the_format_says(numel, num_shards):
    keep = random_mask(numel)
    packed = b.pack_mask(keep, num_shards)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_shards * b.shard_bytes(numel, num_shards),)
    assert [bit_at(packed, numel, num_shards, i) for i in range(numel)] == keep.int().tolist()


@given(numel=numels, num_shards=shard_counts)
def test_padding_bits_are_zero(numel, num_shards):
    ones = b.all_ones(numel, num_shards)
    assert sum(int(byte).bit_count() for byte in ones) == numel
    assert torch.equal(ones, b.pack_mask(torch.ones(numel, dtype=torch.bool), num_shards))


@given(numel=numels, num_shards=shard_counts, data=st.data())
def test_any_range_unpacks(numel, num_shards, data):
    keep = random_mask(numel, seed=1)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    found = b.unpack_range(b.pack_mask(keep, num_shards), numel, num_shards, start, stop)
    assert found.dtype == torch.uint8
    assert torch.equal(found.bool(), keep[start:stop])


@given(numel=numels, num_shards=shard_counts)
def test_shards_pack_and_unpack_alone(numel, num_shards):
    """What one rank writes to its shard is that part of the whole mask."""
    keep = random_mask(numel, seed=2)
    per_shard, num_bytes = b.shard_numel(numel, num_shards), b.shard_bytes(numel, num_shards)
    whole = b.pack_mask(keep, num_shards)
    for i in range(num_shards):
        own = keep[i * per_shard : (i + 1) * per_shard]
        shard = b.pack_shard(own, num_bytes)
        assert torch.equal(shard, whole[i * num_bytes : (i + 1) * num_bytes])
        assert torch.equal(b.unpack_shard(shard, own.numel()).bool(), own)


@given(numel=numels, old=shard_counts, new=shard_counts)
def test_relayout_gives_the_same_mask_in_other_shards(numel, old, new):
    keep = random_mask(numel, seed=3)
    packed = b.pack_mask(keep, old)
    moved = b.relayout(packed, numel, old, new)
    assert torch.equal(moved, b.pack_mask(keep, new))
    assert moved.data_ptr() != packed.data_ptr()
    assert torch.equal(b.relayout(moved, numel, new, old), packed)


def test_bytes_are_little_endian():
    assert b.pack_mask(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)).tolist() == [1, 2]


def test_masks_of_any_shape_dtype_and_stride_pack_in_storage_order():
    keep = random_mask(30, seed=4).view(5, 6)
    packed = b.pack_mask(keep.flatten())
    assert torch.equal(b.pack_mask(keep), packed)
    assert torch.equal(b.pack_mask(keep.to(torch.uint8)), packed)
    assert torch.equal(b.pack_mask(keep.t()), b.pack_mask(keep.t().contiguous()))


@every_pair
@pytest.mark.parametrize("dtype", INT_OF, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_apply_mask_leaves_plus_zero_and_touches_nothing_else(dtype, transposed):
    special = [1.5, -1.5, 0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf")]
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([*special, tiny, -tiny, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    values = values.view(3, 4)
    for keep in (0, 1):
        weight = values.clone().t() if transposed else values.clone()
        before = weight.clone()
        mask = torch.full(tuple(weight.shape), keep, dtype=torch.uint8)
        assert b.apply_mask_(weight, mask) is weight
        as_int = weight.view(INT_OF[dtype])
        assert torch.equal(as_int, before.view(INT_OF[dtype]) * keep)


@pytest.mark.parametrize("dtype", INT_OF, ids=str)
def test_apply_mask_picks_entry_by_entry(dtype):
    weight = torch.randn(17, 13, generator=torch.Generator().manual_seed(5)).to(dtype)
    mask = random_mask(weight.numel(), seed=6).view(weight.shape).to(torch.uint8)
    expected = torch.where(mask.bool(), weight, torch.zeros((), dtype=dtype))
    b.apply_mask_(weight, mask)
    assert torch.equal(weight.view(INT_OF[dtype]), expected.view(INT_OF[dtype]))


@every_pair
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", INT_OF, ids=str)
@pytest.mark.parametrize(("numel", "num_shards"), [(7, 1), (400, 1), (1000, 3), (1001, 4), (130, 2), (8, 16)])
def test_a_range_of_weights_is_masked_as_the_whole_is(monkeypatch, native, dtype, numel, num_shards):
    if not native:
        monkeypatch.setattr(b, "merges", lambda: None)
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    weight[::5], weight[1::5] = float("nan"), -0.0
    keep = random_mask(numel, seed=num_shards)
    expected = b.apply_mask_(weight.clone(), keep.to(torch.uint8)).view(INT_OF[dtype])
    ends = [b.shard_range(numel, num_shards, shard) for shard in range(num_shards)]
    bits = torch.cat([b.pack_shard(keep[first:last], b.shard_bytes(numel, num_shards)) for first, last in ends])
    for start, stop in ((0, numel), (0, 3), (3, numel), (numel // 3, numel // 2 + 1), (8, numel), (numel, numel)):
        found = weight.clone()
        part = found[start:stop]
        assert b.apply_range_(part, bits, numel, num_shards, start) is part
        assert torch.equal(part.view(INT_OF[dtype]), expected[start:stop])
        outside = torch.cat([torch.arange(min(start, stop)), torch.arange(stop, numel)])
        assert torch.equal(found.view(INT_OF[dtype])[outside], weight.view(INT_OF[dtype])[outside])


def wrapped(total: int) -> int:
    return total % (1 << 64)


def checksum(keep: torch.Tensor, start: int = 0, seed: int = 0) -> int:
    return wrapped(int(b.checksum(b.pack_mask(keep), keep.numel(), start, seed)))


@given(numel=numels, cuts=st.lists(st.integers(0, 200), max_size=5), seed=st.integers(0, 2**32 - 1))
def test_checksum_adds_over_any_cut(numel, cuts, seed):
    keep = random_mask(numel, seed=7)
    edges = [0, *sorted(min(c, numel) for c in cuts), numel]
    parts = [checksum(keep[lo:hi], lo, seed) for lo, hi in itertools.pairwise(edges)]
    assert wrapped(sum(parts)) == checksum(keep, 0, seed)


def test_checksum_takes_any_dtype_of_mask():
    keep = random_mask(77, seed=8)
    assert checksum(keep) == checksum(keep.to(torch.uint8))


def test_checksum_sees_any_single_flip():
    keep = random_mask(150, seed=9)
    seen = {checksum(keep)}
    for i in range(keep.numel()):
        flipped = keep.clone()
        flipped[i] = ~flipped[i]
        seen.add(checksum(flipped))
    assert len(seen) == keep.numel() + 1


def test_checksum_sees_any_swap_of_unequal_bits():
    keep = random_mask(60, seed=10)
    pairs = [(i, j) for i, j in itertools.combinations(range(60), 2) if keep[i] != keep[j]]
    original = checksum(keep)
    for i, j in pairs:
        swapped = keep.clone()
        swapped[i], swapped[j] = keep[j], keep[i]
        assert checksum(swapped) != original
    assert len(pairs) > 500


def test_checksum_depends_on_seed_and_place():
    keep = random_mask(100, seed=11)
    assert len({checksum(keep, 0, seed) for seed in range(50)}) == 50
    assert len({checksum(keep, 8 * i) for i in range(50)}) == 50


@pytest.mark.parametrize(
    ("index", "expected"), [(0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4), (2, 0x06C45D188009454F)]
)
def test_checksum_hashes_with_splitmix64(index, expected):
    """The published first outputs of splitmix64 for seed 0."""
    assert checksum(torch.tensor([True]), start=8 * index) == expected
    assert checksum(torch.tensor([True]), start=8 * index + 3) == wrapped(8 * expected)


@every_pair
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("shape", [(12, 32), (13, 21), (3, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_a_rectangle_of_the_mask_is_ones_and_zeros_to_and_with(shape, num_shards, dtype):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) > 0.5
    bits = b.pack_mask(keep, num_shards)
    height, width = shape
    for rows in (slice(0, height), slice(1, 2), slice(2, height)):
        for cols in (slice(0, width), slice(8, 16), slice(16, width), slice(5, 12)):
            out = torch.empty(rows.stop - rows.start, cols.stop - cols.start, dtype=dtype)
            b.expand_mask_(out, bits, shape, num_shards, rows, cols)
            assert torch.equal(out, -keep[rows, cols].to(dtype))


@given(
    counts=st.lists(st.integers(0, 40) | st.sampled_from([8, 16, 64]), min_size=1, max_size=6), extra=st.integers(0, 3)
)
def test_runs_are_joined_bit_by_bit(counts, extra):
    keep = random_mask(sum(counts))
    num_bytes = -(-keep.numel() // 8) + extra
    runs = [(b.pack_shard(part, -(-part.numel() // 8)), part.numel()) for part in keep.split(counts)]
    assert torch.equal(b.join_bits(runs, num_bytes), b.pack_shard(keep, num_bytes))
