"""``pst-ds plan --search`` against every one of its choices, planned by itself."""

from __future__ import annotations

import json

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
        assert main(arguments) == 0
        text = capsys.readouterr().out
        return text, json.loads(text.splitlines()[-1])

    return made


def _set(settings):
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.thorough
def test_the_first_is_the_fastest_that_fits_and_each_is_what_its_settings_plan(plan):
    text, found = plan("--search")
    lines = found["search"]
    settings = [tuple(line["settings"].values()) for line in lines]
    one_rank, two_ranks = (("1",), "1"), (("1", "2"), "2")
    assert sorted(settings) == sorted(
        (steps, degree, checkpointed)
        for of_degree, degree in (one_rank, two_ranks) for steps in of_degree for checkpointed in ("true", "false")
    )  # fmt: skip
    for line in lines[::2]:
        _, alone = plan(*_set(line["settings"]))
        assert line["peak_bytes"] == alone["memory_bytes_per_rank"]["peak"]
        assert line["step"] == alone["time"]["step"]
        assert (line["fits"], line["hours"]) == (alone["verdict"]["fits"], alone["verdict"]["hours"])
    assert lines[0]["hours"] == min(line["hours"] for line in lines)
    assert f"the first: {' '.join(_set(lines[0]['settings']))}" in text


@pytest.mark.thorough
def test_what_fits_comes_first_and_that_none_does_is_said(plan):
    cpu = ("--search", "--machine", "cpu")  # where a mask update takes less than the activations
    _, found = plan(*cpu)
    limit = min(line["needed_bytes"] for line in found["search"])
    text, tight = plan(*cpu, "--memory", f"{limit / 1e9:.9f}")
    fits = [line["fits"] for line in tight["search"]]
    assert [line["needed_bytes"] <= limit for line in tight["search"]] == fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    assert "none fits" not in text
    text, _ = plan("--search", "--memory", "0.001")
    assert "none fits: take more ranks" in text


@pytest.mark.thorough
def test_heads_that_ranks_cannot_share_are_left_out(plan):
    _, found = plan("--search", "--ranks", "16", "--set", "train.batch_size=16")
    degrees = {line["settings"]["train.sequence_parallel"] for line in found["search"]}
    assert degrees == {"1", "2"}  # of two heads
