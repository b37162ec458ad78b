"""The benchmark of packing measures what it says and prints its keys."""

import json
import sys

import pytest
import torch

from pst_ds.core.bits import unpack_range
from tools.bench.pack import base_weights, cases, main, measure, summary

RUN = {"merge": 0.02, "pack": 0.01, "hash": 0.01, "masked_merge": 5.0, "check": 5.0, "unpack": 5.0}
RUN |= {f"cpu_{stage}": seconds / 2 for stage, seconds in RUN.items()}


def test_speed_counts_merge_pack_and_hash_of_dense_bytes():
    row = summary("bitmask", 0.5, (4000, 2000), [RUN, RUN, {**RUN, "merge": 9.0}], 9_024_000)
    assert row["mb_per_second"] == pytest.approx(16.0 / 0.04)
    assert row["mb_per_cpu_second"] == pytest.approx(16.0 / 0.02)
    assert row["seconds"]["together"] == pytest.approx(0.04)
    assert row["bytes_ratio"] == pytest.approx(0.564)


def test_masks_have_the_sparsity_they_are_said_to_have():
    shape = (64, 128)
    for case in cases(shape, [0.5, 0.9]):
        keep = unpack_range(case.mask, 64 * 128, 1, 0, 64 * 128).float()
        assert keep.mean().item() == pytest.approx(1 - case.sparsity, abs=0.03)
        if case.name == "2:4":
            assert (keep.view(-1, 4).sum(1) == 2).all()


def test_matrices_fill_what_is_asked():
    assert len(base_weights((8, 8), 1000)) == 8
    assert len(base_weights((8, 8), 1)) == 2


def test_every_case_is_measured():
    torch.manual_seed(0)
    rows = measure(base_weights((64, 128), 1), cases((64, 128), [0.9]), repeats=2)
    assert [(row["format"], row["sparsity"]) for row in rows] == [("bitmask", 0.9), ("csr", 0.9), ("2:4", 0.5)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())


def test_it_prints_its_object(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pack", "--json", "--shapes", "16x64", "--repeats=1", "--input-bytes=1"])
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"hardware", "threads_per_rank", "versions", "dtype", "rank"} <= set(found["conditions"])
    assert [row["format"] for row in found["rows"]] == ["bitmask", "csr", "bitmask", "csr", "2:4"]
    assert found["rows"][0]["shape"] == [16, 64]
