"""Runs with a prompt: what trains, on how many ranks, and that a run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.nn.prompt import prompt_of
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.prompts import add_prompt
from pst_ds.train.run import prepare, train_prepared

SHARED = ["task=causal-lm", "data.document_mask=false", "deepspeed_config=ds_configs/zero3_cpu.json"]
NAME = "bert.pst_prompt.pst_P"


def _run(folder, *more):
    settings = [
        f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", "prompt.text='a good film'", "train.num_steps=4",
        "train.prompt_learning_rate=0.01", "eval.interval=0", "schedule.final_sparsity=0.5", *more,
    ]  # fmt: skip
    return load_run("tests/data/world_size.toml", settings)


def _train(folder, *more):
    prepared = prepare(_run(folder, *more), LaunchEnvironment(rank(), world_size(), rank()))
    return train_prepared(prepared, quiet=True)


def _trained(folder):
    return dict(read_checkpoint((Path(folder) / "checkpoints" / "final").resolve()).trained)


def _losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_sk_tuning_trains_the_prompt_and_the_head_under_a_fixed_mask(tmp_path):
    result = _train(tmp_path, "method=sk-tuning")
    trained = _trained(tmp_path)
    assert {name for name in trained if not name.startswith(("classifier", "bert.pooler"))} == {NAME}
    assert result["trained_parameters"] == sum(value.numel() for value in trained.values())
    assert trained[NAME].shape == (3, 32)
    assert len(set(_losses(tmp_path))) == 4


def test_beside_pst_from_hidden_states_with_an_adapter(tmp_path):
    more = ("prompt.source=hidden", "prompt.adapter=low-rank", "prompt.rank=2")
    _train(tmp_path, *more)
    trained = _trained(tmp_path)
    assert trained["bert.pst_prompt.pst_U"].any()
    assert trained["bert.encoder.layer.0.attention.self.query.pst_U"].any()


def test_a_random_start_is_of_the_size_of_the_words_and_of_the_seed(tmp_path):
    found = {}
    for name, more in (
        ("words", []),
        ("first", ["prompt.source=random"]),
        ("second", ["prompt.source=random", "seed=11"]),
    ):
        run = _run(tmp_path / name, *more)
        model = AutoModelForSequenceClassification.from_pretrained(run.model.path)
        add_prompt(model, run, prepare(run, LaunchEnvironment(0, 1, 0)).tokenizer)
        found[name] = prompt_of(model)().detach()
    assert found["first"].shape == found["words"].shape
    assert not torch.equal(found["first"], found["second"])
    sizes = {name: float(values.square().mean().sqrt()) for name, values in found.items()}
    assert sizes["first"] == pytest.approx(sizes["words"], rel=0.25)


@pytest.mark.zero3
def test_losses_do_not_depend_on_the_world_size(run_ranks, tmp_path):
    more = ("deepspeed_config=ds_configs/zero3_cpu.json", "method=sk-tuning", "prompt.source=hidden")
    run_ranks(_train, 2, str(tmp_path / "zero3"), *more)
    _train(tmp_path / "local", "method=sk-tuning", "prompt.source=hidden")
    assert _losses(tmp_path / "zero3") == pytest.approx(_losses(tmp_path / "local"), abs=1e-4)
    ours, theirs = (_trained(tmp_path / name)[NAME] for name in ("zero3", "local"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["prompt.text=", "method=sk-tuning"], r"prompt.text = '' with method = 'sk-tuning'"),
        (["prompt.rank=2"], 'rank = 2 with prompt.adapter = "none"'),
        (["prompt.adapter=low-rank"], "has a rank, of at least 1"),
        (["prompt.text=", "prompt.source=hidden"], "does nothing without prompt.text"),
        (["task=causal-lm", "data.text_columns=['text']", "prompt.text='a'"], "Set data.document_mask = false"),
        (["train.sequence_parallel=2", *SHARED], "Set train.sequence_parallel = 1"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_is_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        _run(tmp_path, *more)


def test_a_prompt_without_tokens_or_room_is_refused(tmp_path):
    for more, message in (
        (["prompt.text=' '"], "has no tokens"),
        (["data.max_length=46"], r"set data.max_length to at most 45"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(_run(tmp_path, *more), LaunchEnvironment(0, 1, 0))
