"""The dense export of a trained model: what is in the files, and that plain transformers computes the same with it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.toml import load_run
from pst_ds.data.labelled import collate, load_examples
from pst_ds.formats import safetensors_file
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train import run as run_module
from pst_ds.train.run import masked_model, prepare, train_prepared
from pst_ds.train.run_folder import open_checkpoint
from pst_ds.writing import write
from pst_ds.writing.check import check_export
from pst_ds.writing.encoding import ExportError
from tests.exporting import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SPARSITY, SHARD_BYTES = 0.7, 9000
PLAIN = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pst_ds":
            raise ImportError("no pst_ds here")
sys.meta_path.insert(0, Blocked())
import numpy, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
for job in json.load(sys.stdin):
    dtype = getattr(torch, job["dtype"]) if job["dtype"] else "auto"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        job["folder"], dtype=dtype, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = AutoTokenizer.from_pretrained(job["folder"])(job["texts"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    weights = {n: p.detach().float().numpy() for n, p in model.named_parameters()}
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    numpy.savez(job["out"], logits=logits.float().numpy(), labels=labels, dtype=str(logits.dtype), **weights)
assert not any(name.partition(".")[0] == "pst_ds" for name in sys.modules)
"""


def _train(folder, *overrides, base=None):
    """Train the tiny model in memory; keep the module beside the checkpoint, to hold the export against."""
    overrides = [
        "deepspeed_config=", f"output_dir={json.dumps(str(folder))}", f"schedule.final_sparsity={SPARSITY}",
        "train.num_steps=6", "schedule.update_interval=1", *overrides,
    ]  # fmt: skip
    if base is not None:
        overrides.append(f"model.path={json.dumps(str(base))}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        built = []
        build = run_module.build
        patch.setattr(run_module, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
        prepared = prepare(load_run("tests/data/world_size.toml", overrides), LaunchEnvironment(0, 1, 0))
        train_prepared(prepared, quiet=True)
        examples = load_examples(prepared.run.data, "validation", prepared.tokenizer, prepared.labels)
        texts = [json.loads(line)["text"] for line in Path(prepared.run.data.validation).read_text().splitlines()]
        model = prepared.resolved.with_settings(prepared.run).shapes.model
        checkpoint = open_checkpoint(prepared.run, "best")
    module = built[0].module.eval()
    return SimpleNamespace(**locals())


def _export(trained, out, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return export_checkpoint(trained.model, trained.checkpoint, trained.prepared.tokenizer, out, **settings)


def _tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def trained_bf16(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("bf16"), "train.precision=bf16")


@pytest.fixture(scope="module")
def folders(trained, trained_bf16, tmp_path_factory):
    """Name -> (trained model, folder of an export of it, what was said of it)."""
    top = tmp_path_factory.mktemp("exports")
    wanted = {
        "plain": (trained, {}),
        "sharded": (trained, {"shard_bytes": SHARD_BYTES}),
        "cast": (trained, {"dtype": "bf16"}),
        "bf16 run": (trained_bf16, {}),
    }
    return {name: (of, top / name, _export(of, top / name, **more)) for name, (of, more) in wanted.items()}


@pytest.fixture(scope="module")
def reloaded(folders, trained, tmp_path_factory):
    """What a process without pst_ds makes of every export, by name."""
    out = tmp_path_factory.mktemp("reloaded")
    load_as = {"plain": None, "sharded": None, "cast": None, "bf16 run": "bfloat16"}
    jobs = [
        {"folder": str(folders[name][1]), "dtype": dtype, "texts": trained.texts, "out": str(out / f"{name}.npz")}
        for name, dtype in load_as.items()
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN],
        input=json.dumps(jobs), cwd=out, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: np.load(out / f"{name}.npz") for name in load_as}


def _logits(model, trained):
    batch = collate(trained.examples, range(len(trained.examples)), trained.prepared.tokenizer)
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits.float().numpy()


def _assert_alike(logits, expected, rounding):
    """Up to rounding: weights of a file lie at any address, and the order of a sum may hang on it."""
    np.testing.assert_allclose(logits, expected, rtol=rounding, atol=rounding)
    clear = np.ptp(expected, axis=-1) > 4 * rounding
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()
    assert clear.mean() > 0.5
    assert len(np.unique(logits[:, 0])) > 10  # not one answer for everything


ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("name", ["plain", "sharded", "bf16 run"])
def test_plain_transformers_computes_what_the_masked_model_does(folders, reloaded, name):
    of, _, _ = folders[name]
    rounding = ROUNDING[torch.bfloat16 if name == "bf16 run" else torch.float32]
    _assert_alike(reloaded[name]["logits"], _logits(of.module, of), rounding)
    assert reloaded[name]["labels"].tolist() == ["bad", "good"]


@pytest.mark.parametrize("name", ["plain", "sharded", "bf16 run"])
def test_reloaded_weights_are_those_the_masked_model_multiplied_with(folders, reloaded, name):
    of, _, _ = folders[name]
    layers = pst_layers(of.module)
    assert len(layers) == 12
    for layer_name, layer in layers.items():
        expected = layer.masked_weight()
        assert expected.dtype == (torch.bfloat16 if name == "bf16 run" else torch.float32)
        found = torch.from_numpy(reloaded[name][f"{layer_name}.weight"])
        assert torch.equal(found.view(torch.int32), expected.float().view(torch.int32)), layer_name
        assert not torch.equal(expected, layer.weight.detach() * (expected != 0)), "the update should show"


@pytest.mark.parametrize("name", ["plain", "sharded", "cast", "bf16 run"])
def test_every_pruned_matrix_has_exactly_its_zeros_and_no_minus_zero(folders, name):
    of, folder, said = folders[name]
    tensors = _tensors(folder)
    layers = pst_layers(of.module)
    for layer_name in layers:
        weight = tensors[f"{layer_name}.weight"]
        assert int((weight == 0).sum()) == math.floor(SPARSITY * weight.numel()), layer_name
        assert not bool(weight[weight == 0].signbit().any())
    total = sum(layer.layout.numel for layer in layers.values())
    zeros = sum(math.floor(SPARSITY * layer.layout.numel) for layer in layers.values())
    assert said["sparsity_measured"] == zeros / total
    assert said["sparsity_requested"] == SPARSITY
    assert said["pruned_tensors"] == 12
    assert said["tensors"] == len(tensors)
    checked = check_export(folder)
    assert checked.pop("refilled") == []
    assert checked.pop("without_sha256") == []
    assert checked == {k: said[k] for k in checked}


@pytest.mark.parametrize("name", ["plain", "sharded", "bf16 run"])
def test_nothing_else_is_touched(folders, name):
    of, folder, _ = folders[name]
    base = {f"bert.{n}": t for n, t in load_file(ROOT / "tests/data/tiny-bert/model.safetensors").items()}
    tensors = _tensors(folder)
    pruned = {f"{layer_name}.weight" for layer_name in pst_layers(of.module)}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(tensors) == set(base) | head
    for tensor_name in set(base) - pruned - head:
        assert tensors[tensor_name].dtype == base[tensor_name].dtype
        assert torch.equal(tensors[tensor_name].view(torch.int32), base[tensor_name].view(torch.int32)), tensor_name
    values = dict(of.module.named_parameters())
    for tensor_name in head:
        assert torch.equal(tensors[tensor_name].float(), values[tensor_name].detach().float())
    assert {t.dtype for n, t in tensors.items() if n not in head} == {torch.float32}


def test_shards_hold_at_most_what_was_asked_and_are_numbered(folders):
    _, folder, _ = folders["sharded"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["weight_map"] == {n: file for file in files for n in load_file(folder / file)}
    for file in files:
        sizes = [t.nbytes for t in load_file(folder / file).values()]
        assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
    plain, sharded = _tensors(folders["plain"][1]), _tensors(folder)
    assert all(torch.equal(plain[n], t) for n, t in sharded.items())


def test_a_dtype_casts_every_tensor_and_the_config_says_so(folders, reloaded):
    plain, cast = _tensors(folders["plain"][1]), _tensors(folders["cast"][1])
    assert plain.keys() == cast.keys()
    assert all(torch.equal(cast[n], plain[n].bfloat16()) for n in plain)
    assert json.loads((folders["cast"][1] / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((folders["plain"][1] / "config.json").read_text())["dtype"] == "float32"
    assert str(reloaded["cast"]["dtype"]) == "torch.bfloat16"


def test_an_export_replaces_an_older_one_whole(trained, tmp_path):
    _export(trained, tmp_path / "out", shard_bytes=SHARD_BYTES)
    before = _tensors(tmp_path / "out")
    (tmp_path / "out" / "left_over.txt").write_text("x")
    _export(trained, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out" / "left_over.txt").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert all(torch.equal(before[n], t) for n, t in _tensors(tmp_path / "out").items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_written_to_and_parents_are_made(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        _export(trained, out)
        assert check_export(out)["pruned_tensors"] == 12


def test_what_is_no_export_is_not_overwritten(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ExportError) as caught:
            _export(trained, tmp_path / name)
        refused = f"out = {str(tmp_path / name)!r} exists and is not an export. Name another folder"
        assert str(caught.value) == refused
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]


@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_export_leaves_nothing_and_takes_nothing(trained, tmp_path, monkeypatch, older):
    if older:
        _export(trained, tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    calls = []

    def write_until_the_disk_is_full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError("No space left on device")
        safetensors_file.write_at(*arguments)

    monkeypatch.setattr(write, "write_at", write_until_the_disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        _export(trained, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert len(calls) == 3
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if older else [])


def test_a_kept_minus_zero_becomes_plus_zero(tmp_path):
    """A base that is sparse already, pruned less than it is: zeros that the mask keeps are zeros too."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (ROOT / "tests/data/tiny-bert").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    weight = tensors["encoder.layer.0.intermediate.dense.weight"]
    weight[: weight.shape[0] // 2] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    overrides = ["schedule.final_sparsity=0.1", "pst.update_rank=0", "pst.score_rank=0", "train.num_steps=2"]
    trained = _train(tmp_path / "run", *overrides, base=base)
    _export(trained, tmp_path / "out")
    found = _tensors(tmp_path / "out")["bert.encoder.layer.0.intermediate.dense.weight"]
    assert int((found == 0).sum()) >= weight.numel() // 2 > math.floor(0.1 * weight.numel())
    assert not bool(found[found == 0].signbit().any())
    check_export(tmp_path / "out")


def test_a_model_of_other_shapes_is_refused_by_the_tensor_s_name(tmp_path):
    other = _train(tmp_path / "run", "train.num_steps=2")

    def with_trained(trained):
        contents = dataclasses.replace(other.checkpoint.contents, trained=trained, steps=dict.fromkeys(trained, 2))
        other.checkpoint = Checkpoint(other.checkpoint.folder, other.checkpoint.state, contents)

    shapes = {**other.checkpoint.contents.trained, "classifier.bias": (3,)}
    with_trained(shapes)
    with pytest.raises(ExportError, match=r"classifier\.bias has shape \(3,\) .* \(2,\) in the trained model"):
        _export(other, tmp_path / "out")
    with_trained({name: shape for name, shape in shapes.items() if name != "classifier.bias"})
    with pytest.raises(ExportError, match=r"classifier\.bias is neither trained nor in the base model 'tests/data"):
        _export(other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


EMBEDDINGS = ["bert.embeddings.word_embeddings", "bert.embeddings.token_type_embeddings"]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def updated(request, tmp_path_factory):
    """A run that updated two embeddings, and its export."""
    top = tmp_path_factory.mktemp("updated")
    trained = _train(
        top / "run", f"train.precision={request.param}", "train.update_learning_rate=0.02", "pst.beta=1.3",
        'pst.update_embeddings=["word_embeddings", "token_type_embeddings"]',
    )  # fmt: skip
    trained.said = _export(trained, top / "out")
    trained.dtype = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[request.param])
    trained.out = top / "out"
    return trained


def test_an_updated_embedding_is_exported_as_it_was_looked_up(updated):
    tensors = _tensors(updated.out)
    base = load_file(ROOT / "tests/data/tiny-bert/model.safetensors")
    embeddings = pst_embeddings(updated.module)
    assert list(embeddings) == EMBEDDINGS
    for name, embedding in embeddings.items():
        expected, found = embedding.updated_weight(), tensors[f"{name}.weight"]
        assert expected.dtype == updated.dtype
        assert found.dtype == torch.float32  # the base's
        assert torch.equal(found.view(torch.int32), expected.float().view(torch.int32))
        start = base[f"{name.removeprefix('bert.')}.weight"].to(updated.dtype).float()
        unnamed = ~embedding.pst_U.detach().any(1)  # rows that no example has
        assert unnamed.any()
        changed = (found != start).any(1)
        assert not changed[unnamed].any()
        assert changed.sum() >= 0.9 * (~unnamed).sum()  # an update may be lost in bf16's rounding
    padding = updated.prepared.tokenizer.pad_token_id
    assert not embeddings[EMBEDDINGS[0]].pst_U[padding].any()


def test_the_manifest_says_that_an_updated_embedding_was_trained(updated):
    manifest = json.loads((updated.out / "pst_manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    trained = {name for name, entry in entries.items() if entry["origin"] == "trained"}
    head = {f"{name}.{part}" for name in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")}
    assert trained == {*(f"{name}.weight" for name in EMBEDDINGS), *head}
    assert {entries[f"{name}.weight"]["pattern"] for name in EMBEDDINGS} == {"dense"}
    assert updated.said["pruned_tensors"] == 12
    assert not any("pst_" in name for name in entries)
    assert check_export(updated.out)["tensors"] == len(load_file(ROOT / "tests/data/tiny-bert/model.safetensors")) + 2


def test_an_export_with_updated_embeddings_computes_what_the_masked_model_does(updated):
    plain = AutoModelForSequenceClassification.from_pretrained(updated.out, dtype=updated.dtype).eval()
    _assert_alike(_logits(plain, updated), _logits(updated.module, updated), ROUNDING[updated.dtype])


def test_updated_embeddings_survive_the_checkpoint(updated):
    saved = updated.checkpoint.trained
    assert {n for n in saved if n.startswith("bert.embeddings")} == {f"{n}.pst_{f}" for n in EMBEDDINGS for f in "UV"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        restored = masked_model(updated.prepared, updated.checkpoint)
    tensors = _tensors(updated.out)
    for name, embedding in pst_embeddings(restored).items():
        assert embedding.pst_U.any()
        assert torch.equal(embedding.updated_weight().float(), tensors[f"{name}.weight"])
    np.testing.assert_array_equal(_logits(restored, updated), _logits(updated.module, updated))


def test_an_updated_embedding_that_the_base_lacks_is_refused_by_name(updated, tmp_path):
    tensors = load_file(ROOT / "tests/data/tiny-bert/model.safetensors")
    del tensors["embeddings.word_embeddings.weight"]
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    state = dataclasses.replace(updated.checkpoint.state, base_path=str(tmp_path / "base"))
    checkpoint = Checkpoint(updated.checkpoint.folder, state, updated.checkpoint.contents)
    with pytest.raises(ExportError, match=r"bert\.embeddings\.word_embeddings\.weight is not in the base model '"):
        export_checkpoint(updated.model, checkpoint, updated.prepared.tokenizer, tmp_path / "out")
