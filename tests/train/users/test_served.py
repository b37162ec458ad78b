"""Users of one batch over one packed base, and what does not belong over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pst_ds.cli.main import main
from pst_ds.inference.decoder import Decoder
from pst_ds.inference.hf.model_folder import open_model_folder
from pst_ds.inference.serve.users import ServedUsers
from pst_ds.train.users.store import UserStore, UserStoreError

RUN = "tests/data/causal_lm.toml"


def _settings(settings):
    return [
        word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of a tiny Llama, its packed export, and three users beside its layers."""
    top = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[3])
        small = {"output_dir": str(top / "run"), "deepspeed_config": "", "train.num_steps": 4, "data.max_length": 16}
        assert main(["train", RUN, "--quiet", *_settings(small | {"schedule.update_interval": 1})]) == 0
        assert main(["export", str(top / "run"), "--format", "bitmask", "--out", str(top / "packed"), "--quiet"]) == 0
        assert main(["export", str(top / "run"), "--out", str(top / "dense"), "--quiet"]) == 0
        lines = [json.loads(line) for line in Path("tests/data/train.jsonl").read_text().splitlines()[:30]]
        rows = [line | {"who": f"u{i % 3}"} for i, line in enumerate(lines)]
        (top / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for form in ("beside", "masked"):
            words = ["users", "train", str(top / "run"), "--store", str(top / form), "--by", "who", "--form", form]
            more = ["--data", str(top / "rows.jsonl"), "--epochs", "4", "--learning-rate", "0.02", "--quiet"]
            assert main([*words, *more]) == 0
    return top


@pytest.fixture
def served(folders):
    model = open_model_folder(folders / "packed").load("sparse")
    return model, ServedUsers(model, folders / "packed", UserStore(folders / "beside"))


IDS = (torch.arange(40) * 7 % 20 + 3).view(4, 10)


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.thorough
def test_each_sample_of_a_mixed_batch_is_as_alone(served):
    model, users = served
    nobody = _logits(model, IDS)
    names = ["u2", None, "u0", "u2"]
    users.assign(names)
    mixed = _logits(model, IDS)
    for i, name in enumerate(names):
        users.assign([name])
        torch.testing.assert_close(mixed[i : i + 1], _logits(model, IDS[i : i + 1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], nobody[1], rtol=1e-4, atol=1e-5)
    assert (mixed[0] - nobody[0]).abs().max() > 1e-3
    users.assign([None])
    assert torch.equal(_logits(model, IDS), nobody)
    users.assign(["u1"] * 4)
    users.close()
    assert torch.equal(_logits(model, IDS), nobody)


def test_the_update_is_the_product_beside_the_dense_weight(folders, served):
    """Against weights that are merged by hand: W + beta U V, in the dense export."""
    model, users = served
    state, beta = users.store.state("u1"), users.store.common.beta
    dense = open_model_folder(folders / "dense").load()
    for name in {name.rpartition(".")[0] for name in state}:
        layer = dense.get_submodule(name)
        layer.weight.data += beta * state[f"{name}.personal_U"].float() @ state[f"{name}.personal_V"].float()
    users.assign(["u1"])
    torch.testing.assert_close(_logits(model, IDS[:1]), _logits(dense, IDS[:1]), rtol=1e-3, atol=1e-4)


def test_a_user_that_is_not_there_leaves_the_batch_as_it_was(served):
    model, users = served
    users.assign(["u1"])
    before = _logits(model, IDS[:1])
    with pytest.raises(UserStoreError, match="no user 'u9'"):
        users.assign(["u9"])
    assert torch.equal(_logits(model, IDS[:1]), before)


def test_states_of_another_form_base_or_mask_are_refused(folders, tmp_path):
    model = open_model_folder(folders / "packed").load("sparse")
    with pytest.raises(UserStoreError, match="--form beside"):
        ServedUsers(model, folders / "packed", UserStore(folders / "masked"))
    table = json.loads((folders / "beside" / "index.json").read_text())
    for key, value, message in (
        ("base_fingerprint", "0" * 64, "another base"),
        ("masks_sha256", dict.fromkeys(table["common"]["masks_sha256"], "0" * 64), "masks differ"),
        ("shapes", {n: [9 * s for s in shape] for n, shape in table["common"]["shapes"].items()}, "does not fit"),
    ):
        changed = {**table, "common": {**table["common"], key: value}}
        (tmp_path / "index.json").write_text(json.dumps(changed))
        with pytest.raises(UserStoreError, match=message):
            ServedUsers(model, folders / "packed", UserStore(tmp_path))
        with pytest.raises(UserStoreError, match=message):
            Decoder.from_pretrained(folders / "packed", users=UserStore(tmp_path))


def test_generate_writes_as_a_user(folders, capsys):
    words = ["generate", str(folders / "packed"), "--prompt", "the film", "--max-new-tokens", "6", "--json"]
    texts = {}
    for engine in ("torch", "native"):
        for user in ([], ["--store", str(folders / "beside"), "--user", "u0"]):
            assert main([*words, "--engine", engine, *user]) == 0
            texts[engine, bool(user)] = json.loads(capsys.readouterr().out.splitlines()[-1])["text"]
    assert texts["torch", True] == texts["native", True] != texts["torch", False] == texts["native", False]
    assert main([*words, "--store", str(folders / "beside"), "--user", "../u0"]) == 2
    assert "is a path" in capsys.readouterr().err
    assert main([*words, "--user", "u0"]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_a_loss_that_falls_for_its_user(folders, capsys):
    words = ["users", "eval", str(folders / "run"), "--store", str(folders / "beside"), "--by", "who", "--json"]
    assert main([*words, "--split", "train", "--data", str(folders / "rows.jsonl"), "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["metric"] == "loss"
    assert facts["share_better_than_shared"] == 1.0
