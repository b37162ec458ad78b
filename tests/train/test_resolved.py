"""A verb builds a run's model on the meta device once, and opens its tokenizer once."""

import json
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import transformers

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.export.export_run import ExportSettings, export_run
from pst_ds.export.verify import verify
from pst_ds.nn.base_model import Pretrained
from pst_ds.planning.plan import PlanOptions, plan
from pst_ds.train.resolved import resolve
from pst_ds.train.run import train_run

RUN_FILE = "tests/data/world_size.toml"
SHORT = ["deepspeed_config=", "train.num_steps=4"]
STAGES = [
    "schedule.initial_sparsity=0.4",
    "finetune.method=lora",
    "finetune.num_steps=2",
    "start.method=alps",
    "start.samples=16",
]


def run_in(folder: Path, *settings: str):
    return load_run(RUN_FILE, [f"output_dir={json.dumps(str(folder))}", *SHORT, *settings])


@pytest.fixture
def counts(monkeypatch):
    """Count models built on the meta device by "shapes", and opened tokenizers by "tokenizer"."""
    calls: Counter[str] = Counter()

    def counted(name, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(Pretrained, "shapes", counted("shapes", Pretrained.shapes))
    opened = counted("tokenizer", transformers.AutoTokenizer.from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", opened)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_makes_shapes_and_tokenizer_once(counts, tmp_path, precision):
    plan(run_in(tmp_path, f"train.precision={precision}"), PlanOptions(ranks=1))
    assert counts == {"shapes": 1, "tokenizer": 1}


def test_train_export_and_verify_make_shapes_and_tokenizer_once(counts, tmp_path):
    run = run_in(tmp_path / "run", "train.precision=bf16")
    train_run(run, quiet=True)
    assert counts == {"shapes": 1, "tokenizer": 1}

    counts.clear()
    export_run(run, tmp_path / "packed", ExportSettings(format="bitmask"))
    assert counts == {"shapes": 1, "tokenizer": 1}

    counts.clear()
    verify(tmp_path / "packed", run).require_equal()
    assert counts["tokenizer"] == 1


def test_stages_share_the_model_and_the_tokenizer(counts, tmp_path):
    """[finetune] trains another method, in a copy of the same model on the meta device; the start needs no shapes."""
    run = run_in(tmp_path, *STAGES)
    plan(run, PlanOptions(ranks=1))
    assert counts == {"shapes": 1, "tokenizer": 1}

    counts.clear()
    train_run(run, quiet=True)
    assert counts == {"shapes": 1, "tokenizer": 1}


def test_a_search_and_a_cure_vary_the_run_and_make_model_and_tokenizer_once(counts, tmp_path, capsys):
    words = [f"output_dir={json.dumps(str(tmp_path))}", *SHORT]
    settings = [word for setting in words for word in ("--set", setting)]
    assert main(["plan", RUN_FILE, "--search", "--memory", "0.0001", *settings]) == 3
    said = capsys.readouterr().out
    assert "ways to run the same batch" in said
    assert "to fix: " in said
    assert counts == {"shapes": 1, "tokenizer": 1}


def test_init_makes_model_and_tokenizer_once_for_all_its_proposals(counts, tmp_path):
    words = ["--train", "tests/data/train.jsonl", "--out", str(tmp_path / "run.toml")]
    assert main(["init", "tests/data/tiny-bert", *words]) == 0
    assert counts == {"shapes": 1, "tokenizer": 1}


def test_an_export_that_measures_its_loss_makes_model_and_tokenizer_once(counts, tmp_path, capsys):
    train_run(run_in(tmp_path / "run"), quiet=True)
    counts.clear()
    words = ["--for", "vllm", "--out", str(tmp_path / "out"), "--json", "--quiet"]
    assert main(["export", str(tmp_path / "run"), *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["quantisation_loss"] is not None
    assert counts == {"shapes": 1, "tokenizer": 1}


def test_changed_settings_share_the_shapes_that_do_not_depend_on_them(counts, tmp_path):
    resolved = resolve(run_in(tmp_path))
    run = resolved.run
    longer = replace(run, train=replace(run.train, num_steps=8))
    quantised = replace(run, model=replace(run.model, base_bits=4, base_group="row"))
    assert resolved.with_settings(longer).shapes is resolved.shapes
    assert resolved.with_settings(quantised).shapes is not resolved.shapes
    assert resolved.with_shards(2).shapes is not resolved.shapes
    prompted = run_in(tmp_path, "additions.prompt.text=good or bad")
    names = dict(resolved.with_settings(prompted).shapes.model.named_parameters())
    assert names.keys() - dict(resolved.shapes.model.named_parameters()).keys() == {"bert.pst_prompt.vectors"}
    assert counts == {"shapes": 1, "tokenizer": 1}  # of all of them


def test_configs_of_the_same_model_share_shapes(counts, tmp_path):
    resolved = resolve(run_in(tmp_path, *STAGES))
    assert not counts["shapes"]  # built on first use: reading a checkpoint needs none
    later = resolved.with_run(resolved.run.finetuned().started())
    assert later.shapes is resolved.shapes
    assert later.tokenizer is resolved.tokenizer
    assert counts == {"shapes": 1, "tokenizer": 1}
    with pytest.raises(FrozenInstanceError):
        resolved.run = later.run


def test_targets_have_the_layout_and_rule_of_their_layer(tmp_path):
    overrides = '[{modules = ["query"], final_sparsity = 0.5}]'
    shapes = resolve(run_in(tmp_path, f"pst.overrides={overrides}"), reads_data=False).shapes
    assert shapes.targets
    for target in shapes.targets:
        layer = shapes.model.get_submodule(target.name)
        assert (target.layout, target.rule) == (layer.layout, layer.rule)
        assert (target.rule.final_sparsity == 0.5) == target.name.endswith("query")


def test_an_export_has_the_dropout_of_the_model_not_of_the_run(tmp_path):
    run = run_in(tmp_path, "model.dropout=0.25")
    own = Pretrained(run.model.path).config().hidden_dropout_prob
    shapes = resolve(run, reads_data=False).shapes
    assert own != 0.25
    assert shapes.model.config.hidden_dropout_prob == 0.25
    assert shapes.model_to_export().config.hidden_dropout_prob == own
