"""The benchmark of checkpoints measures what it says and prints its keys."""

import pytest

from tools.bench.checkpoint import SmolShape, summary

TINY = {
    "hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv-heads": 2, "vocabulary": 64, "sequence": 8,
    "rank": 2,
}  # fmt: skip
SECONDS = {"step", "step_while_writing", "blocked", "blocked_outside", "until_written", "read_checkpoint"}


def test_shares_are_of_a_step_and_the_longer_of_both_blocking_times_counts():
    seconds = {"step": 2.0, "step_while_writing": 2.5, "cpu_step": 1.0, "cpu_step_while_writing": 1.1}
    sizes = {"checkpoint": 90, "limit": 100}
    found = summary({}, {**seconds, "blocked": 0.01, "blocked_outside": 0.02}, sizes)
    assert found["blocked_ratio"] == pytest.approx(0.01)
    assert found["hidden_ratio"] == pytest.approx(0.25)
    assert found["cpu_hidden_ratio"] == pytest.approx(0.1)
    assert found["bytes_ratio"] == pytest.approx(0.9)
    longer = summary({}, {**seconds, "blocked": 0.11, "blocked_outside": 0.02}, sizes)
    assert longer["blocked_ratio"] == pytest.approx(0.055)


def test_the_default_shape_is_smollm2_135m():
    shape = SmolShape()
    block = 2 * shape.hidden**2 + 2 * shape.hidden * shape.kv_heads * (shape.hidden // shape.heads)
    block += 3 * shape.hidden * shape.intermediate
    assert shape.layers * block + shape.vocabulary * shape.hidden == pytest.approx(134.5e6, rel=0.001)


@pytest.mark.zero3
def test_it_prints_its_object(forked_bench, tmp_path):
    options = [f"--{name}={value}" for name, value in TINY.items()]
    (tmp_path / "saves").mkdir()
    found = forked_bench("checkpoint", "--ranks=2", "--saves=2", f"--folder={tmp_path / 'saves'}", *options)
    assert set(found["seconds"]) >= SECONDS
    assert all(found["seconds"][name] > 0 for name in SECONDS)
    assert found["conditions"]["shape"]["kv_heads"] == 2
    assert {"hardware", "threads_per_rank", "versions", "dtype", "zero_stage", "saves"} <= set(found["conditions"])
    assert found["conditions"]["ranks"] == 2
    pairs = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    trainables = 2 * sum((o + i) * (2 * 2 + 1) for o, i in pairs)
    assert found["bytes"]["trainables"] == trainables
    assert trainables * 12 < found["bytes"]["checkpoint"] < found["bytes"]["limit"]
    assert list((tmp_path / "saves").iterdir()) == []
