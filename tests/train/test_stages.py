"""What would stop a run after its first stage is found before any stage."""

from __future__ import annotations

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import run_from_table
from tests.pairs import every_pair

CAUSAL = "tests/data/causal_lm.toml"
STARTED = ("start.method=alps", "schedule.initial_sparsity=0.3", "start.samples=8")


def _words(verb, out, *settings):
    chosen = (f"output_dir={out}", "deepspeed_config=", *settings)
    return [verb, CAUSAL, *(word for setting in chosen for word in ("--set", setting))]


@every_pair
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.batch_size=5000",), "fewer than one batch"),
        (("finetune.method=lora", "finetune.num_steps=2", "train.batch_size=5000"), "fewer than one batch"),
        (("start.budgets=saliency", "pst.pattern=2:4", "schedule.final_sparsity=0.5", "schedule.initial_sparsity=0.5"),
         'start.budgets = "saliency": pattern 2:4'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_nothing_is_pruned_or_tuned_before_all_stages_are_checked(tmp_path, capsys, monkeypatch, verb, settings, words):
    def never(*args, **kwargs):
        raise AssertionError("work before the checks")

    monkeypatch.setattr("pst_ds.train.run.finetune", never)
    monkeypatch.setattr("pst_ds.train.run.start_run", never)
    out = tmp_path / "run"
    assert main(_words(verb, out, *STARTED, *settings)) == 2
    assert words in capsys.readouterr().err
    assert not (out / "start").exists()


def test_one_setting_switches_a_start_off(tmp_path, capsys):
    words = [*_words("plan", tmp_path / "run", *STARTED, "start.reconstruct=2"), "--set", "start.method=none", "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert '"start": null' in said.out
    assert 'note: start.method = "none" switches [start] off; ignored: start.samples, start.reconstruct' in said.err


def test_a_section_without_its_switch_is_refused(capsys):
    assert main([*_words("plan", "runs/x", "start.samples=12")]) == 2
    said = capsys.readouterr().err
    assert 'start.samples = 12 does nothing with start.method = "none". Remove start.samples, or set' in said


def test_what_is_switched_off_must_still_exist(capsys):
    assert main([*_words("plan", "runs/x", "start.method=none", "start.sampels=12")]) == 2
    assert "unknown key 'start.sampels'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "written"), [("[wandb]", '["wandb"]'), ("wandb", '["wandb"]'), ("[a, 'b']", '["a", "b"]')]
)
def test_a_list_without_quotes_is_shown_with_them(value, written):
    table = {"output_dir": "x", "model": {"path": "m"}, "data": {"train": "t"}, "tracking": {"to": value}}
    with pytest.raises(ValueError, match="tracking") as caught:
        run_from_table(table)
    assert f"in a shell: --set 'tracking.to={written}'" in str(caught.value)
