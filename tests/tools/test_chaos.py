"""The soak kills where it says, sees what a kill has left and tells two runs apart; and a short one, for real."""

import json
import os
import random
import subprocess
import sys
from itertools import islice

import pytest
import torch

from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import prepare, train_prepared
from tests.forks import ForkedLaunch
from tools.chaos import kill_points
from tools.chaos.__main__ import Findings, Kill, main, parse, summary
from tools.chaos.compare import differences, false_failures, metric_lines, same_bits, set_aside, whole_checkpoints
from tools.chaos.corpora import first_words
from tools.chaos.kill_points import HALF, WHERE, Timing, Watch, deck, last_step, moment, victims
from tools.chaos.launch import descendants, ranks_below
from tools.cluster.processes import wait_until

TIMING = Timing(start=1.0, step=1.0, save=1.0, whole=9.0, num_steps=12)


def has_ended(generator):
    return len(list(islice(generator, 3))) < 3


def test_every_class_comes_up_in_turn_and_any_ranks_may_be_hit():
    for seed in range(20):
        aims = deck(14, random.Random(seed))
        assert sorted(aims[:6]) == sorted(aims[6:12]) == sorted(WHERE)
        assert len(aims) == 14
    assert deck(9, random.Random(3)) == deck(9, random.Random(3))
    rng = random.Random(0)
    found = {tuple(victims(3, rng)) for _ in range(200)}
    assert found == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert victims(1, rng) == [0]


def test_a_kill_in_the_middle_waits_for_the_middle_step(tmp_path):
    run = Run(tmp_path / "run")
    watch = Watch(run.folder)
    timing = Timing(start=1.0, step=0.0, save=1.0, whole=9.0, num_steps=12)
    run.metrics(1, 5)
    waits = moment(HALF, watch, timing, random.Random(0))
    assert next(waits, "now") is None
    run.metrics(1, 5, 6)
    assert has_ended(waits)


def test_a_corpus_is_its_first_words():
    assert first_words(["a b c", "d e", "f"], 4) == ["a b c", "d"]
    assert first_words(["a b", "c"], 9) == ["a b", "c"]


class Run:
    """A run folder as a training makes it, step by step."""

    def __init__(self, folder):
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.checkpoints.mkdir(parents=True)

    def metrics(self, *steps, more=""):
        beside = self.folder / ".metrics.jsonl.partial"
        beside.write_text(
            "".join(json.dumps({"step": n, "seconds": 1.0, "event": "step"}) + "\n" for n in steps) + more
        )
        beside.replace(self.folder / "metrics.jsonl")

    def begin(self, step):
        (self.checkpoints / f"step-{step:08d}.partial").mkdir()

    def name(self, step):
        (self.checkpoints / f"step-{step:08d}.partial").rename(self.checkpoints / f"step-{step:08d}")


def test_a_watch_sees_saves_of_this_start_alone(tmp_path):
    run = Run(tmp_path)
    run.begin(3)
    run.name(3)
    run.begin(6)  # left by a kill
    run.metrics(1, 2, 3, 4, 5, 6)
    watch = Watch(tmp_path)
    watch.look()
    assert (watch.newest, watch.partial_at, watch.named_at) == (3, {}, {})
    assert watch.has_partial()
    assert not watch.has_begun()
    assert watch.last_step() == 0
    (run.checkpoints / "step-00000006.partial").rmdir()
    run.metrics(1, 2, 3, 4)
    watch.look()
    assert watch.has_begun()
    assert watch.last_step() == 4
    run.begin(6)
    watch.look()
    assert (list(watch.partial_at), watch.named_at) == ([6], {})
    run.name(6)
    (run.checkpoints / "step-00000003").rename(run.checkpoints / "step-00000003.partial")  # retention
    watch.look()
    assert (watch.newest, list(watch.partial_at), list(watch.named_at)) == (6, [6], [6])


def test_moments_wait_for_what_they_aim_at(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_points, "_pause", lambda seconds: iter(()))
    run, rng = Run(tmp_path), random.Random(0)
    watch = Watch(tmp_path)
    moments = {where: moment(where, watch, TIMING, rng) for where in ("step", "saving", "named", "final")}
    assert has_ended(moment("start", watch, TIMING, rng))
    assert has_ended(moment("any", watch, TIMING, rng))
    assert not any(map(has_ended, moments.values()))
    run.metrics(*range(1, 12))
    assert has_ended(moments.pop("step"))
    for step in (3, 6, 9):  # the third at the latest
        run.begin(step)
        watch.look()
    assert has_ended(moments.pop("saving"))
    assert not any(map(has_ended, moments.values()))
    for step in (3, 6, 9):
        run.name(step)
    run.begin(12)
    watch.look()
    assert has_ended(moments.pop("named"))
    run.name(12)
    watch.look()
    assert has_ended(moments.pop("final"))


def test_the_last_step_is_that_of_a_whole_line(tmp_path):
    run = Run(tmp_path)
    assert last_step(tmp_path / "metrics.jsonl") == 0
    save = json.dumps({"step": 300, "seconds": 1.0, "event": "checkpoint"}) + "\n"
    run.metrics(*range(1, 400), more=save + '{"step": 400, "seconds": 2.0, "event": "st')
    assert last_step(tmp_path / "metrics.jsonl") == 399


def test_ranks_are_found_below_the_launcher_by_their_arguments():
    waits = "import sys; sys.stdin.read()"
    launcher = (
        "import subprocess, sys\n"
        f"rank = [sys.executable, '-c', {waits!r}]\n"
        "started = [subprocess.Popen([*rank, f'--local_rank={i}', 'train']) for i in range(2)]\n"
        "print(*[process.pid for process in started], flush=True)\n"
        "[process.wait() for process in started]\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        pids = list(map(int, process.stdout.readline().split()))
        # Popen returns while exec replaces the program, when its command line may still be empty
        wait_until(lambda: ranks_below(process.pid) == dict(enumerate(pids)), 10, lambda: str(ranks_below(process.pid)))
        assert set(descendants(os.getpid())) >= {process.pid, *pids}
        process.stdin.close()
    assert ranks_below(process.pid) == {}


def test_bits_are_compared_and_not_values():
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor(0.0)
    assert same_bits(nan, nan.clone())
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(nan, nan.double())
    assert not same_bits(nan, nan.view(1, 2))
    assert same_bits(3, 3)
    assert not same_bits(3, 4)


def _trained(folder, *more):
    settings = ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", "train.num_steps=6", *more]
    run = load_run("tests/data/world_size.toml", ["checkpoint.interval=2", "checkpoint.keep_last=2", *settings])
    train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), quiet=True)
    return folder


def test_equal_runs_have_no_differences_and_others_are_told_apart(tmp_path):
    one, same = _trained(tmp_path / "one"), _trained(tmp_path / "same")
    assert differences(one, same) == []
    assert whole_checkpoints(same) == ([6, 4], [])
    assert set_aside(same) == []
    other = differences(one, _trained(tmp_path / "other", "train.update_learning_rate=3e-4"))
    for what in (
        "result.json: ",
        "final checkpoint: master of",
        "final checkpoint: exp_avg of",
        "export: ",
        "metrics.",
    ):
        assert any(line.startswith(what) for line in other), what

    lines = (same / "metrics.jsonl").read_text().splitlines()
    assert len(metric_lines(same / "metrics.jsonl")) < len(lines)
    (same / "metrics.jsonl").write_text("\n".join(line for line in lines if "evaluation" not in line) + "\n")
    assert any("lines" in line for line in differences(one, same))
    failed = json.dumps({"step": 6, "seconds": 9.0, "event": "checkpoint_failed", "error": "a rank is gone"})
    (same / "metrics.jsonl").write_text("\n".join([*lines, failed]) + "\n")
    assert differences(one, same) == []
    assert (false_failures(one), false_failures(same)) == ([], [6])
    (same / "checkpoints" / "final").unlink()
    assert "no checkpoint 'final'" in differences(one, same)[0]
    shard = next((same / "checkpoints" / "step-00000006").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    steps, problems = whole_checkpoints(same)
    assert steps == [4]
    assert len(problems) == 1
    assert shard.name in problems[0]
    (same / "checkpoints" / "step-00000006").rename(same / "checkpoints" / "step-00000006.broken")
    assert set_aside(same) == [str(same / "checkpoints" / "step-00000006.broken")]


def test_all_is_well_only_when_every_kill_was_resumed_and_nothing_broke():
    kill = Kill("saving", [0, 1], 8, 3, 5, True, 0)
    well = {"kills": [kill], "resumed": 1, "runs": 1}
    assert Findings(**well).all_is_well
    for bad in ({"resumed": 0}, {"broken": {"a"}}, {"problems": ["lost"]}, {"identical": False}):
        assert not Findings(**{**well, **bad}).all_is_well
    arguments = parse(["--kills", "1", "--seed", "4"])
    found = summary(Findings(**well), arguments, 1.23)
    assert found["where"] == {**dict.fromkeys(WHERE, 0), "saving": 1}
    assert (found["lost_steps"], found["lost_steps_max"], found["left_partial"]) == ([5], 5, 1)
    assert (found["ranks"], found["seed"], found["seconds"], found["identical"]) == (2, 4, 1.2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kills", "0"], "at least 1"),
        (["--run", "no.toml"], "no such file"),
        (["--out", "tests"], "not an empty folder"),
        (["--out", "Makefile"], "not an empty folder"),
    ],
)
def test_bad_arguments_end_with_2_and_one_message(capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def _chaos(*arguments):
    command = [sys.executable, "-m", "tools.chaos", "--json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.zero3
def test_three_kills_change_nothing(imported_by_ranks, tmp_path, monkeypatch, capsys):
    """Ranks are forks, which start in a second."""
    monkeypatch.setattr("tools.chaos.__main__.Launch", ForkedLaunch)
    out = tmp_path / "out"
    options = ["--kills", "3", "--seed", "8", "--set", "train.num_steps=24", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["chaos", "--json", *options])
    code, said = main(), capsys.readouterr().out
    assert code == 0, said
    found = json.loads(said.splitlines()[-1])
    assert (found["kills"], found["resumed"], found["broken_checkpoints"]) == (3, 3, 0)
    assert found["where"] == {**dict.fromkeys(WHERE, 0), "step": 1, "saving": 1, "named": 1}
    assert found["identical"]
    assert found["problems"] == []
    assert found["lost_steps_max"] == max(found["lost_steps"]) <= 2 * 3  # a save may still be written at the next one
    assert (out / "reference" / "export").is_dir()


@pytest.mark.launcher
def test_a_kill_under_the_launcher_changes_nothing(tmp_path):
    done = _chaos("--kills", "1", "--ranks", "1", "--where", "saving", "--set", "train.num_steps=12")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["kills"], found["resumed"], found["ranks_killed"], found["where"]["saving"]) == (1, 1, [1], 1)
    assert found["identical"]


@pytest.mark.launcher
def test_a_training_that_refuses_its_input_ends_with_2_and_its_message(tmp_path):
    done = _chaos("--set", "train.num_step=24", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "train.num_step" in done.stderr.splitlines()[-1]
