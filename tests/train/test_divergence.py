"""A loss that is not finite: the layer and the example that it comes from, before any step is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train import run as run_module
from pst_ds.train.divergence import BAD_BATCH_FILE, DivergedError, _rows_not_finite
from pst_ds.train.run import prepare, train_prepared

LAYER, EXAMPLE = "bert.encoder.layer.1.intermediate.dense", 41


def _ends_in(folder, *more):
    """Train with a layer whose output for one example is infinite; return what the run ends with."""
    settings = [f"output_dir={json.dumps(str(folder))}", "checkpoint.interval=0", *more]
    run = load_run("tests/data/world_size.toml", settings if world_size() > 1 else ["deepspeed_config=", *settings])
    prepared = prepare(run, LaunchEnvironment(rank(), world_size(), rank()))
    text = prepared.task.collate(prepared.load("train"), [EXAMPLE], prepared.tokenizer)["input_ids"][0]
    text, seen, build = text[text != prepared.tokenizer.pad_token_id], [], run_module.build

    def spoiled(*arguments, **named):
        engine = build(*arguments, **named)
        model = engine.module
        model.register_forward_pre_hook(lambda module, args, more: seen.append(more["input_ids"]), with_kwargs=True)
        model.get_submodule(LAYER).register_forward_hook(spoil)
        return engine

    def spoil(module, args, output):
        rows = [torch.equal(ids[: len(text)], text) and not ids[len(text) :].any() for ids in seen[-1]]
        return output.masked_fill(torch.tensor(rows)[:, None, None], math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build", spoiled)
        with pytest.raises(DivergedError) as caught:
            train_prepared(prepared, resume=False, quiet=True)
    return str(caught.value)


def _require_named(said, folder):
    assert f"the first output that is not is that of {LAYER}, of example {EXAMPLE} of data.train (rank " in said
    assert str(folder / BAD_BATCH_FILE) in said
    saved = load_file(folder / BAD_BATCH_FILE)
    assert EXAMPLE in saved["examples"]
    assert len(saved["input_ids"]) == len(saved["labels"]) == len(saved["examples"])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_layer_and_the_example_are_named(tmp_path, accumulation):
    said = _ends_in(tmp_path, f"train.gradient_accumulation_steps={accumulation}")
    assert "is not finite on rank 0 (after " in said
    _require_named(said, tmp_path)


@pytest.mark.zero3
def test_all_ranks_name_what_one_of_them_read(run_ranks, tmp_path):
    said = run_ranks(_ends_in, 2, tmp_path)
    assert said[0] == said[1]
    _require_named(said[0], tmp_path)


def test_a_loss_that_no_layer_explains_is_said_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("pst_ds.train.objective.Objective.__call__", lambda *_: torch.tensor(math.nan).requires_grad_())
    run = load_run("tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(tmp_path))}"])
    with pytest.raises(DivergedError, match=r"batch 1 is not finite on rank 0 .*; lower the learning rates"):
        train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), resume=False, quiet=True)
    assert not (Path(tmp_path) / BAD_BATCH_FILE).exists()


def test_values_are_cut_by_example_where_they_can_be():
    values = torch.zeros(6, 4)
    values[3, 1] = math.nan
    assert _rows_not_finite(values, 6) == [3]
    assert _rows_not_finite(values, 2) == [1]
    assert _rows_not_finite(values, 4) == [0, 1, 2, 3]
    assert _rows_not_finite(torch.zeros(6), 6) == []
    assert _rows_not_finite(torch.tensor(math.inf), 2) == [0, 1]
