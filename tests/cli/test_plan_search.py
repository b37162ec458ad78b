"""``pst-ds plan --search`` against every one of its choices, planned by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pst_ds.cli.main import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 500,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def plan(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def made(*more):
        arguments = [
            "plan", "tests/data/causal_lm.toml", "--json", "--no-data", "--ranks", "2", "--machine", "h100",
            "--set", f"model.path={json.dumps(str(tmp_path))}", "--set", "train.batch_size=2",
            "--set", "data.max_length=4096", "--set", 'deepspeed_config="ds_configs/zero3.json"', *more,
        ]  # fmt: skip
        code = main(arguments)
        text = capsys.readouterr().out
        found = json.loads(text.splitlines()[-1])
        assert code == (3 if found["verdict"]["fits"] is False else 0)
        return text, found

    return made


def _set(settings):
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.thorough
def test_the_first_is_the_fastest_that_fits_and_each_is_what_its_settings_plan(plan):
    text, found = plan("--search")
    at_stage_2 = [line for line in found["search"] if line["zero_stage"] == 2]
    lines = [line for line in found["search"] if line["zero_stage"] == 3]
    (whole,) = (line for line in lines if line["settings"]["model.base_placement"] == "replicated")  # of the best way
    best, lines = found["search"][0], [line for line in lines if line is not whole]
    changed = [f"train.{name}" for name in ("gradient_accumulation_steps", "sequence_parallel")]
    settings = [tuple(line["settings"][name] for name in [*changed, "model.gradient_checkpointing"]) for line in lines]
    one_rank, two_ranks = (("1",), "1"), (("1", "2"), "2")
    assert sorted(settings) == sorted(
        (steps, degree, checkpointed)
        for of_degree, degree in (one_rank, two_ranks) for steps in of_degree for checkpointed in ("true", "false")
    )  # fmt: skip
    # no stage 2 for ranks that share sequences
    assert {line["settings"]["train.sequence_parallel"] for line in at_stage_2} == {"1"}
    for line in (*lines[::2], whole, *at_stage_2):
        _, alone = plan(*_set(line["settings"]))
        assert line["peak_bytes"] == alone["memory_bytes_per_rank"]["peak"]
        assert line["step"] == alone["time"]["step"]
        assert line["zero_stage"] == alone["zero_stage"]
        assert (line["fits"], line["hours"]) == (alone["verdict"]["fits"], alone["verdict"]["hours"])
    assert best["hours"] <= 1.01 * min(line["hours"] for line in found["search"])
    assert "ZeRO stage 2 needs" in text
    assert f"the first: {' '.join(_set(best['settings']))}" in text


@pytest.mark.thorough
def test_what_fits_comes_first_and_that_none_does_is_said(plan):
    cpu = ("--search", "--machine", "cpu")  # where a mask update takes less than the activations
    _, found = plan(*cpu)
    limit = min(line["needed_bytes"] for line in found["search"])
    text, tight = plan(*cpu, "--memory", f"{limit / 1e9:.9f}")
    fits = [line["fits"] for line in tight["search"]]
    assert [line["needed_bytes"] <= limit for line in tight["search"]] == fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    text, least = plan("--memory", "0.001")
    assert least["fix"] is None
    assert "to fix: take a smaller model" in text


@pytest.mark.thorough
def test_what_makes_a_run_fit_is_planned_and_the_mildest_change(plan):
    eight = ("--set", "train.batch_size=16")
    _, found = plan(*eight)
    needed = {steps: plan(*eight, "--set", f"train.gradient_accumulation_steps={steps}")[1] for steps in (2, 4)}
    needed = {steps: planned["verdict"]["needed_bytes"] for steps, planned in needed.items()}
    text, tight = plan(*eight, "--memory", f"{needed[4] / 1e9:.9f}")
    assert found["verdict"]["needed_bytes"] > needed[2] > needed[4]
    assert tight["fix"]["settings"]["train.gradient_accumulation_steps"] == "4"
    assert tight["fix"]["needed_bytes"] == needed[4]
    assert "to fix: --set train.gradient_accumulation_steps=4: " in text


def test_where_memory_is_short_only_as_many_blocks_are_recomputed_as_must_be(plan):
    def needed(*settings):  # on a CPU, where a mask update takes less than the activations
        return plan(*settings)[1]["verdict"]["needed_bytes"]

    alone = ("--machine", "cpu", "--set", "train.batch_size=1", "--ranks", "1")
    every = ("--set", "model.gradient_checkpointing=true")
    one = (*every, "--set", "model.recomputed_blocks=1")
    assert needed(*alone) > needed(*alone, *one) > needed(*alone, *every)
    memory = needed(*alone, *one) / 1e9 * 1.12  # with the margin that the best ways leave
    text, found = plan("--search", *alone, *every, "--memory", f"{memory:.9f}")
    best = found["search"][0]["settings"]
    assert (best["model.gradient_checkpointing"], best.get("model.recomputed_blocks")) == ("true", "1")
    assert "1 of 2" in text


@pytest.mark.thorough
def test_heads_that_ranks_cannot_share_are_left_out(plan):
    _, found = plan("--search", "--ranks", "16", "--set", "train.batch_size=16")
    degrees = {line["settings"]["train.sequence_parallel"] for line in found["search"]}
    assert degrees == {"1", "2"}  # of two heads


def test_stage_2_is_tried_and_why_not_is_said(plan, tmp_path):
    small = ("--search", "--set", "data.max_length=64")
    text, found = plan(*small)
    best = {stage: next(line for line in found["search"] if line["zero_stage"] == stage) for stage in (2, 3)}
    # a model so small that the host bounds every step, which has fewer hooks at stage 2
    assert best[2]["step"] < best[3]["step"]
    assert found["search"][0] == best[2]
    assert best[2]["settings"]["deepspeed_config"].endswith("ds_configs/zero2.json")
    assert "ZeRO stage 2 needs" in text
    copied = tmp_path / "zero3.json"
    copied.write_text(Path("ds_configs/zero3.json").read_text())
    elsewhere = (*small, "--set", f'deepspeed_config="{copied}"')
    text, found = plan(*elsewhere)
    assert {line["zero_stage"] for line in found["search"]} == {3}
    file = tmp_path / "zero2.json"
    assert f"ZeRO stage 2 was not tried: {file} does not exist; copy ds_configs/zero2.json there" in text
    file.write_text(copied.read_text())
    text, _ = plan(*elsewhere)
    assert f"ZeRO stage 2 was not tried: {file} is of stage 3" in text


@pytest.mark.thorough
def test_stage_3_makes_a_run_fit_that_does_not_at_stage_2(plan, tmp_path):
    # more weights than stage 3 keeps gathered
    large = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(large))

    def planned(stage, *more):
        file = f'deepspeed_config="ds_configs/zero{stage}.json"'
        return plan("--set", "model.gradient_checkpointing=true", "--set", file, *more)

    _, at_3 = planned(3)
    _, at_2 = planned(2)
    needed = at_3["verdict"]["needed_bytes"]
    assert needed < at_2["verdict"]["needed_bytes"]
    text, tight = planned(2, "--memory", f"{needed / 1e9:.9f}")
    assert tight["fix"]["zero_stage"] == 3
    assert "to fix: --set deepspeed_config=" in text
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    text, _ = planned(2, "--search")
    assert "ZeRO stage 2 was not tried: the run has it already" in text
