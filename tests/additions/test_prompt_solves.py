"""A prompt beside one-shot pruning before training ([start]) and solves during it: padding is no input of a layer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.additions.prompt import PromptSettings
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.addition import attach_additions, inputs_of_layers
from pst_ds.nn.gradient_sums import GradientSums
from pst_ds.nn.inject import inject_pst
from tests.train.stopping import train_here

BERT = "tests/data/tiny-bert"
PROMPT = ('additions.prompt.text="a good plot"', "additions.prompt.learning_rate=0.01")
START = ("start.method=alps", "start.samples=16", "schedule.initial_sparsity=0.3")
SOLVES = ("schedule.solves=1", "schedule.update_interval=1", "train.num_steps=12")


def _train(folder, *more, ranks=False):
    settings = [
        f"output_dir={json.dumps(str(folder))}",
        "schedule.final_sparsity=0.5",
        "train.num_steps=4",
        "eval.interval=0",
        *more,
    ]
    return train_here("tests/data/world_size.toml", settings, ranks=ranks)


def _checkpoint(folder):
    return read_checkpoint((Path(folder) / "checkpoints" / "final").resolve())


def _assert_exports_exactly(folder, verb):
    verb("export", str(folder / "run"), "--out", str(folder / "out"))
    assert main(["verify", str(folder / "out"), "--against", str(folder / "run")]) == 0


def test_the_one_shot_pruning_before_a_run_is_that_without_the_prompt(tmp_path, verb):
    _train(tmp_path / "run", *START, *PROMPT)
    _train(tmp_path / "plain", *START)
    pruned = load_file(tmp_path / "run" / "start" / "model.safetensors")
    plain = load_file(tmp_path / "plain" / "start" / "model.safetensors")
    assert pruned.keys() == plain.keys()
    for name, values in plain.items():
        assert torch.equal(pruned[name], values), name
    assert "bert.pst_prompt.vectors" in _checkpoint(tmp_path / "run").trained
    _assert_exports_exactly(tmp_path, verb)


@pytest.mark.zero3
def test_a_run_with_solves_trains_the_prompt_on_two_ranks_as_on_one(run_ranks, tmp_path, verb):
    run_ranks(partial(_train, str(tmp_path / "2"), *SOLVES, *PROMPT, ranks=True), 2)
    _train(tmp_path / "run", *SOLVES, *PROMPT)
    one = dict(_checkpoint(tmp_path / "run").trained)
    two = dict(_checkpoint(tmp_path / "2").trained)
    assert one.keys() == two.keys()
    name = "bert.pst_prompt.vectors"
    torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2)
    _assert_exports_exactly(tmp_path, verb)


def _sums(batches):
    """The sums of a model with a prompt over ``batches``, the first of which also sets the scales."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(BERT).eval()
    attach_additions(model, {"prompt": PromptSettings(text="a good plot")}, AutoTokenizer.from_pretrained(BERT), seed=0)
    inject_pst(model, PSTConfig())
    for layer in model.modules():
        if hasattr(layer, "pst_U"):
            torch.nn.init.normal_(layer.pst_U)
    sums = GradientSums(model, torch.device("cpu"), by_token=False)
    for batch in (batches[0], *batches):
        sums.expect(inputs_of_layers(model, batch))
        model(**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
        sums.settle()
    found = list(sums.statistics())
    sums.close()
    return found


def test_padding_next_to_a_prompt_does_not_count_in_the_sums_of_a_solve():
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    mask = torch.ones_like(ids)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 9)),
        "attention_mask": torch.nn.functional.pad(mask, (0, 9)),
    }
    without = _sums([{"input_ids": ids, "attention_mask": mask}])
    for (gram, rows), (expected_gram, expected_rows) in zip(_sums([padded]), without, strict=True):
        torch.testing.assert_close(gram, expected_gram, rtol=1e-3, atol=1e-3 * float(expected_gram.abs().max()))
        torch.testing.assert_close(rows, expected_rows, rtol=1e-2, atol=1e-3 * float(expected_rows.abs().max()))
