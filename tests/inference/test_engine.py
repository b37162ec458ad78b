"""One rule chooses between the native decoder and transformers for ``load``, ``generate``, ``serve`` and ``bench``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import pst_ds
from pst_ds.cli import engine as options
from pst_ds.cli.main import build_parser, main
from pst_ds.errors import InputError
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.inference.bench import NativeLoop
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.engine import open_decoder

DATA = Path(__file__).resolve().parents[1] / "data"
EXPORTS = {
    "dense": [],
    "bitmask": ["--format", "bitmask"],
    "int8": ["--format", "bitmask", "--values", "int8"],
    "dense int4": ["--format", "dense", "--values", "int4", "--group", "row"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("engines")
    shutil.copytree(DATA / "tiny-llama", top / "dense")
    tensors = load_file(top / "dense" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[:, ::2] = 0.0
    save_file(tensors, top / "dense" / "model.safetensors", {"format": "pt"})
    for name, words in EXPORTS.items():
        if words:
            assert main(["export", str(top / "dense"), *words, "--out", str(top / name), "--quiet"]) == 0
    return top


def _chosen(path):
    """Whether each caller uses the native decoder."""
    folder = open_model_folder(path)
    loaded = pst_ds.load(path)
    by_verb = {}
    for verb in (["generate", "--prompt", "x"], ["serve"]):
        args = build_parser(verb[0]).parse_args([verb[0], str(path), *verb[1:]])
        by_verb[verb[0]] = options.native_decoder(args, folder, "cpu", 32)
    found = {"load": isinstance(loaded._model, Decoder), "bench": NativeLoop.of(folder, 32, 1) is not None}
    return found | {verb: decoder is not None for verb, decoder in by_verb.items()}


@pytest.mark.parametrize("name", EXPORTS)
def test_quantised_values_are_for_the_native_decoder_everywhere(folders, name):
    expected = name in ("int8", "dense int4")
    assert _chosen(folders / name) == dict.fromkeys(("load", "bench", "generate", "serve"), expected)


def test_what_the_decoder_does_not_support_is_for_transformers_everywhere(folders, monkeypatch, capsys):
    def unsupported(*_, **__):
        raise DecoderError("no such part")

    monkeypatch.setattr(Decoder, "from_pretrained", unsupported)
    assert not any(_chosen(folders / "int8").values())
    assert capsys.readouterr().err.count("no such part") == 4
    with pytest.raises(InputError, match="no such part"):
        pst_ds.load(folders / "int8", engine="native")


def test_an_engine_that_is_asked_for_is_used(folders):
    folder = open_model_folder(folders / "dense")
    assert open_decoder(folder, "native", context=32) is not None
    assert open_decoder(open_model_folder(folders / "int8"), "torch", context=32) is None
    assert open_decoder(open_model_folder(folders / "int8"), "auto", context=32, device="cuda") is None
    with pytest.raises(InputError, match=r"engine = 'fast': not an engine\. Choose one of auto, native, torch"):
        open_decoder(folder, "fast", context=32)
