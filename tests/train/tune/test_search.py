"""``pst-ds tune``: trials on a tiny model, what is remembered of them, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.config.train import RATES
from pst_ds.data.labelled import Examples
from pst_ds.data.tasks import task_of
from pst_ds.parallel import stop_signals
from pst_ds.train.divergence import DivergedError
from pst_ds.train.objective import Objective
from pst_ds.train.tune import halving, trials
from pst_ds.train.tune.halving import Candidate
from pst_ds.train.tune.trials import standard_error, trial_run

RUN_FILE = "tests/data/world_size.toml"
pytestmark = pytest.mark.usefixtures("alone")


OWN = {
    "score_learning_rate": 1e-2,
    "update_learning_rate": 1e-3,
    "embedding_learning_rate": 2e-4,
    "head_learning_rate": 5e-4,
}
OWN_RATES = "\n".join(f"{name} = {rate}" for name, rate in OWN.items())


@pytest.fixture
def run_file(tmp_path):
    """A copy of the tiny run, for one process; 3 trials of 40 steps are a fifth of it."""
    text = Path(RUN_FILE).read_text().replace('"ds_configs/zero3_cpu.json"', '""')
    text = text.replace("runs/world_size", str(tmp_path / "run")).replace(
        "num_steps = 20", f"num_steps = 600\n{OWN_RATES}"
    )
    (tmp_path / "mine.toml").write_text(text)
    return str(tmp_path / "mine.toml")


@pytest.fixture
def short_file(run_file, monkeypatch):
    """The same run, of which 3 trials of 10 steps are a fifth."""
    monkeypatch.setattr(halving, "LEAST_STEPS", 10)
    text = Path(run_file).read_text()
    Path(run_file).write_text(text.replace("num_steps = 600", "num_steps = 150"))
    return run_file


@pytest.fixture
def planned(monkeypatch):
    """``planned(metrics)``: no trial is trained, but has what ``metrics`` returns for its rates; the runs so far."""

    def plan(metrics):
        runs = []

        def train_prepared(prepared, **_):
            runs.append(prepared.run)
            return {"metrics": metrics(prepared.run.train, prepared.run.train.num_steps), "seconds": 1.0}

        monkeypatch.setattr(trials, "train_prepared", train_prepared)
        return runs

    return plan


def _lines(folder):
    return [json.loads(line) for line in (Path(folder) / "tune.jsonl").read_text().splitlines()]


def _without_times(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["tune", *arguments]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    return message


def test_trials_are_trained_compared_and_written_down(short_file, tmp_path, verb, capsys):
    said = verb("tune", short_file, "--quiet")
    _, *made, choice = _lines(tmp_path / "run")
    assert [(t["rung"], t["trial"], t["steps"]) for t in made] == [(0, 0, 10), (0, 1, 10), (0, 2, 10)]
    assert said["trials"] == [{k: v for k, v in t.items() if k != "event"} for t in made]
    for trial in made:
        folder = tmp_path / "run" / "tune" / f"0-{trial['trial']}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["steps"], result["metrics"]["accuracy"]) == (10, trial["value"])
        assert result["sparsity_in_masks"] == pytest.approx(0.8, abs=1e-3)  # the whole ramp
        assert not (folder / "checkpoints").exists()
    assert len({t["update_learning_rate"] for t in made}) == 3
    best = max(made, key=lambda t: t["value"])
    taken = best if best["value"] - made[0]["value"] > made[0]["standard_error"] else made[0]
    assert choice["trial"] == taken["trial"]
    before, after = load_run(short_file), load_run(said["out"])
    assert {name: getattr(after.train, name) for name in RATES} == Candidate(taken["factor"]).rates(before.train)
    assert said["out"] == str(tmp_path / "mine.tuned.toml")
    text = Path(said["out"]).read_text()
    assert text.startswith("# pst-ds tune: learning rates ")
    assert "# 20 steps of a tiny model" in text  # the user's own comments stay
    assert load_run(tmp_path / "run" / "run.toml") == after
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(page)]) == 0
    shown = page.read_text()
    assert "Learning rates tried" in shown
    assert f"{made[1]['value']:.4g}" in shown


@pytest.mark.thorough
def test_a_search_that_is_done_is_not_done_again(run_file, tmp_path, planned, verb, capsys):
    runs = planned(lambda train, steps: {"accuracy": train.update_learning_rate, "standard_error": 1e-9})
    first = verb("tune", run_file)
    assert len(runs) == 3
    assert "mine.tuned.toml' exists; --force writes over it" in _refused(capsys, run_file)
    other = str(tmp_path / "other.toml")
    again = verb("tune", run_file, "--out", other)
    assert len(runs) == 3
    assert again == {**first, "out": other}
    assert Path(other).read_bytes() == Path(first["out"]).read_bytes()
    verb("tune", run_file, "--force", "--restart")
    assert len(runs) == 6


@pytest.mark.thorough
@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_search_goes_on_and_runs_no_finished_trial_again(run_file, tmp_path, planned, verb, at):
    def metrics(train, steps):
        return {"accuracy": math.log(train.update_learning_rate) * steps, "standard_error": 0.1}

    runs = planned(metrics)
    verb("tune", run_file, "--out", str(tmp_path / "a.toml"), "--set", f"output_dir={tmp_path}/a", "--budget", "1.0")
    whole = len(runs)

    def dies(train, steps):
        if len(killed) > at:
            raise KeyboardInterrupt
        return metrics(train, steps)

    killed = planned(dies)
    more = ["--set", f"output_dir={tmp_path}/b", "--budget", "1.0", "--out", str(tmp_path / "b.toml")]
    assert main(["tune", run_file, *more]) == 130
    assert not (tmp_path / "b.toml").exists()
    runs = planned(metrics)
    verb("tune", run_file, *more)
    assert len(runs) == whole - at
    (_, *lines), (_, *expected) = _lines(tmp_path / "b"), _lines(tmp_path / "a")
    assert lines == expected
    assert len([line for line in lines if line["event"] == "trial"]) == whole


@pytest.mark.thorough
def test_a_trial_that_a_signal_stopped_goes_on_where_it_was(short_file, tmp_path, verb, capsys, monkeypatch):
    verb("tune", short_file, "--out", str(tmp_path / "a.toml"), "--set", f"output_dir={tmp_path}/a")
    loss, calls = Objective.__call__, iter(range(1, 10**6))

    def called(self, *arguments):
        if next(calls) == 17:  # in the second trial
            stop_signals._asked_by = 15
        return loss(self, *arguments)

    stopped = ["tune", short_file, "--out", str(tmp_path / "b.toml"), "--set", f"output_dir={tmp_path}/b"]
    with monkeypatch.context() as patch:
        patch.setattr(stop_signals, "_asked_by", 0)
        patch.setattr(Objective, "__call__", called)
        capsys.readouterr()
        assert main(stopped) == 75
    message = capsys.readouterr().err
    assert "stopped by SIGTERM after step 7 of 10" in message
    assert "the same command resumes it" in message
    assert [line["event"] for line in _lines(tmp_path / "b")] == ["search", "trial"]
    steps = []
    monkeypatch.setattr(Objective, "__call__", lambda *a: steps.append(1) or loss(*a))
    verb(*stopped)
    assert len(steps) == 3 + 10
    assert _without_times(_lines(tmp_path / "b")[1:]) == _without_times(_lines(tmp_path / "a")[1:])


@pytest.mark.thorough
def test_own_rates_are_carried_into_every_rung_and_stay_within_the_error(run_file, tmp_path, planned, verb):
    # the factor 9 is best, the run's own rates are worst, though within the error
    runs = planned(lambda train, steps: {"accuracy": 0.8 + 1e-6 * train.update_learning_rate, "standard_error": 0.01})
    said = verb("tune", run_file, "--set", "train.num_steps=2200")
    assert [run.train.num_steps for run in runs] == [40] * 5 + [120] * 2
    assert [t["trial"] for t in said["trials"]] == [0, 1, 2, 3, 4, 0, 3]
    assert said["chosen"] == Candidate().rates(load_run(run_file).train)
    assert "as they were" in Path(said["out"]).read_text().partition("\n")[0]


@pytest.mark.thorough
def test_all_trials_begin_with_one_start_and_the_run_makes_no_other(run_file, tmp_path, planned, verb):
    runs = planned(lambda train, steps: {"accuracy": train.update_learning_rate, "standard_error": 1e-9})
    start = ("start.method=wanda", "start.samples=12", "schedule.initial_sparsity=0.5")
    verb("tune", run_file, *(word for setting in start for word in ("--set", setting)))
    assert {(run.model.path, run.start.method) for run in runs} == {(str(tmp_path / "run" / "start"), "none")}
    made = (tmp_path / "run" / "start" / "model.safetensors").stat().st_mtime_ns
    tuned = load_run(tmp_path / "run" / "run.toml")
    assert (tuned.model.path, tuned.start.method) == ("tests/data/tiny-bert", "wanda")
    verb("train", str(tmp_path / "run"), "--set", "train.num_steps=2", "--set", "schedule.update_interval=1")
    assert (tmp_path / "run" / "start" / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.thorough
def test_perplexity_is_minimised(tmp_path, planned, verb):
    runs = planned(lambda train, steps: {"perplexity": 1 / train.update_learning_rate, "standard_error": 1.0})
    more = ["deepspeed_config=", f"output_dir={tmp_path}/run", "train.num_steps=600", "train.update_learning_rate=1e-3"]
    sets = [word for setting in more for word in ("--set", setting)]
    said = verb("tune", "tests/data/causal_lm.toml", "--out", str(tmp_path / "out.toml"), *sets)
    assert len(runs) == 3
    assert said["chosen"]["update_learning_rate"] == 3e-3


@pytest.mark.thorough
def test_a_trial_that_diverges_is_passed_over(run_file, planned, verb, capsys):
    def metrics(train, steps):
        if train.update_learning_rate > 4e-3:
            raise DivergedError("the loss is not finite")
        return {"accuracy": 1e-3 / train.update_learning_rate, "standard_error": 0.01}

    planned(metrics)
    said = verb("tune", run_file, "--quiet")
    assert [trial["value"] is None for trial in said["trials"]] == [False, True, False]
    assert said["chosen"]["update_learning_rate"] == 0.000333


@pytest.mark.thorough
def test_the_run_of_a_trial_has_every_share_of_the_whole_run():
    run = load_run(
        RUN_FILE, ["train.num_steps=900", "schedule.update_interval=4", *(f"train.{n}={r}" for n, r in OWN.items())]
    )
    trial = trial_run(run, Candidate(), 225, 900, Path("a"))
    whole, short = run.make_schedules(900).masks, trial.make_schedules(225).masks
    assert [short.sparsity_at(s) for s in range(226)] == [whole.sparsity_at(4 * s) for s in range(226)]
    assert trial.train.learning_rate_warmup_fraction == run.train.learning_rate_warmup_fraction
    assert trial.train.update_learning_rate > run.train.update_learning_rate


def test_the_standard_error_of_an_accuracy_is_the_binomial_one():
    task, n = task_of(load_run(RUN_FILE)), 1000
    examples = Examples([], [0] * n)
    outcomes = np.where(np.arange(n) < 700, 1.0, -1.0)[:, None] * np.array([1.0, -1.0])
    assert task.metrics(outcomes, examples)["accuracy"] == 0.7
    assert standard_error(task, outcomes, examples, "accuracy") == pytest.approx(math.sqrt(0.7 * 0.3 / n), rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "data.validation="], ["data.validation is missing", "the trials are compared on it"]),
        (["--set", "train.num_steps=400"], ["--budget 0.2 of 400 optimizer steps is 80", "--budget 0.3"]),
        (["--set", "train.num_stps=200"], ["unknown key 'train.num_stps'"]),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(run_file, tmp_path, capsys, arguments, parts):
    message = _refused(capsys, run_file, *arguments)
    assert [part for part in parts if part not in message] == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize("share", ["0", "1.5", "a fifth", "nan"])
def test_a_share_is_above_0_and_up_to_1(run_file, capsys, share):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", run_file, "--budget", share])
    assert "is not a share above 0 and up to 1" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_folder_of_another_search_or_of_a_trained_run_is_refused(run_file, tmp_path, planned, capsys):
    planned(lambda train, steps: {"accuracy": 0.5, "standard_error": 0.1})
    assert main(["tune", run_file]) == 0
    message = _refused(capsys, run_file, "--force", "--set", "train.batch_size=12")
    assert "has the trials of another search: train.batch_size = 24 there, and 12 now" in message
    assert "--restart" in message
    (tmp_path / "run" / "result.json").write_text("{}")
    before = (tmp_path / "run" / "tune.jsonl").read_bytes()
    assert "has a trained run, but a search comes before it" in _refused(capsys, run_file, "--force", "--restart")
    assert (tmp_path / "run" / "tune.jsonl").read_bytes() == before
    assert main(["tune", run_file, "--force"]) == 0  # what was found is still written
    (tmp_path / "run" / "tune.jsonl").write_text("{")
    assert "tune.jsonl is damaged" in _refused(capsys, run_file, "--force")


def test_a_search_in_the_folder_of_another_run_is_refused(run_file, tmp_path, locked_elsewhere, capsys):
    pid = locked_elsewhere(tmp_path / "run" / "run.lock")
    assert main(["tune", run_file]) == 2
    assert f"pst-ds tune: InputError: output_dir = '{tmp_path}/run': pid {pid} on " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
