"""``pst-ds export`` refuses what settings, place and configs show, before it reads weights, data or writes anything."""

from __future__ import annotations

import pytest
import transformers

from pst_ds.cli.main import main
from tests.nn.expert_families import tiny_model
from tests.pairs import every_pair

LORA = ("--set", "method=lora", "--set", "schedule.final_sparsity=0.0")


@pytest.fixture
def no_work(monkeypatch):
    """Let every reader of checkpoints, weights and data, and every writer, fail the test."""

    def never(*args, **kwargs):
        raise AssertionError("work before the checks")

    for name in (
        "pst_ds.train.run_folder.open_checkpoint",
        "pst_ds.writing.to_folder.BaseWeights",
        "pst_ds.writing.from_folder.BaseWeights",
        "pst_ds.export.export_run.kept_experts",
        "pst_ds.export.export_run._tokens_of_splits",
        "pst_ds.export.export_run._tokens_of_file",
        "pst_ds.export.export_run._convert",
        "pst_ds.writing.to_folder.atomic_folder",
    ):
        monkeypatch.setattr(name, never)


@pytest.fixture(scope="module")
def sources(folders, tmp_path_factory):
    """The folders, and two models that some formats cannot represent."""
    top = tmp_path_factory.mktemp("sources")
    tiny_model("qwen3_moe").save_pretrained(top / "mixture")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-llama", num_labels=2)
    classifier.save_pretrained(top / "classifier")
    return {path.name: path for path in (*folders.iterdir(), *top.iterdir())}


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("run", ("--format", "gguf", "--shard-bytes", "9999"), "--shard-bytes 9999 is for folders of weight files"),
        ("run", ("--format", "onnx", "--shard-bytes", "9999"), "--shard-bytes 9999 is for folders of weight files"),
        ("run", ("--format", "bitmask", *LORA), "prunes none. Choose --format dense"),
        ("run", ("--format", "onnx", *LORA), "prunes none. Set --plain"),
        ("run", ("--format", "2:4", "--set", "schedule.final_sparsity=0.4"), "and sparsity 0.4, keeps more"),
        ("run", ("--vocabulary", "absent.txt"), "--vocabulary absent.txt cannot be read: no such file"),
        ("dense", ("--vocabulary", "absent.txt"), "--vocabulary absent.txt cannot be read: no such file"),
        ("regressor", ("--format", "gguf"), "model_type = bert: GGUF export supports llama"),
        ("classifier", ("--format", "gguf"), "LlamaForSequenceClassification does not predict tokens"),
        ("mixture", ("--format", "onnx", "--plain"), "has experts, and a graph cannot route tokens to them"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(sources, tmp_path, capsys, no_work, source, options, words):
    out = tmp_path / "out.gguf"
    assert main(["export", str(sources[source]), *options, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@every_pair
@pytest.mark.parametrize("options", [(), ("--vocabulary", "seen"), ("--format", "gguf"), ("--format", "onnx")])
@pytest.mark.parametrize("source", ["run", "dense"])
def test_a_place_with_other_files_is_refused_before_any_work(sources, tmp_path, capsys, no_work, source, options):
    (tmp_path / "notes.txt").write_text("mine")
    options = () if (source, options) == ("dense", ("--vocabulary", "seen")) else options
    assert main(["export", str(sources[source]), *options, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_users_model_is_refused_a_place_with_other_files_before_any_work(sources, tmp_path, capsys, no_work):
    (tmp_path / "notes.txt").write_text("mine")
    users = ["--store", str(tmp_path / "store"), "--user", "bob"]
    assert main(["users", "export", str(sources["run"]), *users, "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("format_name", ["dense", "onnx"])
def test_the_source_is_no_place_for_its_export(sources, capsys, no_work, format_name):
    source = sources["dense"]
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["export", str(source), "--format", format_name, "--out", f"{source}/."]) == 2
    assert "is the folder to read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
