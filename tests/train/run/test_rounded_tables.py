"""Runs with quantization.embeddings: forward pass, exports and resumed runs have the same quantised tables."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core.quantization import dequantize, grid_of, round_to_grid
from pst_ds.errors import InputError
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.nn.tables.rounded import quantisable_tables
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import masked_model, prepare, prepare_single, train_prepared
from pst_ds.train.run_folder import open_trained

GRID = grid_of("int4", 32)
TABLES = ('quantization.embeddings="int4"', "quantization.group=32")


def _run(folder, data, *more):
    return load_run(
        f"tests/data/{data}.toml",
        [
            f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", "train.num_steps=6", "train.precision=bf16",
            "checkpoint.interval=3", "checkpoint.keep_last=9", *TABLES, *more,
        ],
    )  # fmt: skip


def _trained(folder, data, *more, resume=False):
    run = _run(folder, data, *more)
    train_prepared(prepare(run, launch_environment()), quiet=True, resume=resume)
    return run


def _of(run, folder):
    checkpoint = read_checkpoint((folder / "checkpoints" / "final").resolve())
    return checkpoint, masked_model(prepare_single(open_trained(run, checkpoint)[0]), checkpoint)


@pytest.mark.parametrize("method", ["dense", "pst"])
def test_tables_that_train_or_not_are_exported_as_they_were_used(tmp_path, method):
    folder, out = tmp_path / "run", tmp_path / "out"
    run = _trained(folder, "causal_lm", f"method={method}")
    checkpoint, model = _of(run, folder)
    assert main(["export", str(folder), "--checkpoint", "final", "--format", "dense", "--out", str(out)]) == 0
    stored = load_file(next(out.glob("*.safetensors")))
    tables = {name: table for name, table in quantisable_tables(model).items() if f"{name[:-6]}codes" in stored}
    assert tables
    for name, table in tables.items():
        unrounded = checkpoint.trained[name].bfloat16() if method == "dense" else load_file(_base())[name].bfloat16()
        assert torch.equal(table, round_to_grid(unrounded, None, GRID)), "which a forward pass reads"
        assert not torch.equal(table, unrounded)
        codes = stored[f"{name[:-6]}codes"].view(torch.int8)
        wide = torch.stack([(codes << 4) >> 4, codes >> 4], -1).flatten(1)
        assert torch.equal(dequantize(wide, stored[f"{name[:-6]}scales"], torch.bfloat16), table)
    assert main(["verify", str(out), "--against", str(folder), "--checkpoint", "final"]) == 0
    floats = ["export", str(folder), "--checkpoint", "final", "--dtype", "bf16", "--out", str(tmp_path / "floats")]
    assert main(floats) == 0
    plain = load_file(next((tmp_path / "floats").glob("*.safetensors")))
    assert all(torch.equal(plain[name], table) for name, table in tables.items())
    assert main(["export", str(folder), "--embeddings", "int8", "--out", str(tmp_path / "other")]) == 2


def _base():
    return "tests/data/tiny-llama/model.safetensors"


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["losses"] for line in lines if "losses" in line}


def _interrupted_and_resumed(folder, train):
    """Train to the end, forget the second half, and train again: the losses of both."""
    train(False)
    whole = _losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    (folder / "checkpoints" / "final").unlink(missing_ok=True)
    train(True)
    return whole, _losses(folder)


def test_masters_keep_small_steps_and_a_resumed_run_continues_with_them(tmp_path):
    folder = tmp_path / "run"
    whole, resumed = _interrupted_and_resumed(
        folder, lambda resume: _trained(folder, "causal_lm", "method=dense", resume=resume)
    )
    assert resumed == whole
    master = _of(_run(folder, "causal_lm", "method=dense"), folder)[0].trained["model.embed_tokens.weight"]
    before = load_file(_base())["model.embed_tokens.weight"].float()
    moved, apart = (master - before).abs(), (before - round_to_grid(before.bfloat16(), None, GRID).float()).abs()
    assert 0 < moved[moved > 0].median() < apart.max(), "less than the distance of quantised values"


def _on_ranks(folder, resume=False):
    run = "method=dense", "deepspeed_config=ds_configs/zero3_cpu.json"
    _trained(folder, "causal_lm", *run, resume=resume)


@pytest.mark.thorough
@pytest.mark.zero3
def test_ranks_quantise_their_shards(run_ranks, tmp_path):
    folder = tmp_path / "run"
    whole, resumed = _interrupted_and_resumed(folder, lambda resume: run_ranks(_on_ranks, 3, folder, resume))
    assert resumed == whole
    _trained(tmp_path / "one", "causal_lm", "method=dense")
    one = _losses(tmp_path / "one")
    assert [v for step in whole.values() for v in step] == pytest.approx([v for s in one.values() for v in s], abs=0.02)
    assert main(["export", str(folder), "--checkpoint", "final", "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(folder), "--checkpoint", "final"]) == 0


def test_rows_of_an_updated_embedding_are_quantised(tmp_path):
    folder = tmp_path / "run"
    run = _trained(folder, "world_size", 'pst.update_embeddings=["word_embeddings"]')
    _, model = _of(run, folder)
    ((_, embedding),) = pst_embeddings(model).items()
    ids = torch.arange(embedding.num_embeddings).view(1, -1)
    rows = embedding(ids).flatten(0, 1)
    assert torch.equal(rows, embedding.updated_weight())
    embedding.grid = None
    assert torch.equal(round_to_grid(embedding.updated_weight(), None, GRID), rows)
    assert main(["export", str(folder), "--checkpoint", "final", "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(folder), "--checkpoint", "final"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=dense", "train.precision=fp32"], 'embed_tokens.weight trains, and in train.precision = "fp32"'),
        (["quantization.group=128"], "groups of 128 do not divide"),
        (["model.embedding_bits=8"], "has no plain embedding"),
        (["schedule.cooldown_fraction=0"], 'quantization.embeddings = "int4" starts once masks are final'),
    ],
)
def test_tables_that_cannot_be_quantised_are_refused(tmp_path, settings, message):
    with pytest.raises((ConfigError, InputError), match=message):
        prepare(_run(tmp_path, "causal_lm", *settings), launch_environment())
