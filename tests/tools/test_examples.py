"""The example scripts: they end in counted zeros, go on from their checkpoints, and agree with ``pst-ds train``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main as pst_ds
from pst_ds.config.toml import load_run
from pst_ds.data.labelled import GlobalBatches
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import prepare, train_prepared

STEPS, BATCH = 8, 8


@pytest.fixture
def example(monkeypatch):
    """``example(name)``: the script's module, in a process without an accelerator's state."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    _forget_accelerator()
    yield importlib.import_module
    _forget_accelerator()


def _forget_accelerator():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny encoder with a classifier and without dropout, so that scripts and runs begin alike."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    settings = {"num_labels": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained("tests/data/tiny-bert").save_pretrained(folder)
    return folder


def _run(folder, classifier):
    run = load_run("tests/data/world_size.toml", [
        f"{key}={json.dumps(value)}" for key, value in {
            "deepspeed_config": "", "output_dir": str(folder), "model.path": str(classifier), "seed": 11,
            "pst.seed": 0,  # as in the script's PSTConfig()
            "train.num_steps": STEPS, "train.batch_size": BATCH, "train.learning_rate_warmup_fraction": 0.0,
            "schedule.final_sparsity": 0.8, "schedule.warmup_fraction": 0.1, "schedule.cooldown_fraction": 0.3,
            "schedule.update_interval": 4,  # the default of the script's schedule too
        }.items()
    ])  # fmt: skip
    return train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), quiet=True)


def _in_the_run_s_order(path, rows):
    order = [i for batch in GlobalBatches([1] * len(rows), BATCH, 11).epoch(0) for i in batch]
    path.write_text("\n".join(rows[i] for i in order[: STEPS * BATCH]))


def _arguments(classifier, data, out, *more):
    return [
        str(classifier), str(data), str(out), "--sparsity=0.8", f"--steps={STEPS}", f"--batch-size={BATCH}",
        "--max-length=32", "--in-order", "--cpu", "--logging-steps=1", "--save-steps=4", *more,
    ]  # fmt: skip


def test_the_trainer_gives_the_masks_of_pst_ds_train(example, classifier, tmp_path, capsys):
    """Same batches, rates and schedule: HF Trainer's loop and ours end in the same bits."""
    result = _run(tmp_path / "run", classifier)
    _in_the_run_s_order(tmp_path / "data.jsonl", Path("tests/data/train.jsonl").read_text().splitlines())
    example("trainer_classification").main(_arguments(classifier, tmp_path / "data.jsonl", tmp_path / "out"))
    assert "trainable params: " in capsys.readouterr().out

    small = json.loads((tmp_path / "out" / "pst" / "pst_config.json").read_text())
    assert (small["step"], small["masks_frozen"]) == (STEPS, True)
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "latest")
    masks = _masks(tmp_path / "out" / "pst")
    assert set(masks) == set(checkpoint.masks)
    for name, bits in masks.items():
        assert torch.equal(bits, checkpoint.masks[name]), name
    assert small["sparsity"] == pytest.approx(result["sparsity_in_masks"])


def _masks(folder):
    from safetensors.torch import load_file

    tensors = load_file(folder / "pst_model.safetensors")
    return {n.removesuffix(".pst_mask_bits"): t for n, t in tensors.items() if n.endswith(".pst_mask_bits")}


@pytest.mark.thorough
def test_the_trainer_s_model_is_packed_and_verified(example, classifier, tmp_path, capsys):
    module = example("trainer_classification")
    data = "tests/data/train.jsonl"
    module.main(_arguments(classifier, data, tmp_path / "out"))
    assert f"{tmp_path}/out/merged: 0.79" in capsys.readouterr().out  # floor(0.8 x 32 x 32) is less than 0.8
    module.main(_arguments(classifier, data, tmp_path / "again", f"--resume={tmp_path}/out/checkpoint-4"))
    one, other = ((tmp_path / name / "pst" / "pst_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    packed = str(tmp_path / "packed")
    assert pst_ds(["export", str(tmp_path / "out" / "merged"), "--format", "bitmask", "--out", packed]) == 0
    assert pst_ds(["verify", packed]) == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_s_loop_ends_in_zeros_and_goes_on_to_the_same_bits(example, tmp_path, accumulation):
    text = " ".join(json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines())
    (tmp_path / "text.txt").write_text(text)
    module = example("accelerate_causal_lm")

    def run(out, *more):
        _forget_accelerator()
        module.main([
            "tests/data/tiny-llama", str(tmp_path / "text.txt"), str(tmp_path / out), "--sparsity=0.5", "--steps=6",
            "--batch-size=4", "--max-length=16", "--cpu", f"--accumulation={accumulation}", *more,
        ])  # fmt: skip
        return (tmp_path / out / "pst" / "pst_model.safetensors").read_bytes()

    whole = run("whole")
    run("part", "--stop-at=3")
    names = _tensor_names(tmp_path / "part" / "state" / "model.safetensors")
    assert not any(name.endswith("q_proj.weight") for name in names)
    assert run("rest", f"--resume={tmp_path}/part/state") == whole
    assert json.loads((tmp_path / "rest" / "pst" / "pst_config.json").read_text())["sparsity"] == pytest.approx(0.5)


def _fsdp2_loop(*arguments):
    importlib.import_module("fsdp2_loop").main(arguments)


@pytest.mark.zero3
def test_the_loop_under_fsdp2_goes_on_to_the_same_masks_on_other_ranks(run_ranks, tmp_path):
    text = " ".join(json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines())
    (tmp_path / "text.txt").write_text(text)
    given = "tests/data/tiny-llama", str(tmp_path / "text.txt")
    settings = "--sparsity=0.5", "--steps=6", "--batch-size=2", "--max-length=16"
    run_ranks(_fsdp2_loop, 2, *given, str(tmp_path / "whole"), *settings)
    run_ranks(_fsdp2_loop, 2, *given, str(tmp_path / "part"), *settings, "--stop-at=3")
    run_ranks(_fsdp2_loop, 2, *given, str(tmp_path / "rest"), *settings, f"--resume={tmp_path}/part/state")
    one, other = ((tmp_path / name / "pst" / "pst_model.safetensors").read_bytes() for name in ("whole", "rest"))
    assert one == other
    run_ranks(_fsdp2_loop, 3, *given, str(tmp_path / "more"), *settings, f"--resume={tmp_path}/part/state")
    for name in ("rest", "more"):
        assert json.loads((tmp_path / name / "pst" / "pst_config.json").read_text())["sparsity"] == pytest.approx(0.5)


@pytest.fixture
def text(tmp_path):
    """A corpus, and the number of sequences of 16 tokens in it."""
    from transformers import AutoTokenizer

    text = " ".join(json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines())
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "text.txt", len(AutoTokenizer.from_pretrained("tests/data/tiny-llama")(text)["input_ids"]) // 16


@pytest.mark.thorough
def test_an_accumulation_goes_on_over_the_end_of_the_text(example, text, tmp_path):
    """Five batches in all, two a step: some step has the last batch and the first."""
    path, sequences = text
    module = example("accelerate_causal_lm")

    def run(out, *more):
        _forget_accelerator()
        module.main([
            "tests/data/tiny-llama", str(path), str(tmp_path / out), "--sparsity=0.5", "--steps=8",
            f"--batch-size={-(-sequences // 5)}", "--max-length=16", "--cpu", "--accumulation=2", *more,
        ])  # fmt: skip
        return (tmp_path / out / "pst" / "pst_model.safetensors").read_bytes()

    whole = run("whole")
    run("part", "--stop-at=4")
    assert run("rest", f"--resume={tmp_path}/part/state") == whole
    run("all", "--stop-at=8")
    assert run("nothing left", f"--resume={tmp_path}/all/state") == whole


def test_a_text_shorter_than_one_sequence_is_refused(example, text, tmp_path):
    path, _ = text
    with pytest.raises(
        SystemExit, match=r"text\.txt has \d+ tokens, which is less than one sequence of --max-length=1"
    ):
        example("accelerate_causal_lm").main(
            ["tests/data/tiny-llama", str(path), str(tmp_path / "out"), "--max-length=100000", "--cpu"]
        )


def _accelerate_loop(text, out, config, *more):
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    if config is not None:
        from accelerate import PartialState

        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(config))
        PartialState(cpu=True)  # with Accelerator(cpu=True) there is no DeepSpeed
    importlib.import_module("accelerate_causal_lm").main([
        "tests/data/tiny-llama", str(text), str(out), "--sparsity=0.5", "--steps=6", "--batch-size=2",
        "--max-length=16", "--accumulation=2", *(["--cpu"] if config is None else []), *more,
    ])  # fmt: skip


@pytest.mark.zero3
@pytest.mark.parametrize("stage", [None, 2, 3], ids=["ddp", "zero2", "zero3"])
@pytest.mark.thorough
def test_accelerate_s_loop_on_two_ranks_goes_on_to_the_same_bits(run_ranks, tmp_path, stage):
    text = " ".join(json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines())
    (tmp_path / "text.txt").write_text(text)
    config = None if stage is None else tmp_path / "zero.json"
    if config is not None:
        config.write_text(json.dumps({
            "train_micro_batch_size_per_gpu": 2, "train_batch_size": "auto", "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 16},
        }))  # fmt: skip
    for out, more in (("whole", ()), ("part", ("--stop-at=3",)), ("rest", (f"--resume={tmp_path}/part/state",))):
        run_ranks(_accelerate_loop, 2, tmp_path / "text.txt", tmp_path / out, config, *more)
    whole, rest = ((tmp_path / name / "pst" / "pst_model.safetensors").read_bytes() for name in ("whole", "rest"))
    assert whole == rest
    small = json.loads((tmp_path / "rest" / "pst" / "pst_config.json").read_text())
    assert (small["step"], small["masks_frozen"]) == (6, True)
    assert small["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (tmp_path / "part" / "state" / "pytorch_model").is_dir() == (stage is not None)  # DeepSpeed's files


def _tensor_names(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return set(file.keys())


def _refused_deepspeed_loops(classifier, out, config):
    """What the loop says of too few rows, and of a folder without a checkpoint."""
    few = Path(config).with_name("few.jsonl")
    few.write_text("\n".join(Path("tests/data/train.jsonl").read_text().splitlines()[:7]))
    said = []
    for more in ((str(few),), ("tests/data/train.jsonl", f"--resume={out}/nowhere")):
        with pytest.raises(SystemExit) as caught:
            _deepspeed_loop(classifier, out, config, *more[1:], data=more[0])
        said.append(str(caught.value))
    return said


@pytest.mark.zero3
def test_the_deepspeed_loop_refuses_too_few_rows_and_a_folder_without_a_checkpoint(run_ranks, classifier, tmp_path):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "zero_optimization": {"stage": 2},
    }))  # fmt: skip
    for rows, resume in run_ranks(_refused_deepspeed_loops, 2, classifier, tmp_path / "out", config):
        assert rows == f"{tmp_path}/few.jsonl has 7 rows, but 2 ranks need 8 per batch"
        assert resume.startswith(f"--resume={tmp_path}/out/nowhere has no checkpoint")


def _deepspeed_loop(classifier, out, config, *more, data="tests/data/train.jsonl"):
    importlib.import_module("deepspeed_loop").main([
        str(classifier), data, str(out), f"--config={config}", "--sparsity=0.8", f"--steps={STEPS}", *more,
    ])  # fmt: skip


@pytest.mark.zero3
@pytest.mark.parametrize(("stage", "bf16"), [(3, True), (2, False), (0, True)])
@pytest.mark.thorough
def test_the_deepspeed_loop_goes_on_to_the_same_bits(run_ranks, classifier, tmp_path, stage, bf16):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "train_batch_size": 8, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 16},
    }))  # fmt: skip
    run_ranks(_deepspeed_loop, 2, classifier, tmp_path / "whole", config)
    run_ranks(_deepspeed_loop, 2, classifier, tmp_path / "part", config, "--stop-at=3")
    run_ranks(_deepspeed_loop, 2, classifier, tmp_path / "rest", config, f"--resume={tmp_path}/part/state")
    if stage == 2:  # nothing is left to do
        run_ranks(_deepspeed_loop, 2, classifier, tmp_path / "all", config, f"--stop-at={STEPS}")
        run_ranks(_deepspeed_loop, 2, classifier, tmp_path / "rest", config, f"--resume={tmp_path}/all/state")
    whole, part, rest = (
        (tmp_path / name / "pst" / "pst_model.safetensors").read_bytes() for name in ("whole", "part", "rest")
    )
    assert whole == rest != part
    small = json.loads((tmp_path / "rest" / "pst" / "pst_config.json").read_text())
    assert (small["step"], small["masks_frozen"], small["dtype"]) == (STEPS, True, "bfloat16" if bf16 else "float32")
    assert small["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert (tmp_path / "rest" / "merged" / "config.json").is_file()
