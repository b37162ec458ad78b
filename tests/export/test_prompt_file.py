"""A prompt goes along with exports, in every folder that our verbs read; formats of others refuse it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.export.prompt_file import PROMPT_FILE, attach_saved_prompt, read_prompt
from pst_ds.inference.hf.model_folder import open_model_folder
from pst_ds.nn.prompt import prompt_of


def _set(*settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A run with an adapter on hidden states, and its export."""
    folder = tmp_path_factory.mktemp("encoder")
    more = ("prompt.text=a good film", "prompt.source=hidden", "prompt.adapter=low-rank", "prompt.rank=2")
    settings = ("deepspeed_config=", f"output_dir={folder / 'run'}", "train.num_steps=2", "eval.interval=0", *more)
    assert main(["train", "tests/data/world_size.toml", *_set(*settings)]) == 0
    assert main(["export", str(folder / "run"), "--out", str(folder / "out")]) == 0
    return folder


def test_an_export_computes_with_the_prompt_that_was_trained(encoder, capsys):
    assert main(["verify", str(encoder / "out"), "--against", str(encoder / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["differing_predictions"] == 0
    manifest = json.loads((encoder / "out" / "pst_manifest.json").read_text())
    assert manifest["prompt"] == {"text": "a good film", "tokens": 3, "after": 1}
    assert PROMPT_FILE in manifest["files"]
    without = encoder / "without"
    shutil.copytree(encoder / "out", without)
    table = json.loads((without / PROMPT_FILE).read_text())
    table["values"] = [[-value for value in row] for row in table["values"]]
    (without / PROMPT_FILE).write_text(json.dumps(table))
    assert main(["verify", str(without), "--json"]) == 2  # its SHA-256 is another
    model = open_model_folder(without).load()
    right = open_model_folder(encoder / "out").load()
    ids = torch.tensor([[2, 5, 6, 3]])
    assert not torch.allclose(model(ids).logits, right(ids).logits)


def test_a_packed_folder_made_of_it_has_it_too(encoder):
    packed = encoder / "packed"
    assert main(["export", str(encoder / "out"), "--format", "bitmask", "--out", str(packed)]) == 0
    ours, theirs = (read_prompt(folder) for folder in (packed, encoder / "out"))
    assert ours.text == theirs.text
    assert torch.equal(ours.values, theirs.values)
    models = [
        open_model_folder(folder).load("dense" if folder == packed else "auto") for folder in (packed, encoder / "out")
    ]
    ids = torch.tensor([[2, 5, 6, 3]])
    torch.testing.assert_close(*(model(ids).logits for model in models))


@pytest.mark.parametrize("packing", ["compressed-tensors", "gguf", "onnx"])
def test_formats_whose_readers_know_no_prompt_refuse_it(encoder, capsys, packing):
    out = encoder / ("out.gguf" if packing == "gguf" else packing)
    values = ["--values", "int8"] if packing == "compressed-tensors" else []
    assert main(["export", str(encoder / "out"), "--format", packing, *values, "--out", str(out)]) == 2
    assert "trained prompt" in capsys.readouterr().err
    assert not out.exists()


def test_a_decoder_writes_with_it(tmp_path, capsys):
    settings = (
        "task=causal-lm", "deepspeed_config=", f"output_dir={tmp_path / 'run'}", "train.num_steps=1", "eval.interval=0",
        "method=sk-tuning", "prompt.text=a good", "data.document_mask=false",
    )  # fmt: skip
    assert main(["train", "tests/data/causal_lm.toml", *_set(*settings)]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a film", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_tokens"] == 3
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a film", "--engine", "native"]) == 2
    assert "trained prompt" in capsys.readouterr().err


def test_a_damaged_prompt_or_one_of_another_model_is_refused(encoder, tmp_path):
    model = open_model_folder(encoder / "out").load()
    assert prompt_of(model).size == 3
    for text, message in (
        ("{", "is damaged"),
        ('{"text": "a", "after": 0, "values": [[1.0, NaN]]}', "is damaged"),
        ('{"text": "a", "after": 0, "values": [[1.0, 2.0]]}', "belongs to another model"),
    ):
        (tmp_path / PROMPT_FILE).write_text(text)
        with pytest.raises(InputError, match=message):
            attach_saved_prompt(model, tmp_path)
