"""Trackers: W&B offline for real, the rules by one that records; a tracker that fails ends no run."""

from __future__ import annotations

import json
import sqlite3
from types import SimpleNamespace

import pytest

from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError, TrackingConfig
from pst_ds.train.monitor import trackers as module
from pst_ds.train.monitor.trackers import Trackers

RUN_FILE = "tests/data/causal_lm.toml"


class Recorder:
    """A tracker that remembers; ``fails_at`` is the step that it fails at, 0 at its start."""

    def __init__(self, kind, known, settings, fails_at):
        self.id, self.settings = known or f"{kind}-id", settings
        self.points, self.finished, self._fails_at = [], False, fails_at
        self._fail(0)

    def log(self, values, step):
        self._fail(step)
        self.points.append((step, values))

    def finish(self):
        self.finished = True

    def _fail(self, step):
        if step == self._fails_at:
            raise RuntimeError("no network\nand more")


@pytest.fixture
def made(monkeypatch):
    """The trackers that were made, and ``fails``: the step at which each kind fails."""
    found = SimpleNamespace(trackers=[], fails={})

    def make(kind):
        def tracker(project, name, known, settings):
            found.trackers.append(Recorder(kind, known, settings, found.fails.get(kind)))
            return found.trackers[-1]

        return tracker

    monkeypatch.setattr(module, "_KINDS", {kind: make(kind) for kind in module._KINDS})
    return found


def _trackers(folder, *, goes_on=False, to=("wandb",)):
    config = TrackingConfig(to=to)
    return Trackers(config, folder, {"seed": 1}, goes_on=goes_on)


def test_a_run_that_goes_on_is_the_same_one(made, tmp_path):
    _trackers(tmp_path).close()
    assert json.loads((tmp_path / module.IDS_FILE).read_text()) == {"wandb": "wandb-id"}
    (tmp_path / module.IDS_FILE).write_text('{"wandb": "as before"}')
    _trackers(tmp_path, goes_on=True)
    _trackers(tmp_path)
    first, again, new = made.trackers
    assert (first.settings, first.finished) == ({"seed": 1}, True)
    assert (again.id, new.id) == ("as before", "wandb-id")


def test_one_that_fails_is_left_out_and_said_once(made, tmp_path, capsys):
    made.fails["wandb"] = 3
    both = _trackers(tmp_path, to=("wandb", "mlflow"))
    for step in range(1, 6):
        both.log(step, {"loss": float(step)})
    both.close()
    failing, other = made.trackers
    assert [step for step, _ in failing.points] == [1, 2]
    assert other.points == [(step, {"loss": float(step)}) for step in range(1, 6)]
    assert capsys.readouterr().err == "WARNING: wandb fails (no network) and has nothing after step 2\n"
    assert (failing.finished, other.finished) == (False, True)


def test_one_that_does_not_start_is_an_error_and_ends_the_others(made, tmp_path):
    made.fails["mlflow"] = 0
    with pytest.raises(ConfigError, match=r"names mlflow, which does not start: no network\. Log in, set its offline"):
        _trackers(tmp_path, to=("wandb", "mlflow"))
    assert made.trackers[0].finished
    assert not (tmp_path / module.IDS_FILE).exists()


def test_unknown_and_missing_ones_are_said(monkeypatch):
    with pytest.raises(ConfigError, match=r"tracking\.to = \['comet'\] must be different names among 'wandb'"):
        TrackingConfig(to=("comet",))
    monkeypatch.setattr("pst_ds.config.run.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow, which is not installed. Run pip install 'pst-ds\[trackers\]'"):
        TrackingConfig(to=("mlflow",)).require_installed()


def _train(tmp_path, to, *words):
    sets = {"output_dir": str(tmp_path / "run"), "deepspeed_config": "", "tracking.to": [to], "train.num_steps": 4}
    return main(["train", RUN_FILE, "--quiet", *words, *(f"--set={k}={json.dumps(v)}" for k, v in sets.items())])


def _losses(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def _records(content):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log of blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        left = (1 << 15) - place % (1 << 15)
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def test_wandb_offline_has_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra: trackers)")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert _train(tmp_path, "wandb") == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert json.loads((tmp_path / "run" / module.IDS_FILE).read_text())["wandb"] in file.name
    found = {}
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "loss" in row:
                found[row["_step"]] = row["loss"]
    assert found == pytest.approx(_losses(tmp_path))
    assert len(found) == 4


def test_mlflow_in_a_folder_has_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: trackers)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    assert _train(tmp_path, "mlflow") == 0
    client = mlflow.MlflowClient()
    run_id = json.loads((tmp_path / "run" / module.IDS_FILE).read_text())["mlflow"]
    history = {point.step: point.value for point in client.get_metric_history(run_id, "loss")}
    assert history == pytest.approx(_losses(tmp_path))
    assert client.get_run(run_id).data.params["train.num_steps"] == "4"


def test_trackio_has_the_numbers_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at the import
    pytest.importorskip("trackio", reason="trackio is not installed (extra: trackers)")
    assert _train(tmp_path, "trackio") == 0
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
    found = {step: json.loads(values)["loss"] for step, values in rows if "loss" in json.loads(values)}
    assert found == pytest.approx(_losses(tmp_path))
