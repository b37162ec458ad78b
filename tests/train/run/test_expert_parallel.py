"""Experts on ranks: masks, losses, checkpoints and exports are those of a run whose ranks share every expert."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.optimizer_state import KINDS
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.resume import restore
from pst_ds.train.run import build, prepare
from pst_ds.writing.manifest import read_manifest
from tests.checkpoint.small_engine import save_checkpoint

from .test_experts import _checksums, _goes_on, _lines, _stopped, _train

QUANTISED = ("quantization.values=int8", "quantization.group=row")


def _save_base(folder: Path) -> None:
    """Two layers of eight experts and a shared one; each token goes to two."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    config = transformers.Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=8, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_experts=8, num_experts_per_tok=2,
        shared_expert_intermediate_size=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for param in model.parameters():
        param.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _assert_same_run(folder: Path, expected: Path) -> None:
    """All masks, and losses, gradients and counts of tokens; losses up to the order of sums."""
    assert _checksums(folder) == _checksums(expected)
    assert len(set(_checksums(folder).values())) >= 3
    one, other = (json.loads((path / "result.json").read_text()) for path in (folder, expected))
    for key in ("sparsity_in_masks", "trained_parameters", "expert_zeros"):
        assert one[key] == other[key], key
    lines = _lines(expected, "step")
    for step, line in _lines(folder, "step").items():
        assert line["loss"] == pytest.approx(lines[step]["loss"], abs=1e-5), step
        assert line["grad_norm"] == pytest.approx(lines[step]["grad_norm"], rel=1e-4), step
    read = [(path / "layers.jsonl").read_text().splitlines() for path in (folder, expected)]
    for line, other_line in zip(*read, strict=True):
        found, wanted = json.loads(line), json.loads(other_line)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == value or found[key] == pytest.approx(value, rel=1e-4), key


def _train_on_nodes(*arguments: object) -> None:
    """As :func:`_train`, on nodes of two ranks."""
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank() % 2)}
    _train(*arguments)


def _rewritten(run: Path, base: Path, out: Path, degree: int) -> None:
    """The last checkpoint of ``run``, loaded into the engine of ranks with experts divided by ``degree``, and saved."""
    settings = [f"model.path={json.dumps(str(base))}", f"output_dir={json.dumps(str(run))}", "data.max_length=16"]
    settings += [f"train.expert_parallel={degree}", *QUANTISED]
    context = prepare(load_run("tests/data/causal_lm.toml", settings), LaunchEnvironment(rank(), world_size(), rank()))
    checkpoint = read_checkpoint(run / "checkpoints" / "final")
    engine = build(context, checkpoint)
    restore(engine, checkpoint, context.run)
    save_checkpoint(out, engine, checkpoint.state)


def _assert_same_values(folder: Path, expected: Path) -> None:
    one, other = read_checkpoint(folder), read_checkpoint(expected)
    assert list(one.trained) == list(other.trained)
    for name, shape in other.contents.trained.items():
        assert one.contents.trained[name] == shape
        for kind in KINDS:
            size = torch.Size(shape).numel()
            assert torch.equal(one.values(name, kind, 0, size), other.values(name, kind, 0, size)), (name, kind)
            assert torch.equal(
                one.values(name, kind, size // 3, size // 2), other.values(name, kind, size // 3, size // 2)
            )
    for name, bits in other.masks.items():
        assert torch.equal(one.masks[name], bits), name
        for shard in range(3):
            assert torch.equal(one.mask_shard(name, 3, shard), other.mask_shard(name, 3, shard))
    for name, scales in other.scales.items():
        assert torch.equal(one.scales[name], scales), name
    assert one.state == other.state


def _exported(run: Path, checkpoint: Path, out: Path) -> list[str]:
    """The SHA-256 of each tensor of an export."""
    assert main(["export", str(run), "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return [part.sha256 for tensor in read_manifest(out)[0] for part in tensor.parts]


@pytest.mark.zero3
def test_runs_checkpoints_and_exports_do_not_depend_on_where_experts_are(run_ranks, tmp_path, capsys, alone):
    base = tmp_path / "base"
    _save_base(base)
    more = ("layer_statistics.interval=3", "schedule.cooldown_fraction=0.4", *QUANTISED)
    run_ranks(_train, 2, tmp_path / "shared", base, *more)
    run_ranks(_train, 4, tmp_path / "divided", base, *more, "train.expert_parallel=2")
    _assert_same_run(tmp_path / "divided", tmp_path / "shared")
    final = tmp_path / "divided" / "checkpoints" / "final"
    for ranks, degree in ((2, 2), (3, 1), (4, 4)):
        again = tmp_path / f"again-{ranks}"
        run_ranks(_rewritten, ranks, tmp_path / "divided", base, again, degree)
        _assert_same_values(again, final)
        assert set(read_checkpoint(again).contents.parts.values()) == ({degree} if degree > 1 else set())
    assert main(["eval", str(tmp_path / "divided"), "--split", "validation", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((tmp_path / "divided" / "result.json").read_text())
    assert evaluated["loss"] == pytest.approx(result["metrics"]["loss"], abs=1e-5)
    hashes = _exported(tmp_path / "divided", final, tmp_path / "out")
    assert _exported(tmp_path / "divided", again, tmp_path / "again-out") == hashes


@pytest.mark.zero3
def test_only_factors_travel_between_nodes_if_experts_are_divided_in_them_and_frozen_weights_are_whole(
    run_ranks, tmp_path
):
    """Each rank receives them in a ring: those of experts over two owners, one on each node, and others over all."""
    base, more = tmp_path / "base", ("model.base_placement=replicated", "schedule.update_interval=3")
    _save_base(base)
    run_ranks(_train_on_nodes, 4, tmp_path / "run", base, "train.expert_parallel=2", *more)
    trained = read_checkpoint(tmp_path / "run" / "checkpoints" / "final").contents.trained
    own = [4 * torch.Size(shape).numel() // 2 for name, shape in trained.items() if ".experts." in name]
    others = [4 * torch.Size(shape).numel() for name, shape in trained.items() if ".experts." not in name]
    expected = 3 * (sum(own) / 2 + sum(others) * 3 / 4 / 2)  # gathered twice, gradients reduced once
    updates = _lines(tmp_path / "run", "mask_update")
    steps = [line for step, line in _lines(tmp_path / "run", "step").items() if not {step, step - 1} & updates.keys()]
    assert steps
    for line in steps:  # padding, norms, counts of tokens and statistics come on top; a stack has 18 kB on a rank
        assert expected <= line["bytes_between_nodes"] <= expected + 5000
        assert line["bytes_within_node"] > 3 * sum(others) * 3 / 4 / 2 + 2000  # tokens too


@pytest.mark.zero3
@pytest.mark.thorough
def test_any_division_may_continue_a_run(run_ranks, tmp_path):
    base, statistics = tmp_path / "base", "layer_statistics.interval=3"
    _save_base(base)
    run_ranks(_train, 1, tmp_path / "1", base, statistics)
    cases = {
        (2, 2): (),
        (4, 2): ("model.base_placement=node",),
        (4, 4): ("model.gradient_checkpointing=true", "model.base_placement=replicated"),
        (8, 4): ("train.sequence_parallel=2",),
    }
    for (ranks, degree), more in cases.items():
        folder = tmp_path / f"{ranks}-{degree}"
        run_ranks(_train_on_nodes, ranks, folder, base, statistics, f"train.expert_parallel={degree}", *more)
        _assert_same_run(folder, tmp_path / "1")
    run_ranks(_stopped, 4, tmp_path / "stopped", base, statistics, "train.expert_parallel=2")
    run_ranks(_goes_on, 4, tmp_path / "stopped", base, statistics, "train.expert_parallel=4")
    _assert_same_run(tmp_path / "stopped", tmp_path / "1")
