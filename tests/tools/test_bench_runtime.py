"""The benchmark of the runtime compares what it says, on weights that do not repeat, and prints its keys."""

import argparse
import json
import sys

import pytest
import torch

from pst_ds.runtime import native
from tools.bench import runtime as bench

SHAPE = (64, 96)
TIMES = {"F.linear": 4.0, "matmul": 3.0, "matmul_weight_first": 2.0, "prepacked": 2.5, "bitmask": 1.0}


@pytest.fixture
def layers():
    arguments = argparse.Namespace(formats=["bitmask", "csr"], two_four=True, input_bytes=1)
    return bench.sparse_layers(torch.randn(SHAPE).bfloat16(), 0.5, arguments)


def row_of(seconds, layers, batch=1, sparsity=0.5):
    (row,) = bench.summary(seconds, layers, SHAPE, batch, sparsity)
    return row


def test_speed_is_against_the_fastest_dense_product(layers):
    row = row_of(TIMES, layers)
    assert row["speedup"] == 2.0
    assert row["speedup_over_f_linear"] == 4.0
    assert set(row["dense_milliseconds"]) == set(bench.DENSE)


def test_bytes_of_a_weight_are_those_of_all_its_parts(layers):
    kept = layers["bitmask"][0].compressed.numel()
    expected = (2 * kept + SHAPE[0] * SHAPE[1] / 8 + 8 * SHAPE[0] + 16) / (SHAPE[0] * SHAPE[1])
    assert row_of(TIMES, layers)["bytes_per_weight"] == pytest.approx(expected)


def test_matrices_are_copies_of_their_own(layers):
    first, second = layers["bitmask"]
    assert first.compressed.data_ptr() != second.compressed.data_ptr()
    assert torch.equal(first.compressed, second.compressed)
    assert len(bench.copies(torch.zeros(100, dtype=torch.uint8), 1000)) == 10


def test_contestants_that_share_matrices_never_take_the_same_one_in_a_turn():
    seen = []
    weights = list(range(8))
    variants = {name: ((lambda w, x, n=name: seen.append((n, w))), weights) for name in "abcd"}
    bench.take_turns(variants, torch.zeros(1), 0.0)
    turns = [seen[i : i + 4] for i in range(4, len(seen), 4)]  # after one call each to warm up
    assert all([name for name, _ in turn] == list("abcd") for turn in turns)
    assert all(len({w for _, w in turn}) == 4 for turn in turns)
    assert {w for n, w in seen[4:] if n == "a"} == set(range(5))


def test_every_contestant_computes_the_same_product(layers):
    x = torch.randn(3, SHAPE[1]).bfloat16()
    found = bench.sparse_contestants({"bitmask": layers["bitmask"]}, list(native.LEVELS[: native.best_level() + 1]))
    reference = x.float() @ layers["bitmask"][0].dense_weight().float().t()
    assert {"bitmask", "bitmask/portable", "bitmask/expand"} <= set(found)
    for name, (product, weights) in found.items():
        assert torch.allclose(product(weights[0], x).float(), reference, atol=0.15, rtol=0.02), name


def test_it_prints_its_object(monkeypatch, capsys):
    command = [
        "runtime", "--json", "--shapes", "64x96", "--batch", "1", "3",
        "--sparsity=0.5", "--threads", "1", "--seconds", "0", "--input-bytes", "1", "--two-four",
        "--formats", "bitmask", "csr",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"batch", "shape", "sparsity", "backend", "threads", "speedup"} <= set(report["rows"][0])
    assert {(row["batch"], row["backend"]) for row in report["rows"]} == {
        (batch, name) for batch in (1, 3) for name in ("bitmask", "csr", "2:4")
    }
    assert report["conditions"]["memory_gb_per_second"]["1"] > 0
