"""Row bits in files: round trips, sizes against the entropy, and damaged bytes."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from pst_ds.formats import FormatError, stored_bits, with_row_bits
from tests.formats.test_quantized import bits_of

RANDOM = np.random.default_rng(0)
MASKS = {
    "80 %": RANDOM.random((96, 768)) < 0.2,
    "98 %, rows of 13 inputs": RANDOM.random((768, 13)) < 0.02,
    "no weights": np.zeros((64, 768), bool),
    "all weights": np.ones((64, 768), bool),
    "50 %, 16x1": np.repeat(RANDOM.random((12, 768)) < 0.5, 16, axis=0),
    "rows": np.repeat(RANDOM.random((192, 1)) < 0.5, 768, axis=1),
}


@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name):
    keep = MASKS[name]
    bits, stored = bits_of(keep), stored_bits(bits_of(keep))
    assert stored.dtype == torch.uint8
    assert stored.dim() == 1
    assert stored.numel() < bits.numel()
    assert zlib.decompress(stored.numpy()) == bits.numpy().tobytes()
    parts = with_row_bits("w", {"bitmask": stored, "codes": bits}, keep.shape)
    assert torch.equal(parts["bitmask"], bits)
    assert parts["codes"] is bits


def test_bits_that_zlib_makes_no_smaller_stay_rows_of_bits():
    bits = bits_of(RANDOM.random((64, 768)) < 0.5)
    assert stored_bits(bits) is bits
    assert with_row_bits("w", {"bitmask": bits}, (64, 768))["bitmask"] is bits
    assert with_row_bits("w", {"values": bits}, (64, 768)) == {"values": bits}


def test_sizes():
    """Random positions are within 3 % of their entropy; 16 equal rows take less than an eighth of their bits."""
    for kept in (0.1, 0.2, 0.3):
        entropy = -(kept * math.log2(kept) + (1 - kept) * math.log2(1 - kept))
        stored = stored_bits(bits_of(RANDOM.random((1024, 1024)) < kept))
        assert entropy <= 8 * stored.numel() / 1024**2 * 1.005 <= 1.03 * entropy
    assert 8 * stored_bits(bits_of(MASKS["50 %, 16x1"])).numel() / (192 * 768) < 1 / 8


def test_damaged_bytes_are_refused():
    bits = bits_of(MASKS["80 %"])
    stored = stored_bits(bits)
    for at in range(0, stored.numel(), 7):
        changed = stored.clone()
        changed[at] ^= 1 << at % 8
        with pytest.raises(FormatError, match=r"^w: bitmask .*damaged"):
            with_row_bits("w", {"bitmask": changed}, (96, 768))
    empty, longer = torch.tensor([*zlib.compress(b"")], dtype=torch.uint8), torch.cat([stored, stored[:1]])
    for given, (rows, columns) in [
        *((given, (96, 768)) for given in (stored[:-1], stored[:0], longer, empty)),
        *((stored, shape) for shape in ((95, 768), (97, 768), (0, 768), (1 << 40, 1 << 50))),
        (empty, (0, 768)),
    ]:
        problem = f"w: bitmask is damaged: a {rows} x {columns} matrix needs one stream of"
        with pytest.raises(FormatError, match=problem):
            with_row_bits("w", {"bitmask": given}, (rows, columns))
