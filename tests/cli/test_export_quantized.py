"""``--values`` and ``--embeddings`` of ``pst-ds export``, and what verify, inspect and bench make of such folders."""

from __future__ import annotations

import json
import shutil

import pytest

from pst_ds.cli.main import main


def said_by(capsys, *words):
    """The JSON of a command that succeeds, and what it printed."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """Exports of the run by name."""
    top = tmp_path_factory.mktemp("exported")
    how = {
        "int4": ["--format", "bitmask", "--values", "int4", "--group", "row", "--embeddings", "int8"],
        "int8": ["--format", "dense", "--values", "int8"],
    }
    for name, words in how.items():
        assert main(["export", str(folders / "run"), "--out", str(top / name), *words]) == 0
    return top


def test_export_says_what_it_rounded(folders, tmp_path, capsys):
    words = ["export", folders / "run", "--out", tmp_path / "out", "--format", "bitmask"]
    said, printed = said_by(capsys, *words, "--embeddings", "int4", "--group", "32")
    assert (said["embeddings"], said["embedding_group"], said["rounded_tensors"]) == ("int4", 32, 2)
    assert "values" not in said
    assert said["packed_bits_per_weight"] > said["bits_per_weight"] / 2 > 0
    assert "quantised 2 tensors (embeddings int4, one scale per 32 weights)" in printed


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_verify_holds_the_file_against_the_model_on_the_grid(exported, folders, capsys, name):
    said, printed = said_by(capsys, "verify", exported / name)
    assert said["rounded_tensors"] == (16 if name == "int4" else 14)
    assert f"values {name}, one scale per row" in printed
    said, printed = said_by(capsys, "verify", exported / name, "--against", folders / "run", "--checkpoint", "best")
    assert said["reloaded_equal"] is True
    assert said["differing_weights"] == said["kept_sparse"]["differing_weights"] == 0
    assert said["compared_weights"] >= said["rounded_tensors"]
    assert said["rounding"]["max_logit_difference"] > 0
    assert said["rounding"]["metrics_before"].keys() == said["metrics"].keys()
    assert "quantisation changed" in printed
    assert "against the masked model, quantised, on" in printed


def test_verify_refuses_codes_of_another_checkpoint(folders, tmp_path, capsys):
    words = ["--format", "bitmask", "--values", "int4", "--group", "row", "--checkpoint", "step-00000004"]
    assert main(["export", str(folders / "run"), "--out", str(tmp_path / "other"), *words]) == 0
    against = ["verify", str(tmp_path / "other"), "--against", str(folders / "run"), "--checkpoint"]
    assert main([*against, "step-00000004"]) == 0
    assert main([*against, "final"]) == 1
    assert "is not the model in" in capsys.readouterr().err


def test_inspect_shows_values_bits_and_errors(exported, capsys):
    said, printed = said_by(capsys, "inspect", exported / "int4")
    assert (said["values"], said["group"], said["embeddings"]) == ("int4", "row", "int8")
    assert 0 < said["packed_bits_per_weight"] < 8
    assert said["bits_per_weight"] > 0
    assert said["largest_rounding_error"] > 0
    layer = next(layer for layer in said["layers"] if layer["name"].endswith("q_proj.weight"))
    assert layer["values"] == "int4"
    assert 0 < layer["rounding_error"] < 0.2
    assert layer["bits_per_weight"] == pytest.approx(8 * layer["bytes"] / layer["weights"], 1e-3)
    assert "int4" in printed
    assert "rounding" in printed


def test_a_folder_is_rounded_as_its_run_is(exported, folders, tmp_path, capsys):
    words = ["--format", "bitmask", "--values", "int4", "--group", "row", "--embeddings", "int8"]
    assert main(["export", str(folders / "bitmask"), "--out", str(tmp_path / "out"), *words]) == 0
    files = [folder / "pst_bitmask.safetensors" for folder in (tmp_path / "out", exported / "int4")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert main(["verify", str(tmp_path / "out"), "--against", str(folders / "run")]) == 0
    capsys.readouterr()


def test_values_bf16_casts_every_tensor(folders, tmp_path, capsys):
    for name, words in (("cast", ["--dtype", "bf16"]), ("values", ["--values", "bf16"])):
        assert main(["export", str(folders / "run"), "--out", str(tmp_path / name), "--format", "bitmask", *words]) == 0
    files = [tmp_path / name / "pst_bitmask.safetensors" for name in ("cast", "values")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize("values", [[], ["--values", "int8", "--embeddings", "int8"]], ids=["cast", "rounded"])
def test_a_file_in_a_narrower_dtype_is_held_against_the_model_cast_alike(folders, tmp_path, capsys, values):
    words = ["--format", "bitmask", "--dtype", "bf16", *values]
    assert main(["export", str(folders / "run"), "--out", str(tmp_path / "bf16"), *words]) == 0
    said, printed = said_by(capsys, "verify", tmp_path / "bf16", "--against", folders / "run")
    assert (said["reloaded_equal"], said["differing_weights"]) == (True, 0)
    assert said["rounding"]["max_logit_difference"] > said["max_logit_difference"]
    assert f"the masked model, {'quantised' if values else 'cast'}, on " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--group", "32"],
            "--group 32 is for quantised values. Set --values int8 or int4, or --embeddings int8 or int4",
        ),
        (["--values", "bf16", "--group", "32"], "--group 32 is for quantised values. Set --values int8 or int4"),
        (["--values", "bf16", "--dtype", "fp32"], "--values bf16 and --dtype fp32 both cast every tensor"),
        (["--format", "csr", "--values", "int8"], "csr holds values of the model's dtype only. For int8 and int4"),
        (["--values", "int4"], "do not divide"),
    ],
)
def test_wrong_words_are_one_message_and_nothing_is_written(folders, tmp_path, capsys, words, message):
    assert main(["export", str(folders / "run"), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_compressed_tensors_is_checked_but_not_computed_with(folders, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = ["export", str(folders / "run"), "--out", out, "--format", "compressed-tensors", "--values", "int8"]
    assert main(words) == 0
    said, printed = said_by(capsys, "verify", out)
    assert said["kind"] == "compressed-tensors"
    assert "14 packed as compressed-tensors" in printed
    assert main(["verify", out, "--against", str(folders / "run")]) == 2
    assert "Compare a dense export" in capsys.readouterr().err


@pytest.mark.parametrize("grid", [("int8", "32"), ("int4", "64")])
def test_inputs_of_8_bits_take_whole_rows_of_int8(folders, tmp_path, capsys, grid):
    values, group = grid
    words = ["export", str(folders / "run"), "--format", "compressed-tensors", "--activation-bits", "8", "--out"]
    assert main([*words, str(tmp_path / "whole"), "--values", "int8"]) == 0
    said, _ = said_by(capsys, "verify", str(tmp_path / "whole"))
    assert said["kind"] == "compressed-tensors-w8a8"
    assert main([*words, str(tmp_path / "other"), "--values", values, "--group", group]) == 2
    assert "with int8 activations needs int8 weights with per-row scales" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_file_for_llama_cpp_needs_a_tokenizer_that_it_knows(folders, tmp_path, capsys):
    pytest.importorskip("gguf")
    words = ["export", str(folders / "run"), "--format", "gguf", "--values", "int8", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "Give it a name that ends in .gguf" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out.gguf")]) == 2
    said = capsys.readouterr().err
    assert (
        "weight has 60 inputs, not a multiple of GGUF's block size 32" in said
        or "do not divide 60" in said
        or "BPE" in said
    )
    assert list(tmp_path.iterdir()) == []


def test_unknown_values_are_named(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folders / "run"), "--out", str(tmp_path / "out"), "--values", "int3"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.replace("'", "")
    assert "invalid choice: int3 (choose from bf16, int8, int4)" in said


def test_generate_and_bench_run_it(exported, capsys):
    for name, load_as in (("int4", "sparse"), ("int4", "dense"), ("int8", "sparse"), ("int8", "auto")):
        words = ["generate", exported / name, "--prompt", "the cat", "--max-new-tokens", "4", "--load-as", load_as]
        said, _ = said_by(capsys, *words)
        assert (said["sparse_layers"] > 0) is (load_as == "sparse")
        assert said["format"] == ("bitmask" if name == "int4" else "codes")
    said, _ = said_by(capsys, "bench", exported / "int4", "--prompt-tokens", "4", "--new-tokens", "2")
    assert "bitmask" in json.dumps(said)


def test_a_damaged_folder_is_refused(exported, tmp_path, capsys):
    folder = shutil.copytree(exported / "int4", tmp_path / "copy")
    path = folder / "pst_bitmask.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(folder)]) == 2
    assert "is not what was exported: its SHA-256 differs" in capsys.readouterr().err
