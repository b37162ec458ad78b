"""``verify`` of an ONNX file against its run in bf16: right exports pass at every depth, and wrong ones do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from pst_ds.cli.main import main
from pst_ds.export.verify import verify
from pst_ds.writing.manifest import file_sums, read_manifest, write_manifest
from tests.inference.onnx.conftest import _compiler  # noqa: F401  # a fixture
from tests.pairs import every_pair

onnx = pytest.importorskip("onnx", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
pytestmark = pytest.mark.usefixtures("_compiler")

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES = {
    "bert": {},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 4},
    "esm": {"mask_token_id": 4, "position_embedding_type": "rotary"},
    "convbert": {"embedding_size": 32, "head_ratio": 1},
    "modernbert-decoder": {"local_attention": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1},
}
"""Settings besides SIZES, by model_type."""
EXCLUDED = {"convbert": ["key_conv_attn_layer", "conv_kernel_layer", "conv_out_layer"]}
"""Convolutions, which are not pruned."""


def _train(family: str, depth: int, top: Path) -> Path:
    """Train a tiny classifier in bf16 for two steps on a base model in fp32; return the run."""
    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-bert")
    settings = {**SIZES, **FAMILIES[family], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = hf.AutoConfig.for_model(family, num_hidden_layers=depth, **settings)
    model = hf.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():  # so that every layer changes the logits
            if param.dim() == 1:
                param.add_(torch.randn(param.shape) * 0.1)
            elif "embed" not in name:
                param.mul_(3.0)
    model.save_pretrained(top / "base")
    tokenizer.save_pretrained(top / "base")
    overrides = {
        "model.path": str(top / "base"),
        "output_dir": str(top / "run"),
        "deepspeed_config": "",
        "train.num_steps": 2,
        "train.precision": "bf16",
        "schedule.final_sparsity": 0.5,
        "pst.exclude_modules": EXCLUDED.get(family, []),
    }
    words = [word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", str(ROOT / "tests/data/world_size.toml"), "--quiet", *words]) == 0
    return top / "run"


def _export(run: Path, out: Path, *options: str) -> Path:
    assert main(["export", str(run), "--format", "onnx", *options, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.mark.thorough
@pytest.mark.few(2)
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_export_is_accepted_with_room_to_spare_at_every_depth(family, depth, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = _train(family, depth, tmp_path)
    for options in ([], ["--values", "int8"], ["--values", "int4", "--group", "row", "--embeddings", "int8"]):
        out = _export(run, tmp_path / "-".join(["onnx", *options]), *options)
        comparison = verify(out, against=run).comparison
        assert comparison.problem == ""
        assert 0 < comparison.max_logit_difference < comparison.allowed_logit_difference / 2
        # as narrow as the arithmetic: fp32, or activations of 16 bits
        most = 1e-3 if options else 1e-4
        assert comparison.allowed_logit_difference < most


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A run, and its exports in bf16 and int8."""
    top = tmp_path_factory.mktemp("bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run = _train("bert", 2, top)
        return run, {"bf16": _export(run, top / "bf16"), "int8": _export(run, top / "int8", "--values", "int8")}


def _negate(values: np.ndarray, rows: np.ndarray) -> None:
    values[:] = -values


def _clear_a_row(values: np.ndarray, rows: np.ndarray) -> None:
    values[rows == rows[len(rows) // 2]] = 0


def _quantise_badly(values: np.ndarray, rows: np.ndarray) -> None:
    """Round to 15 steps per matrix, where int8 has 255 per row."""
    step = np.abs(values).astype(np.float64).max() / 7
    values[:] = (np.round(values.astype(np.float64) / step) * step).astype(values.dtype)


def _damage(folder: Path, layer: int, change) -> None:
    """Apply ``change`` to the values of one sparse product, and make the manifest agree about the file."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = onnx.load(folder / "model.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "SparseLinear"]
    mask_name, values_name = nodes[layer].input[1:3]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    dtypes = {onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16, onnx.TensorProto.INT8: np.int8}
    dtypes[onnx.TensorProto.FLOAT] = np.float32
    mask = onnx.numpy_helper.to_array(stored[mask_name])
    columns = next(attribute.i for attribute in nodes[layer].attribute if attribute.name == "columns")
    rows = np.nonzero(np.unpackbits(mask, axis=1, bitorder="little")[:, :columns])[0]
    tensor = stored[values_name]
    values = np.frombuffer(tensor.raw_data, dtypes[tensor.data_type]).copy()
    assert len(values) == len(rows)
    change(values, rows)
    tensor.raw_data = values.tobytes()
    onnx.save(model, folder / "model.onnx")
    tensors, facts = read_manifest(folder)
    write_manifest(folder, tensors, {**facts, **file_sums(folder)})


@every_pair
@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("change", [_negate, _clear_a_row, _quantise_badly], ids=lambda change: change.__name__)
def test_a_wrong_export_is_refused(exports, tmp_path, change, layer, values):
    run, folders = exports
    assert verify(folders[values], against=run, limit=16).problem == ""
    folder = Path(shutil.copytree(folders[values], tmp_path / "onnx"))
    _damage(folder, layer, change)
    comparison = verify(folder, against=run, limit=16).comparison
    assert "differ by more than rounding explains" in comparison.problem
    assert comparison.max_logit_difference > 2 * comparison.allowed_logit_difference
