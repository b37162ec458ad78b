"""Training users one after another: the same bits in any order, what changes and what does not, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from pst_ds.checkpoint.user_store import UserStore
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.config.update_forms import only_low_rank
from pst_ds.core.schedule import default_learning_rates
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.train.users.train import (
    SHARE_BESIDE_A_HEAD,
    SHARE_OF_TOKENS,
    UserTraining,
    run_of_users,
    with_rates_of_users,
)

SETTINGS = {
    "deepspeed_config": "", "train.num_steps": 6, "schedule.update_interval": 1, "train.precision": "fp32",
    "model.dropout": 0.1,
}  # fmt: skip


def _settings(settings):
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def _rows(path, users=("ann", "bob", "cid"), each=9):
    lines = Path("tests/data/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"who": users[i % len(users)]} for i, line in enumerate(lines[: each * len(users)])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _train(run, store, data, *more):
    words = [
        "users",
        "train",
        str(run),
        "--store",
        str(store),
        "--by",
        "who",
        "--data",
        data,
        "--epochs",
        "2",
        "--quiet",
    ]
    return main([*words, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny classifier, and users' rows."""
    top = tmp_path_factory.mktemp("users")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[3])
        settings = SETTINGS | {"output_dir": str(top / "run")}
        assert main(["train", "tests/data/world_size.toml", "--quiet", *_settings(settings)]) == 0
        _rows(top / "rows.jsonl")
    return top


@pytest.fixture(scope="module")
def store(run):
    assert _train(run / "run", run / "store", str(run / "rows.jsonl")) == 0
    return UserStore(run / "store")


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["masked", "beside"])
def test_a_users_bits_do_not_depend_on_who_came_before(run, tmp_path, form):
    data = str(run / "rows.jsonl")
    assert _train(run / "run", tmp_path / "all", data, "--form", form) == 0
    assert _train(run / "run", tmp_path / "reversed", data, "--form", form, "--users", "cid", "bob") == 0
    assert _train(run / "run", tmp_path / "alone", data, "--form", form, "--users", "bob") == 0
    everyone, backwards, alone = (UserStore(tmp_path / name) for name in ("all", "reversed", "alone"))
    assert _same(everyone.state("bob"), alone.state("bob"))
    assert _same(everyone.state("bob"), backwards.state("bob"))
    assert _same(everyone.state("cid"), backwards.state("cid"))
    assert not _same(everyone.state("ann"), everyone.state("bob"))


def test_updates_beside_a_head_train_at_less_than_the_run_s_rate(run, store, tmp_path):
    rate = default_learning_rates(width=AutoConfig.from_pretrained("tests/data/tiny-bert").hidden_size, num_steps=4)
    for share in (SHARE_BESIDE_A_HEAD, 1.0):
        said = ("--learning-rate", str(share * rate.updates), "--users", "ann")
        assert _train(run / "run", tmp_path / str(share), str(run / "rows.jsonl"), *said) == 0
    gentle, whole = (UserStore(tmp_path / str(share)).state("ann") for share in (SHARE_BESIDE_A_HEAD, 1.0))
    assert _same(gentle, store.state("ann"))
    assert not _same(whole, store.state("ann"))


@pytest.mark.parametrize("run_s", [(), ("train.update_learning_rate=0.01",)])
def test_updates_have_a_share_of_the_run_s_rate_or_the_named_one(run_s):
    def rate(run_file, **how):
        training = UserTraining(**how)
        run = run_of_users(load_run(run_file, run_s), training)
        return with_rates_of_users(run, training, width=32, steps=40).train.update_learning_rate

    def whole(**task):
        return 0.01 if run_s else default_learning_rates(width=32, num_steps=40, **task).updates

    assert rate("tests/data/world_size.toml") == whole() * SHARE_BESIDE_A_HEAD
    assert rate("tests/data/causal_lm.toml") == whole(predicts_tokens=True) * SHARE_OF_TOKENS
    assert rate("tests/data/world_size.toml", update_learning_rate=0.02) == 0.02


def test_a_state_has_updates_and_head_and_no_mask(store):
    parts = {name.rpartition(".")[2] for name in store.common.shapes}
    assert parts == {"pst_U", "pst_V", "weight", "bias"}
    assert [name for name in store.common.shapes if not name.endswith(("pst_U", "pst_V"))] == [
        "classifier.weight", "classifier.bias",
    ]  # fmt: skip
    assert all(tensor.dtype == torch.bfloat16 for tensor in store.state("ann").values())
    entry = store.entry("ann")
    assert (entry.rows, entry.steps) == (9, 4)  # two batches of four, twice
    assert entry.loss > 0


def test_users_that_are_there_stay_unless_asked_again(run, store, tmp_path, capsys):
    data = _rows(tmp_path / "rows.jsonl", ("ann", "dora"), each=5)
    before = store.state("ann")
    assert _train(run / "run", run / "store", data) == 0
    assert "1 users are in" in capsys.readouterr().out
    now = UserStore(run / "store")
    assert now.names == ["ann", "bob", "cid", "dora"]
    assert _same(now.state("ann"), before)
    assert _train(run / "run", run / "store", data, "--again", "--users", "ann") == 0
    assert not _same(UserStore(run / "store").state("ann"), before)
    assert main(["users", "remove", str(run / "store"), "--user", "dora"]) == 0
    assert _train(run / "run", run / "store", str(run / "rows.jsonl"), "--again", "--users", "ann") == 0
    assert _same(UserStore(run / "store").state("ann"), before)


def test_own_state_is_scored_against_shared_and_anothers(run, store, capsys):
    words = ["users", "eval", str(run / "run"), "--store", str(run / "store"), "--by", "who", "--quiet", "--json"]
    assert main([*words, "--split", "train", "--data", str(run / "rows.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    facts = json.loads(said[-1])
    assert facts["metric"] == "accuracy"
    assert [score["user"] for score in facts["scores"]] == ["ann", "bob", "cid"]
    assert facts["rows"] == 27
    gains = [score["own"] - score["shared"] for score in facts["scores"]]
    assert facts["gain_over_shared"] == pytest.approx(sum(gains) / 3)
    assert facts["gain_over_shared_standard_error"] == pytest.approx(float(torch.tensor(gains).std()) / 3**0.5)


def test_own_state_is_scored_against_the_mean_of_others(run, store, capsys):
    words = ["users", "eval", str(run / "run"), "--store", str(run / "store"), "--by", "who", "--quiet", "--json"]
    words += ["--split", "train", "--data", str(run / "rows.jsonl")]
    found = {}
    for others in ("1", "9"):
        assert main([*words, "--others", others]) == 0
        found[others] = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    for one, more in zip(found["1"], found["9"], strict=True):
        assert len(more["others"]) == 2
        assert more["others"][0] == one["others"][0] == one["other"]
        assert more["other"] == pytest.approx(sum(more["others"]) / 2)


def test_the_shared_score_is_that_of_the_run(run, store, tmp_path, capsys):
    """The state None is the checkpoint's own values, whoever was active before."""
    data = _rows(tmp_path / "rows.jsonl", ("bob",), each=20)
    words = ["--quiet", "--json", "--split", "train"]
    of_users = ["--store", str(run / "store"), "--by", "who", "--data", data]
    assert main(["users", "eval", str(run / "run"), *of_users, *words]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])["shared"]
    assert main(["eval", str(run / "run"), "--set", f"data.train={json.dumps(data)}", *words]) == 0
    assert ours == json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--by", "nobody"], "has no column 'nobody'"),
        (["--users", "zoe"], "--users zoe: no row of"),
        (["--users", "../ann"], "is a path"),
        (["--min-rows", "99"], "has as many rows, the most are 9"),
        (["--layers", "nothing"], "--layers nothing names none"),
        (["--epochs", "0"], "--epochs 0.0"),
        (["--dtype", "fp32"], "dtype = 'bf16'"),
        (["--layers", "query"], "pst_U of shape"),
        (["--data", "none.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_is_lost(run, store, capsys, more, message):
    assert _train(run / "run", run / "store", str(run / "rows.jsonl"), *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert UserStore(run / "store").names == ["ann", "bob", "cid"]


def test_a_store_of_another_run_is_refused(run, store, tmp_path, capsys):
    settings = SETTINGS | {"output_dir": str(tmp_path / "run"), "seed": 9, "train.num_steps": 4}
    assert main(["train", "tests/data/world_size.toml", "--quiet", *_settings(settings)]) == 0
    assert _train(tmp_path / "run", run / "store", str(run / "rows.jsonl")) == 2
    assert "do not match the masks" in capsys.readouterr().err


def test_a_run_of_another_update_form_has_no_update_that_a_user_can_own(run, tmp_path, capsys):
    """Solves refuse such a form with the same words, in tests/train/test_solved.py."""
    settings = SETTINGS | {"output_dir": str(tmp_path / "run"), "pst.update_form": "spp", "train.num_steps": 4}
    assert main(["train", "tests/data/world_size.toml", "--quiet", *_settings(settings)]) == 0
    assert _train(tmp_path / "run", tmp_path / "store", str(run / "rows.jsonl")) == 2
    refusal = only_low_rank("--form masked", "spp")
    assert f"{refusal}, or use --form beside" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    beside = ("--form", "beside", "--users", "bob")
    assert _train(tmp_path / "run", tmp_path / "store", str(run / "rows.jsonl"), *beside) == 0


def test_a_row_without_a_user_is_refused(run, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "good", "who": "ann"}\n{"text": "b", "label": "bad", "who": null}\n')
    assert _train(run / "run", tmp_path / "store", str(path)) == 2
    assert "column 'who' has None in line 2, which is not a user" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.thorough
@pytest.mark.zero3
def test_two_ranks_train_what_one_process_trains(run, store, run_ranks, tmp_path):
    data = str(run / "rows.jsonl")
    words = ["users", "train", str(run / "run"), "--store", str(tmp_path / "one"), "--by", "who", "--data", data]
    quiet = ["--set", "model.dropout=0.0", "--epochs", "2", "--quiet", "--dtype", "fp32"]
    assert main([*words, *quiet]) == 0
    words[4] = str(tmp_path / "two")
    ranks = [*words, *quiet, "--set", 'deepspeed_config="ds_configs/zero3_cpu.json"']
    assert run_ranks(main, 2, ranks) == [0, 0]
    words[4] = str(tmp_path / "later")
    ranks = [*words, *quiet, "--set", 'deepspeed_config="ds_configs/zero3_cpu.json"', "--users", "cid"]
    assert run_ranks(main, 2, ranks) == [0, 0]
    one, two, later = (UserStore(tmp_path / name) for name in ("one", "two", "later"))
    for name in ("ann", "bob", "cid"):
        for key, value in one.state(name).items():
            torch.testing.assert_close(two.state(name)[key], value, rtol=1e-3, atol=1e-5)
    assert _same(two.state("cid"), later.state("cid"))


def _main_on_a_full_disk(words, store):
    """Run the verb where the second state cannot be written."""
    calls, fsync = iter(range(1000)), os.fsync
    writes_of_one = 4  # its state, the index, and their folders

    def failing(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_relative_to(store) and next(calls) > 2 + writes_of_one:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        return main(words)


@pytest.mark.zero3
def test_a_full_disk_is_one_message_from_all_ranks_and_what_was_trained_stays(run, run_ranks, tmp_path, capfd):
    folder = tmp_path / "store"
    words = ["users", "train", str(run / "run"), "--store", str(folder), "--by", "who", "--epochs", "1", "--quiet"]
    words += ["--data", str(run / "rows.jsonl"), "--set", 'deepspeed_config="ds_configs/zero3_cpu.json"']
    assert run_ranks(_main_on_a_full_disk, 2, words, folder) == [2, 2]
    said = capfd.readouterr().err
    assert said.count(f"pst-ds users: {folder} cannot be written: [Errno 28] No space left") == 1
    assert "Traceback" not in said
    store = UserStore(folder)
    assert len(store.names) == len(list((folder / "states").iterdir())) == 1
    assert store.state(store.names[0])


@pytest.mark.few(1)
@pytest.mark.parametrize("packing", ["dense", "bitmask"])
def test_an_export_has_the_users_values_and_the_zeros_of_the_base(run, store, tmp_path, packing):
    of_run = ["export", str(run / "run"), "--out", str(tmp_path / "base"), "--quiet"]
    assert main(of_run) == 0
    own = ["users", "export", str(run / "run"), "--store", str(run / "store"), "--user", "bob"]
    assert main([*own, "--format", packing, "--out", str(tmp_path / "bob")]) == 0
    base, bob = (open_model_folder(tmp_path / name).load("dense").state_dict() for name in ("base", "bob"))
    pruned = [name for name in base if name.endswith("query.weight") or name.endswith("output.dense.weight")]
    assert pruned
    for name in pruned:
        assert torch.equal(base[name] == 0, bob[name] == 0), name
        assert not torch.equal(base[name], bob[name])
    assert torch.equal(bob["classifier.bias"], store.state("bob")["classifier.bias"].float())


def test_an_update_beside_layers_is_not_exported(run, tmp_path, capsys):
    assert _train(run / "run", tmp_path / "store", str(run / "rows.jsonl"), "--form", "beside", "--users", "bob") == 0
    own = ["users", "export", str(run / "run"), "--store", str(tmp_path / "store"), "--user", "bob"]
    assert main([*own, "--out", str(tmp_path / "out")]) == 2
    assert "--form masked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
