"""Users over one packed base, and what does not belong over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.user_store import UserStore, UserStoreError
from pst_ds.cli.main import main
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.inference.decoder import Decoder
from pst_ds.inference.decoder.users import require_fitting

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


def test_the_update_is_the_product_beside_the_dense_weight(folders):
    """Against weights that are merged by hand: W + beta U V, in the dense export."""
    store = UserStore(folders / "beside")
    state, beta = store.state("u1"), store.common.beta
    dense = open_model_folder(folders / "dense").load()
    for name in {name.rpartition(".")[0] for name in state}:
        layer = dense.get_submodule(name)
        layer.weight.data += beta * state[f"{name}.personal_U"].float() @ state[f"{name}.personal_V"].float()
    decoder, ids = Decoder.from_pretrained(folders / "packed", users=store, cache="fp32"), list(range(3, 13))
    base = decoder.forward(ids)
    decoder.assign(state)
    with torch.no_grad():
        wanted = dense(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(decoder.forward(ids), wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - base).abs().max() > 1e-2


def test_states_of_another_form_base_or_mask_are_refused(folders, tmp_path):
    model = open_model_folder(folders / "packed").load("sparse")
    with pytest.raises(UserStoreError, match="--form beside"):
        require_fitting(model, folders / "packed", UserStore(folders / "masked"))
    table = json.loads((folders / "beside" / "index.json").read_text())
    for key, value, message in (
        ("base_fingerprint", "0" * 64, "another base"),
        ("masks_sha256", dict.fromkeys(table["common"]["masks_sha256"], "0" * 64), "masks differ"),
    ):
        changed = {**table, "common": {**table["common"], key: value}}
        (tmp_path / "index.json").write_text(json.dumps(changed))
        with pytest.raises(UserStoreError, match=message):
            require_fitting(model, folders / "packed", UserStore(tmp_path))
        with pytest.raises(UserStoreError, match=message):
            Decoder.from_pretrained(folders / "packed", users=UserStore(tmp_path))


def test_generate_writes_as_a_user(folders, capsys):
    words = ["generate", str(folders / "packed"), "--prompt", "the film", "--max-new-tokens", "6", "--json"]
    texts, user = [], ["--store", str(folders / "beside"), "--user", "u0"]
    for more in (["--engine", "torch"], ["--engine", "native"], user):
        assert main([*words, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    assert texts[0] == texts[1] != texts[2]
    assert main([*words, *user, "--engine", "torch", "--dtype", "fp32"]) == 2
    assert "--store is for the native decoder on a CPU. Omit --dtype and --engine torch" in capsys.readouterr().err
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
