"""``check_export`` finds whatever is no longer as it was exported."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2Config
from transformers import GPT2ForSequenceClassification as GPT2Classifier

from pst_ds.checkpoint.format import CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import magnitude_scales, trainable
from pst_ds.cli.inspect.models import export_folder
from pst_ds.config.pst import PSTConfig
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst
from pst_ds.parallel.engine import build_engine
from pst_ds.writing.check import check_export
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest, sealed, tensor_sha256
from tests.checkpoint.small_engine import save_checkpoint
from tests.exporting import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
INDEX_FILE = "model.safetensors.index.json"
WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
SHARD_BYTES = 9000


def _exported(folder, model, **settings):
    """An export of ``model`` at half sparsity, without training it."""
    model.save_pretrained(folder / "base")
    inject_pst(model, PSTConfig())
    update_masks(model, 0.5)
    state = CheckpointState(
        step=3, sparsity=0.5, masks_frozen=True, precision="fp32", device_type="cpu", base_path=str(folder / "base"),
        base_fingerprint="f00d", labels=["bad", "good"], magnitude_scales=magnitude_scales(model),
        metrics={"accuracy": 0.5},
    )  # fmt: skip
    params = [{"params": [param for _, param in trainable(model)], "name": "all"}]
    save_checkpoint(folder / "checkpoint", build_engine(model, params, ds_config=None), state)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-bert")
    export_checkpoint(model, read_checkpoint(folder / "checkpoint"), tokenizer, folder / "export", **settings)
    return folder / "export"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export in one file, one in several, and one of GPT-2's transposed and fused layers."""
    torch.manual_seed(0)
    bert = BertConfig.from_pretrained(ROOT / "tests/data/tiny-bert")
    gpt2 = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "several", "gpt2")]
    return {
        "one": _exported(folders[0], BertForSequenceClassification(bert)),
        "several": _exported(folders[1], BertForSequenceClassification(bert), shard_bytes=SHARD_BYTES),
        "gpt2": _exported(folders[2], GPT2Classifier(gpt2)),
    }


@pytest.fixture
def export(made, tmp_path):
    return Path(shutil.copytree(made["one"], tmp_path / "export"))


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refusal(folder):
    with pytest.raises(ExportError) as caught:
        check_export(folder)
    return str(caught.value)


def _change(folder, name, change, **entry_changes):
    """Rewrite one tensor, and make the manifest agree about its hash and what else is given."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, metadata={"format": "pt"})
    table = json.loads((folder / MANIFEST_FILE).read_text())
    (entry,) = [entry for entry in table["tensors"] if entry["name"] == name]
    entry["parts"][0]["sha256"] = tensor_sha256(tensors[name])
    entry |= entry_changes
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed(table)))
    return entry


def _edit_manifest(folder, edit):
    table = json.loads((folder / MANIFEST_FILE).read_text())
    edit(table)
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed(table)))


@pytest.mark.parametrize(("name", "pruned"), [("one", 12), ("several", 12), ("gpt2", 4)])
def test_an_export_as_it_was_made_passes(made, name, pruned):
    counts = check_export(made[name])
    assert counts["pruned_tensors"] == pruned
    assert counts["sparsity_requested"] == 0.5
    assert counts["sparsity_measured"] == 0.5
    entries, about = read_manifest(made[name])
    assert counts["tensors"] == len(entries) == sum(len(load_file(p)) for p in made[name].glob("*.safetensors"))
    assert about["base_fingerprint"] == "f00d"
    assert about["step"] == 3
    for entry in entries:
        (part,) = entry.parts
        tensor = load_file(made[name] / part.file)[entry.name]
        assert entry.nonzero == int((tensor != 0).sum())
        assert part.sha256 == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert entry.origin == ("pruned" if entry.pattern != "dense" else entry.origin)


def test_a_fused_tensor_lists_every_matrix(made):
    entries = {entry.name: entry for entry in read_manifest(made["gpt2"])[0]}
    fused = entries["transformer.h.0.attn.c_attn.weight"]
    assert (fused.shape, fused.matrix_axis, fused.pruned_per_matrix) == ((8, 24), 1, (32, 32, 32))
    assert entries["transformer.h.0.mlp.c_fc.weight"].pruned_per_matrix == (8 * 32 // 2,)


def test_zeros_moved_from_one_matrix_of_a_fused_tensor_to_another_are_found(made, tmp_path):
    folder = Path(shutil.copytree(made["gpt2"], tmp_path / "export"))

    def move(weight):
        row, column = next(i for i in (weight == 0).nonzero().tolist() if i[1] < 8)
        weight[row, column] = 1.0
        row, column = next(i for i in (weight != 0).nonzero().tolist() if i[1] >= 16)
        weight[row, column] = 0.0
        return weight

    _change(folder, "transformer.h.0.attn.c_attn.weight", move)
    assert "c_attn.weight, matrix 0, has fewer zeros than the 32 of its mask" in _refusal(folder)


@pytest.mark.parametrize("name", [WEIGHT, "bert.embeddings.word_embeddings.weight", "classifier.bias"])
def test_a_flipped_bit_of_any_tensor_is_found(export, name):
    path = export / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + begin] ^= 1
    path.write_bytes(data)
    message = _refusal(export)
    assert message == f"{path}: {name} is not what was exported: its SHA-256 differs"


def test_a_cut_file_and_a_broken_header_are_found(export):
    path = export / "model.safetensors"
    data = path.read_bytes()
    for broken in (data[:-100], data[:4], b"", b"\xff" * 100):
        path.write_bytes(broken)
        assert f"{path} is damaged" in _refusal(export)


def test_a_missing_file_is_named(made, tmp_path, export):
    (export / "model.safetensors").unlink()
    assert _refusal(export) == f"{export / 'model.safetensors'} is missing"
    folder = Path(shutil.copytree(made["several"], tmp_path / "several"))
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    assert _refusal(folder) == f"{second} is missing"


def test_a_missing_or_wrong_index_is_found(made, tmp_path):
    folder = Path(shutil.copytree(made["several"], tmp_path / "several"))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][WEIGHT] = "model-00009-of-00009.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert f"{folder / INDEX_FILE} is not what was exported: its SHA-256 differs" in _refusal(folder)
    _edit_manifest(folder, lambda table: table["files"].update({INDEX_FILE: _sha256(folder / INDEX_FILE)}))
    assert f"{folder / INDEX_FILE} does not list the tensors and files of the manifest" in _refusal(folder)
    (folder / INDEX_FILE).write_text("{")
    _edit_manifest(folder, lambda table: table["files"].update({INDEX_FILE: _sha256(folder / INDEX_FILE)}))
    assert f"{folder / INDEX_FILE} is damaged" in _refusal(folder)
    (folder / INDEX_FILE).unlink()
    assert f"{folder / INDEX_FILE} is missing" in _refusal(folder)
    _edit_manifest(folder, lambda table: table["files"].pop(INDEX_FILE))
    assert f"{folder / INDEX_FILE} is missing" in _refusal(folder)


def test_a_file_that_transformers_would_read_instead_is_found(made, tmp_path):
    folder = Path(shutil.copytree(made["several"], tmp_path / "several"))
    shutil.copy(made["one"] / "model.safetensors", folder)
    assert "has files that the manifest does not list: model.safetensors" in _refusal(folder)


def test_a_minus_zero_is_found(export):
    def negate(weight):
        row, column = (weight == 0).nonzero()[0].tolist()
        weight[row, column] = -0.0
        return weight

    _change(export, WEIGHT, negate)
    assert f"{WEIGHT} has a -0.0 where pruned weights must be +0.0" in _refusal(export)


def test_a_weight_that_came_back_is_found_whatever_the_manifest_says(export):
    def revive(weight):
        row, column = (weight == 0).nonzero()[0].tolist()
        weight[row, column] = 1e-20
        return weight

    entry = _change(export, WEIGHT, revive)
    before = entry["nonzero"]
    assert f"{WEIGHT} has {before + 1} non-zeros, not {before}" in _refusal(export)
    _change(export, WEIGHT, lambda weight: weight, nonzero=before + 1)
    assert f"{WEIGHT}, matrix 0, has fewer zeros than the {60 * 32 // 2} of its mask" in _refusal(export)


def test_another_shape_or_dtype_is_found(export):
    _change(export, WEIGHT, lambda weight: weight.t().contiguous())
    assert f"{WEIGHT} is F32 [32, 60], the manifest says F32 [60, 32]" in _refusal(export)
    _change(export, WEIGHT, lambda weight: weight.t().contiguous().bfloat16())
    assert f"{WEIGHT} is BF16 [60, 32], the manifest says F32 [60, 32]" in _refusal(export)


def test_a_tensor_too_many_or_too_few_is_found(export):
    path = export / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "extra": torch.ones(2)}, path, metadata={"format": "pt"})
    assert _refusal(export) == f"{export} has tensors that the manifest does not list: extra"
    save_file({n: t for n, t in tensors.items() if n != WEIGHT}, path, metadata={"format": "pt"})
    assert WEIGHT in _refusal(export)


def test_a_folder_without_a_manifest_is_no_export(tmp_path):
    assert _refusal(tmp_path) == f"{tmp_path} is not an export: {MANIFEST_FILE} is missing"
    assert "is not an export" in _refusal(tmp_path / "nothere")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda table: table.pop("tensors"), "is damaged: tensors: Field required"),
        (lambda table: table.update(tensors=[]), "is damaged: tensors = [], but every export has tensors. Export the"),
        (lambda table: table.pop("sparsity_requested"), "is damaged: sparsity_requested: Field required"),
        (lambda table: table.pop("files"), "is damaged: files: Field required"),
        (lambda table: table["files"].update({"../config.json": "0" * 64}), "files must map plain names"),
        (lambda table: table["tensors"][0].pop("nonzero"), "is damaged: tensors.0.nonzero"),
        (lambda table: table["tensors"][0].update(colour="red"), "is damaged: tensors.0.colour"),
        (lambda table: table["tensors"].append(3), "is damaged: tensors."),
        (lambda table: table["tensors"].append(table["tensors"][0]), "two tensors have the same name"),
        (lambda table: table["tensors"][0].update(origin="pruned"), "has an impossible value of pruned_per_matrix"),
        (lambda table: table["tensors"][0].update(shape=[-1, 32]), "tensors.0.shape.0"),
        (lambda table: table["tensors"][0].update(shape=[1 << 60, 32]), "tensors.0.shape.0"),
        (lambda table: table["tensors"][0].update(nonzero=True), "is damaged: tensors.0.nonzero"),
        (lambda table: table["tensors"][0].update(packing="zip"), "tensors.0.packing"),
        (lambda table: table["tensors"][0]["parts"].pop(), "has an impossible value of parts"),
        (lambda table: table["tensors"][0]["parts"][0].update(name="other"), "has an impossible value of parts"),
        (lambda table: table["tensors"][0]["parts"][0].update(sha256="0"), "tensors.0.parts.0.sha256"),
        (lambda table: table["tensors"][0]["parts"][0].update(file="../model.safetensors"), "tensors.0.parts.0.file"),
        (lambda table: table["tensors"][0]["parts"][0].update(file="/etc/passwd"), "tensors.0.parts.0.file"),
        (lambda table: table.update(kind="zip"), "is damaged: kind = 'zip': Input should be"),
        (lambda table: table.update(format=99), "has format 99, and this version reads 2 and 3. Export the run again"),
        (lambda table: table.update(format=1), "has format 1, and this version reads 2 and 3. Export the run again"),
        (lambda table: table.pop("format"), "has format None"),
    ],
)
def test_a_damaged_manifest_is_named(export, edit, reason):
    _edit_manifest(export, edit)
    message = _refusal(export)
    assert message.startswith(str(export / MANIFEST_FILE))
    assert reason in message


def test_a_manifest_that_was_edited_by_hand_is_named(export):
    table = json.loads((export / MANIFEST_FILE).read_text())
    table["step"] += 1
    (export / MANIFEST_FILE).write_text(json.dumps(table))
    assert f"{export / MANIFEST_FILE} is damaged: its own SHA-256 differs" in _refusal(export)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", MANIFEST_FILE])
def test_a_link_in_place_of_a_file_is_refused(export, tmp_path, name):
    (export / name).rename(tmp_path / name)
    (export / name).symlink_to(tmp_path / name)
    assert _refusal(export) == f"{export / name} is a link; an export must have plain files only"


def test_a_config_that_changed_is_found_and_a_card_may_change(export):
    (export / "README.md").write_text("mine")
    check_export(export)
    (export / "config.json").write_text((export / "config.json").read_text().replace("gelu", "relu"))
    assert f"{export / 'config.json'} is not what was exported" in _refusal(export)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_named(export, content):
    (export / MANIFEST_FILE).write_bytes(content)
    assert f"{export / MANIFEST_FILE} is damaged" in _refusal(export)


_WRONG_TYPES = [5, -1, 1.5, "x", True, [], [1], {}, {"x": []}, None, float(2**70)]


def _replaced(table, path, value):
    """``table`` with ``value`` at ``path``."""
    changed = copy.deepcopy(table)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def _message_of(reads, folder):
    """Return the message with which ``reads`` refuses a folder; "" if it reads it. Other errors are the test's."""
    try:
        reads(folder)
    except ExportError as error:
        return str(error)
    return ""


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_manifest_key_of_any_other_type_is_refused_and_never_a_crash(made, data):
    """Resealed, as an attacker would: refused by its key in one message, or of a type that the key may have."""
    folder = made["one"]
    content = (folder / MANIFEST_FILE).read_text()
    table = json.loads(content)
    table["run"] = {"method": "pst", "data": {}}
    key = data.draw(st.sampled_from(sorted(set(table) - {"sha256"})))
    value = data.draw(st.sampled_from(_WRONG_TYPES))
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed(_replaced(table, [key], value))))
    accepted = {
        type(table[key]),
        *([type(None)] if key in _MAY_BE_NULL else []),
        *([int] if isinstance(table[key], float) else []),
    }
    try:
        for reads in (read_manifest, export_folder):
            message = _message_of(reads, folder)
            assert str(folder) in message or type(value) in accepted, (key, value)
    finally:
        (folder / MANIFEST_FILE).write_text(content)


_MAY_BE_NULL = {
    "architecture", "base_fingerprint", "base_model", "computed_in", "dense_bf16_bytes", "file_bytes", "metrics", "run",
    "sparsity_measured", "sparsity_requested", "step", "weight_bytes",
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("run", 5), ("sparsity_measured", "x"), ("sparsity_measured", 1.5)])
def test_a_wrong_value_of_a_fact_names_key_and_value(export, key, value):
    _edit_manifest(export, lambda table: table.update({key: value}))
    refusal = _refusal(export)
    assert f"is damaged: {key} = {value!r}: Input should be " in refusal
    assert "_Run" not in refusal
