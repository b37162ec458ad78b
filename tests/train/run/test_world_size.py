"""The same run on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare, train_prepared

RUN_FILE = "tests/data/world_size.toml"


def _train(output_dir, *overrides):
    run = load_run(RUN_FILE, [f"output_dir={output_dir}", *overrides])
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _steps(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    sums = {line["step"]: line["mask_checksum"] for line in lines if line["event"] == "mask_update"}
    return losses, sums


@pytest.mark.zero3
def test_losses_and_masks_do_not_depend_on_the_world_size(run_ranks, tmp_path, capsys):
    """Nor on DeepSpeed, which one process can do without."""
    short = "train.num_steps=12"
    for world_size in (1, 2, 3):
        run_ranks(_train, world_size, str(tmp_path / str(world_size)), short)
    run_ranks(_train, 1, str(tmp_path / "local"), "deepspeed_config=", short)
    reference, sums = _steps(tmp_path / "1")
    assert len(reference) == 12
    assert len(sums) > 2
    assert _steps(tmp_path / "local")[0] == pytest.approx(reference, abs=1e-3)
    first_update = min(sums)
    masks = dict(read_checkpoint(tmp_path / "1" / "checkpoints" / "final").masks)
    for world_size in (2, 3):
        losses, other_sums = _steps(tmp_path / str(world_size))
        assert losses.keys() == reference.keys()
        assert sums.keys() == other_sums.keys()
        for step, loss in losses.items():
            assert loss == pytest.approx(reference[step], abs=1e-5 if step <= first_update else 1e-3), step
        others = dict(read_checkpoint(tmp_path / str(world_size) / "checkpoints" / "final").masks)
        bits = sum(int(b).bit_count() for name in masks for b in (masks[name] ^ others[name]).tolist())
        worst = max(abs(losses[s] - reference[s]) for s in losses)
        with capsys.disabled():
            print(f"\n{world_size} ranks against 1: {bits} mask bits differ, largest loss difference {worst:.2e}")


@pytest.mark.zero3
@pytest.mark.thorough
def test_adam_s_betas_reach_deepspeed_and_the_one_process_without_it(run_ranks, tmp_path):
    """With others the losses are elsewhere, and the same on both."""
    short, betas = "train.num_steps=8", ["train.adam_beta1=0.5", "train.adam_beta2=0.5"]
    run_ranks(_train, 2, str(tmp_path / "zero3"), short, *betas)
    run_ranks(_train, 1, str(tmp_path / "local"), "deepspeed_config=", short, *betas)
    run_ranks(_train, 1, str(tmp_path / "default"), "deepspeed_config=", short)
    changed, local, losses = (_steps(tmp_path / name)[0] for name in ("zero3", "local", "default"))
    assert local == pytest.approx(changed, abs=1e-3)
    assert max(abs(changed[step] - losses[step]) for step in losses) > 1e-2


@pytest.mark.zero3
@pytest.mark.thorough
def test_updated_embeddings_do_not_depend_on_the_world_size(run_ranks, tmp_path, capsys):
    more = ["pst.update_embeddings=['word_embeddings']", "train.embedding_learning_rate=0.01", "train.num_steps=8"]
    result, _ = run_ranks(_train, 2, str(tmp_path / "zero3"), *more)
    run_ranks(_train, 1, str(tmp_path / "local"), "deepspeed_config=", *more)
    (losses, sums), (local, local_sums) = (_steps(tmp_path / name) for name in ("zero3", "local"))
    assert len(losses) == 8
    assert len(sums) > 1
    assert sums.keys() == local_sums.keys()
    for step, loss in local.items():
        assert losses[step] == pytest.approx(loss, abs=1e-5 if step <= min(sums) else 1e-3), step
    ours, theirs = (
        dict(read_checkpoint(tmp_path / name / "checkpoints" / "final").trained) for name in ("zero3", "local")
    )
    for factor in ("pst_U", "pst_V"):
        found, expected = (t[f"bert.embeddings.word_embeddings.{factor}"] for t in (ours, theirs))
        assert float((found - expected).abs().max()) <= 2e-3, factor
        assert float(expected.abs().max()) > 0.02  # U began at zero
    settings = [word for setting in more for word in ("--set", setting)]
    assert main(["plan", RUN_FILE, "--ranks", "2", "--json", *settings]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("optimizer_bytes_per_rank", "trained_parameters"):
        assert planned[key] == result[key]
    assert planned["updated_embeddings"][0]["factor_parameters"] == 8 * (37 + 32)


def _texts(folder):
    """The settings of a data-to-text run whose texts have 4 to 20 words."""
    rows = [{"data": f"name[film {i}]", "text": "film plot end good " * (1 + i % 5)} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "data-to-text", "model.path": "tests/data/tiny-llama", "data.train": str(folder / "texts.jsonl"),
        "data.validation": "", "data.test": "", "data.text_columns": ["data"], "data.label_column": "text",
        "data.max_length": 40, "train.batch_size": 8, "train.precision": "fp32", "train.num_steps": 6,
        "train.update_learning_rate": 0.1, "train.log_interval": 1, "eval.max_new_tokens": 4,
        "pst.modules_to_save": [],
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def test_texts_of_any_length_weigh_the_same_in_however_many_micro_batches(tmp_path):
    for passes in (1, 2, 3, 4):
        _train(
            tmp_path / str(passes),
            *_texts(tmp_path),
            "deepspeed_config=",
            f"train.gradient_accumulation_steps={passes}",
        )
    whole, *cut = (_steps(tmp_path / str(passes))[0] for passes in (1, 2, 3, 4))
    assert len(whole) == 6
    assert max(whole.values()) - min(whole.values()) > 0.05
    for losses in cut:
        assert losses == pytest.approx(whole, rel=1e-4)


@pytest.mark.zero3
def test_texts_of_any_length_weigh_the_same_on_however_many_ranks(run_ranks, tmp_path):
    run_ranks(_train, 1, str(tmp_path / "1"), *_texts(tmp_path))
    run_ranks(_train, 2, str(tmp_path / "2"), *_texts(tmp_path), "train.gradient_accumulation_steps=3")  # of 2 and 1
    one, two = (_steps(tmp_path / name)[0] for name in ("1", "2"))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-4)
