"""``pst-ds inspect``: what it says of each kind of path, against the tensors in the files; and damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pst_ds.cli.inspect.layers import layer_table
from pst_ds.cli.main import main
from pst_ds.hf.model_folder import open_model_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def inspect(capsys):
    """``inspect(path, ...)``: (the JSON, the text before it)."""

    def run(path, *options):
        capsys.readouterr()
        assert main(["inspect", str(path), "--json", *options]) == 0
        text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
        return json.loads(last), text

    return run


def _zeros(file):
    """Zeros of every tensor of a safetensors file, by name."""
    return {name: int((tensor == 0).sum()) for name, tensor in load_file(file).items()}


def _modules(zeros):
    return {name.removesuffix(".weight"): count for name, count in zeros.items()}


def _by_name(found):
    return {layer["name"]: layer for layer in found["layers"]}


def test_a_run_folder(folders, inspect):
    found, text = inspect(folders / "run")
    result = json.loads((folders / "run" / "result.json").read_text())
    assert found["kind"] == f"{folders / 'run'}: a run folder"
    assert (found["method"], found["task"], found["finished"], found["steps"]) == ("pst", "causal-lm", True, 6)
    assert found["sparsity_requested"] == 0.6
    assert found["sparsity_measured"] == result["sparsity_in_masks"]
    assert found["trained_parameters"] == result["trained_parameters"]
    assert [c["step"] for c in found["checkpoints"]] == [6, 4]
    assert found["checkpoints"][0]["links"] == ["latest", "best", "final"]
    layers = _by_name(found)
    exported, in_file = (
        load_file(folders / "dense" / "model.safetensors"),
        _modules(_zeros(folders / "dense" / "model.safetensors")),
    )
    assert {n: layer["zeros"] for n, layer in layers.items()} == {n: in_file[n] for n in layers}
    assert {n: layer["shape"] for n, layer in layers.items()} == {n: [*exported[f"{n}.weight"].shape] for n in layers}
    assert "model.layers.*.mlp.down_proj" in text
    assert f"sparsity measured   {result['sparsity_in_masks']:.6g}" in text


def test_a_run_folder_that_was_moved_names_the_model_that_moved_with_it(inspect, copied):
    run = copied("run")
    text = (run / "run.toml").read_text()
    (former,) = (line for line in text.splitlines() if line.startswith("output_dir = "))
    started_from = former.replace("output_dir", "path").rstrip('"') + '/start"'
    assert 'path = "tests/data/tiny-llama"' in text
    (run / "run.toml").write_text(text.replace('path = "tests/data/tiny-llama"', started_from))
    assert inspect(run)[0]["base_model"] == str(run / "start")


def test_the_bytes_of_a_checkpoints_layers_are_those_of_its_files(folders, inspect):
    found, _ = inspect(folders / "run" / "checkpoints" / "best")
    assert found["kind"].endswith(": a checkpoint")
    assert (found["step"], found["masks_frozen"], found["method"]) == (6, True, "pst")
    held = 0
    for file in (folders / "run" / "checkpoints" / "best").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            held += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118  not iterable
    assert sum(layer["bytes"] for layer in found["layers"]) == held
    assert sum(layer["trained"] for layer in found["layers"]) == found["trained_parameters"]


@pytest.mark.parametrize("links", ["gone", "files"])
def test_a_run_whose_links_were_lost_has_the_layers_of_its_newest_checkpoint(inspect, copied, links):
    """As after a copy by way of a store that knows no links, which drops them or makes files of them."""
    run = copied("run")
    whole = inspect(run)[0]
    for name in ("best", "final", "latest"):
        target = (run / "checkpoints" / name).readlink()
        (run / "checkpoints" / name).unlink()
        if links == "files":
            (run / "checkpoints" / name).write_text(str(target))
    found, text = inspect(run)
    assert found["layers"] == whole["layers"]
    assert [c["links"] for c in found["checkpoints"]] == [[], []]
    assert f"layers are from {run}/checkpoints/step-00000006 (the newest)" in text


def test_a_damaged_checkpoint_of_a_run_is_told_and_the_next_is_shown(inspect, copied):
    run = copied("run")
    newest, older = (run / "checkpoints" / f"step-0000000{step}" for step in (6, 4))
    _flip(next(newest.glob("*.safetensors")))
    found, text = inspect(run)
    problem = f"{newest}/shard-00001-of-00001.safetensors is damaged: its SHA-256 is not the one in SHA256SUMS"
    assert f"layers are from {older} (step-00000004)" in text
    assert text.endswith(f"\n{problem}")
    assert [c.get("problem") for c in found["checkpoints"]] == [problem, None]
    assert {n: x["zeros"] for n, x in _by_name(found).items()} == {
        n: x["zeros"] for n, x in _by_name(inspect(older)[0]).items()
    }
    (older / "manifest.json").unlink()
    found, text = inspect(run)
    assert (found["layers"], found["finished"]) == ([], True)
    assert "none of its checkpoints is intact" in text
    assert problem in text
    assert "manifest.json is missing" in text
    shutil.rmtree(run / "checkpoints")
    assert "it has no checkpoint yet" in inspect(run)[1]


@pytest.mark.parametrize(("folder", "file"), [("dense", "model.safetensors"), ("bitmask", "pst_bitmask.safetensors")])
def test_an_export(folders, inspect, folder, file):
    found, text = inspect(folders / folder)
    manifest = json.loads((folders / folder / "pst_manifest.json").read_text())
    assert (found["format"], found["step"], found["method"]) == (folder if folder != "dense" else "dense", 6, "pst")
    assert found["base_fingerprint"] == manifest["base_fingerprint"]
    assert {n: layer["zeros"] for n, layer in _by_name(found).items()} == _zeros(
        folders / "dense" / "model.safetensors"
    )
    assert sum(layer["bytes"] for layer in found["layers"]) == manifest["weight_bytes"]
    assert found["weight_file_bytes"] == (folders / folder / file).stat().st_size
    pruned = [layer for layer in found["layers"] if layer["origin"] == "pruned"]
    zeros, weights = sum(x["zeros"] for x in pruned), sum(x["weights"] for x in pruned)
    assert found["sparsity_measured"] == zeros / weights
    assert "pst-ds verify" in text


def test_a_pruned_folder(folders, inspect):
    found, _ = inspect(folders / "pruned")
    assert (found["method"], found["sparsity_requested"], found["sparsity_measured"]) == ("magnitude", 0.5, 0.5)
    in_file = _modules(_zeros(folders / "pruned" / "model.safetensors"))
    layers = _by_name(found)
    assert layers
    assert {n: layer["zeros"] for n, layer in layers.items()} == {n: in_file[n] for n in layers}


@pytest.mark.parametrize("form", ["one file", "shards", "pytorch"])
def test_any_model_folder_is_counted(folders, inspect, tmp_path, form):
    tensors = load_file(folders / "pruned" / "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(folders / "pruned" / "config.json", folder)
    if form == "one file":
        save_file(tensors, folder / "model.safetensors")
    elif form == "pytorch":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, _ = inspect(folder)
    assert (found["family"], found["num_hidden_layers"]) == ("llama", 2)
    assert {n: layer["zeros"] for n, layer in _by_name(found).items()} == {
        n: int((t == 0).sum()) for n, t in tensors.items()
    }
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["sparsity_measured"] == 0.5
    assert sum(layer["bytes"] for layer in found["layers"]) == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "shards", "a whole file beside shards"])
def test_the_weight_files_are_those_that_are_read(inspect, tmp_path, form):
    shutil.copytree("tests/data/tiny-llama", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    read = [form]
    if form == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    if "shards" in form:
        shards = ["model-1.safetensors", "model-2.safetensors"]
        save_file({name: t for name, t in tensors.items() if "0" in name}, tmp_path / shards[0])
        save_file({name: t for name, t in tensors.items() if "0" not in name}, tmp_path / shards[1])
        index = {"weight_map": {name: shards["0" not in name] for name in tensors}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        read = shards
    if form == "shards":
        (tmp_path / "model.safetensors").unlink()
    if form == "a whole file beside shards":
        read = ["model.safetensors"]  # as transformers does
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(bytes(5000))
    nbytes = sum((tmp_path / name).stat().st_size for name in read)
    assert inspect(tmp_path)[0]["weight_file_bytes"] == nbytes
    assert open_model_folder(tmp_path).weight_file_bytes == nbytes


def test_what_lies_beside_an_export_is_not_its_weights(copied, inspect):
    for folder, file in (("bitmask", "pst_bitmask.safetensors"), ("pruned", "model.safetensors")):
        path = copied(folder)
        for name in ("training_args.bin", "adapter_model.safetensors"):
            (path / name).write_bytes(bytes(5000))
        nbytes = (path / file).stat().st_size
        assert inspect(path)[0]["weight_file_bytes"] == nbytes
        assert open_model_folder(path).weight_file_bytes == nbytes


def test_a_missing_shard_is_2(tmp_path, capsys):
    shutil.copytree("tests/data/tiny-llama", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-9.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "model-9.safetensors is missing" in capsys.readouterr().err


def test_a_run_file(inspect):
    found, text = inspect("tests/data/world_size.toml")
    assert (found["method"], found["sparsity_requested"], found["num_steps"]) == ("pst", 0.8, 20)
    assert found["layers"] == []
    assert "pst-ds plan tests/data/world_size.toml" in text


def test_a_line_is_for_all_blocks_or_for_each_layer(folders, inspect):
    grouped, every = inspect(folders / "dense")[1], inspect(folders / "dense", "--layers")[1]
    assert "model.layers.*.mlp.up_proj.weight" in grouped
    assert "model.layers.1.mlp.up_proj.weight" not in grouped
    assert "(vectors)" in grouped
    for name in load_file(folders / "dense" / "model.safetensors"):
        assert f"\n{name} " in every


def test_a_group_has_the_least_the_mean_and_the_greatest():
    layer = {"shape": [4, 25], "dtype": "F32", "pattern": "matrix", "weights": 100, "bytes": 400}
    zeros = (50, 60, 90)
    layers = [{**layer, "name": f"blocks.{i}.up", "zeros": z} for i, z in enumerate(zeros)]
    heading, row = layer_table(layers, every_layer=False)
    assert "dtype" in heading
    assert "bits" not in heading
    assert row.split("  ")[0] == "blocks.*.up"
    assert "0.5000 .. 0.9000, mean 0.6667" in row
    assert row.endswith("1,200")
    assert len(layer_table(layers, every_layer=True)) == 4


def test_the_line_of_vectors_has_every_dtype():
    vector = {"shape": [4], "pattern": "", "weights": 4, "zeros": 0, "bytes": 8}
    norm = {**vector, "name": "blocks.0.norm", "dtype": "BF16"}
    bias_of_router = {**vector, "name": "blocks.0.router.bias", "dtype": "F32"}
    _, row = layer_table([bias_of_router, norm], every_layer=False)
    assert "BF16, F32" in row


@pytest.mark.thorough
def test_no_model_is_built(folders):
    script = """
import sys
from pst_ds.cli.main import main
for folder in sys.argv[1:]:
    assert main(["inspect", folder]) == 0
print(sorted({"transformers", "deepspeed", "datasets"} & set(sys.modules)))
"""
    names = ("run", "dense", "bitmask", "pruned")
    command = [sys.executable, "-c", script, *(str(folders / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def _flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _text(path, text):
    path.write_text(text)


_LAYER_X = {"name": "x", "shape": [2, 2], "pattern": "matrix", "sparsity_requested": 0.5, "zeros": 2}
DAMAGED = {
    "a bit of a checkpoint": ("run/checkpoints/final", "shard-00001-of-00001.safetensors", _flip, "SHA-256"),
    "a result": ("run", "result.json", _cut, "damaged"),
    "an export cut short": ("dense", "model.safetensors", _cut, "damaged"),
    "a header": ("bitmask", "pst_bitmask.safetensors", lambda path: _flip(path, 20), "pst_bitmask.safetensors"),
    "a manifest": ("bitmask", "pst_manifest.json", lambda path: _flip(path, -80), "pst_manifest.json is damaged"),
    "a missing file": ("dense", "model.safetensors", Path.unlink, "model.safetensors is missing"),
    "a record": ("pruned", "pruning.json", _cut, "pruning.json is damaged"),
    "a record of something else": ("pruned", "pruning.json", lambda path: _text(path, "{}"), "pruning.json is damaged"),
    "layers of another model": (
        "pruned", "pruning.json", lambda path: _text(path, json.dumps({"layers": [_LAYER_X]})), "has no x.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_2_and_one_message(copied, capsys, case):
    where, file, damage, words = DAMAGED[case]
    top, _, rest = where.partition("/")
    folder = copied(top) / rest
    damage(folder.resolve() / file)
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("pst-ds inspect: ")
    assert words in line
    assert said.out == ""


def test_weights_that_pytorch_cannot_read_are_2(tmp_path, capsys):
    shutil.copy(ROOT / "tests/data/tiny-bert/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no zip")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "pytorch_model.bin is damaged" in capsys.readouterr().err


def test_what_is_none_of_these_is_2(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "no")]) == 2
    assert "does not exist (looked in" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "It is empty" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "any of run.toml, SHA256SUMS, documents.bin, manifest.json, pst_manifest.json" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "notes.txt")]) == 2
    assert "is not TOML" in capsys.readouterr().err


def test_a_gguf_file_is_not_read_as_a_run_file(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\xff")
    assert main(["inspect", str(path)]) == 2
    line = capsys.readouterr().err
    assert f"{path} is a GGUF file" in line
    assert f"pst-ds verify {path}" in line
    assert "TOML" not in line


def test_a_weight_file_is_not_read_as_a_run_file(capsys):
    assert main(["inspect", "tests/data/tiny-llama/model.safetensors"]) == 2
    line = capsys.readouterr().err
    assert "Name its folder: pst-ds inspect tests/data/tiny-llama" in line
    assert "TOML" not in line


def test_a_quantization_config_that_is_not_an_object_is_2(tmp_path, capsys):
    shutil.copytree("tests/data/tiny-llama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path / 'config.json'}: quantization_config = 'gptq' is not an object" in capsys.readouterr().err


def test_a_config_without_weights_says_what_the_config_says(tmp_path, inspect):
    shutil.copy(ROOT / "tests/data/tiny-bert/config.json", tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    found, text = inspect(tmp_path)
    assert found["kind"].endswith("without weights")
    assert found["hidden_size"] == 32
    assert found["layers"] == []
    assert "hidden size              32" in text
