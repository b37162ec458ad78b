"""``pst-ds init``: run files that ``plan`` takes, from flags and from answers, and never over what is there."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import textwrap
import tomllib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pst_ds.cli import init
from pst_ds.cli.init.draft import deepspeed_settings
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.data import plain_text
from tests.nn.expert_families import tiny_model

ROOT = Path(__file__).resolve().parents[2]
BERT, LLAMA, TRAIN = "tests/data/tiny-bert", "tests/data/tiny-llama", "tests/data/train.jsonl"


@pytest.fixture
def made(tmp_path, capsys):
    """``made(...)``: (the run file, its tables, the JSON) of ``pst-ds init`` with these arguments."""

    def run(*arguments):
        out = tmp_path / "mine.toml"
        assert main(["init", *arguments, "--out", str(out), "--json"]) == 0
        said = capsys.readouterr()
        return out, tomllib.loads(out.read_text()), json.loads(said.out.splitlines()[-1])

    return run


def _planned(capsys, out, *options):
    assert main(["plan", str(out), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_classifier(made, capsys):
    out, table, result = made(BERT, "--train", TRAIN, "--validation", "tests/data/validation.jsonl")
    assert (table["task"], table["method"]) == ("classification", "pst")
    assert table["data"]["max_length"] == 48  # of the model's positions; 128 would be more
    assert table["data"]["validation"] == "tests/data/validation.jsonl"
    assert "deepspeed_config" not in table
    assert table["pst"]["update_embeddings"] == ["word_embeddings"]
    early = {"initial_sparsity": 0.8, "warmup_fraction": 0.0, "cooldown_fraction": 0.4}
    assert {name: table["schedule"][name] for name in early} == early
    assert table["start"] == {"method": "alps", "samples": 240, "reconstruct": 2}
    assert table["pst"]["magnitude"] == "activation"
    assert (result["classes"], result["examples"], result["num_layers"]) == (["bad", "good"], 240, 12)
    plan = _planned(capsys, out)
    assert (plan["num_steps"], plan["trained_parameters"]) == (result["num_steps"], result["trained_parameters"])
    text = out.read_text()
    for words in (
        "# 2 classes: bad, good",
        "# family bert",
        "at most 48",
        "# 240 examples",
        "query, key, value, dense",
        "One-shot method that chooses the initial masks",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("more", [("--sparsity", "0.8"), ("--method", "gmp"), ("--pattern", "4x4")])
def test_a_start_by_alps_is_for_classifiers_with_many_zeros_anywhere(made, more):
    out, table, _ = made(BERT, "--train", TRAIN, *more)
    assert "start" not in table
    assert "ALPS" not in out.read_text()
    assert "magnitude" not in table["pst"]
    assert table["schedule"].get("initial_sparsity") in (None, 0.4, 0.45)


@pytest.mark.parametrize(
    ("more", "solves"),
    [
        (("--steps", "100"), 5),
        (("--steps", "30"), 0),  # a ramp of 18 steps
        (("--steps", "100", "--pattern", "row"), 0),
        (("--steps", "100", "--task", "regression", "--label-column", "length"), 0),
    ],
)
def test_masks_are_solved_for_where_that_was_measured(made, capsys, tmp_path, more, solves):
    rows = [{**json.loads(line), "length": 1.0 * len(line)} for line in Path(TRAIN).read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, table, _ = made(BERT, "--train", str(tmp_path / "rows.jsonl"), "--sparsity", "0.95", *more)
    assert table["schedule"].get("solves", 0) == solves
    assert ("start" in table, "magnitude" in table["pst"]) == (not solves, not solves)
    assert ("the model is dense before the first solve" in out.read_text()) is bool(solves)
    assert _planned(capsys, out)["num_steps"] > 0


def test_a_model_that_cannot_be_pruned_block_by_block_begins_without(made, tmp_path):
    """As a folder whose class has weights that it lacks."""
    base = Path(shutil.copytree(BERT, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
    out, table, _ = made(str(base), "--train", TRAIN)
    assert "start" not in table
    assert "more accurate if initialised with ALPS" in out.read_text()
    assert table["schedule"]["initial_sparsity"] == 0.45


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("model", "more", "pattern", "words"),
    [
        (BERT, ("--target", "cpu"), "matrix", "at this sparsity blocks lose 2 to 3 points more"),
        (BERT, ("--target", "cpu", "--method", "gmp"), "1x4", "blocks of 4 inputs"),
        (BERT, ("--target", "cpu", "--sparsity", "0.8"), "1x4", "blocks of 4 inputs"),
        (LLAMA, ("--target", "cpu", "--task", "causal-lm"), "global", "decoders on CPUs"),
        (BERT, ("--target", "cpu", "--pattern", "row"), "row", '"16x1"'),
        (BERT, (), "matrix", '"16x1"'),
    ],
)
def test_where_a_model_will_run_proposes_a_pattern(made, capsys, model, more, pattern, words):
    out, table, _ = made(model, "--train", TRAIN, *more)
    assert table["pst"]["pattern"] == pattern
    (above,) = (above for above, line in itertools.pairwise(out.read_text().splitlines()) if "pattern = " in line)
    assert words in above
    assert _planned(capsys, out)["num_steps"] > 0


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("model", "more", "method", "share"),
    [
        (BERT, ("--target", "openvino"), "lora", 0.25),
        (BERT, ("--target", "gpu", "--speedup", "1.3"), "lora", 0.5),
        (BERT, ("--target", "openvino", "--sparsity", "0.8"), "pst", 0.25),
        (LLAMA, ("--target", "llama.cpp", "--task", "causal-lm"), "lora", 0.75),
    ],
)
def test_an_engine_gets_a_smaller_model_that_recovers_from_the_cut(made, capsys, model, more, method, share):
    out, table, result = made(model, "--train", TRAIN, "--steps", "300", *more)
    assert (table["method"], table["start"]["method"], table["start"]["ffn"]) == (method, "channels", share)
    learns_first = model == BERT
    assert table["distillation"] == {"weight": 0.5, "teacher": "finetuned" if learns_first else model}
    assert table.get("finetune") == ({"method": "dense", "num_steps": 300} if learns_first else None)
    assert result["num_steps"] == (100 if learns_first and method == "lora" else 300)
    assert ("final_sparsity" in table.get("schedule", {})) is (method == "pst")
    assert _planned(capsys, out)["start"]["ffn"] == share


def test_every_setting_has_a_comment(made):
    out, table, result = made(BERT, "--train", TRAIN, "--ranks", "2", "--exclude-modules", "query,key")
    assert (table["pst"]["exclude_modules"], result["num_layers"]) == (["query", "key"], 8)
    lines = out.read_text().splitlines()
    plain = [line for above, line in itertools.pairwise(lines) if " = " in line and not above.startswith("#")]
    assert plain == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_have_deepspeeds_settings_beside_the_run_file(made, capsys, ranks):
    out, table, result = made(BERT, "--train", TRAIN, "--ranks", str(ranks))
    assert table["train"]["batch_size"] == {2: 32, 3: 30}[ranks]
    written = json.loads(Path(table["deepspeed_config"]).read_text())
    assert table["deepspeed_config"] == result["deepspeed_config"] == str(out.with_suffix(".deepspeed.json"))
    assert written == json.loads((ROOT / "ds_configs/zero3_cpu.json").read_text())
    assert _planned(capsys, out, "--ranks", str(ranks))["zero_stage"] == 3
    assert f"deepspeed --num_accelerators {ranks} --module pst_ds train {out}" in out.read_text()


def test_a_cluster_gets_the_settings_that_a_search_finds_and_a_job(made, capsys):
    nodes = ("--nodes", "2", "--machine", "h100")
    out, table, result = made(LLAMA, "--train", TRAIN, "--task", "causal-lm", "--text-columns", "text", *nodes)
    assert result["ranks"] == 16
    text = out.read_text()
    assert "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sbatch" in text
    assert f"pst-ds plan {out} --ranks 16 --machine h100" in text
    # the host bounds steps of so small a model, and has fewer hooks to call at stage 2
    assert json.loads(Path(table["deepspeed_config"]).read_text()) == deepspeed_settings(on_cpu=False, stage=2)
    assert "# settings of DeepSpeed: ZeRO stage 2" in text
    plan = _planned(capsys, out, "--ranks", "16", "--machine", "h100")
    assert (plan["ranks"], plan["zero_stage"], plan["verdict"]["fits"]) == (16, 2, True)
    (remark,) = (remark for remark in result["remarks"] if "ZeRO stage 2" in remark)
    assert f"{plan['time']['step']:.3g} s per step on h100" in remark


def test_a_cluster_with_less_memory_than_the_model_has_stage_3(made, tmp_path):
    rates = {"name": "small", "flops": 1e12, "memory_bytes": 1e12, "node_size": 8, "node_bytes": 1e12,
             "network_bytes": 1e12, "latency": 0, "capacity": 1e6}  # fmt: skip
    machine = tmp_path / "small.toml"
    machine.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in rates.items()))
    nodes = ("--nodes", "2", "--machine", str(machine))
    _, table, result = made(LLAMA, "--train", TRAIN, "--task", "causal-lm", "--text-columns", "text", *nodes)
    written = json.loads(Path(table["deepspeed_config"]).read_text())
    assert written == deepspeed_settings(on_cpu=False)
    assert any("does NOT fit" in remark for remark in result["remarks"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--nodes", "2"), "Add --machine with one of h100"),
        (("--machine", "h100"), "Add --nodes"),
        (("--nodes", "2", "--machine", "cpu"), "its nodes have no GPUs"),
    ],
)
def test_a_cluster_has_nodes_and_a_machine(tmp_path, capsys, more, words):
    assert main(["init", LLAMA, "--train", TRAIN, *more, "--out", str(tmp_path / "run.toml")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("on_cpu", "stage", "name"), [(True, 3, "zero3_cpu"), (False, 3, "zero3"), (False, 2, "zero2")]
)
def test_the_settings_are_those_of_ds_configs(on_cpu, stage, name):
    assert deepspeed_settings(on_cpu=on_cpu, stage=stage) == json.loads((ROOT / f"ds_configs/{name}.json").read_text())


def test_a_language_model(made, capsys):
    flags = ("--task", "causal-lm", "--pattern", "2:4", "--steps", "7")
    out, table, result = made(LLAMA, "--train", TRAIN, *flags)
    assert "label_column" not in table["data"]
    assert (table["schedule"]["final_sparsity"], table["pst"]["pattern"]) == (0.5, "2:4")
    assert _planned(capsys, out)["num_steps"] == result["num_steps"] == 7
    assert result["unit"] == "sequences"
    assert "update_embeddings" not in table["pst"]
    assert table["start"] == {"method": "alps", "samples": result["examples"], "reconstruct": 2}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("more", "zeros", "pattern", "shares"),
    [
        ((), 0.5, "global", "saliency"),
        (("--target", "cpu"), 0.5, "global", "saliency"),
        (("--sparsity", "0.8"), 0.8, "global", "saliency"),
        (("--sparsity", "0.85"), 0.85, "matrix", None),
        (("--pattern", "row"), 0.5, "row", None),
    ],
)
def test_a_language_model_begins_by_alps_with_all_its_zeros(made, capsys, more, zeros, pattern, shares):
    out, table, _ = made(LLAMA, "--train", TRAIN, "--task", "causal-lm", *more)
    schedule = table["schedule"]
    assert (schedule["final_sparsity"], schedule["initial_sparsity"]) == (zeros, zeros)
    assert (table["pst"]["pattern"], table["start"].get("budgets")) == (pattern, shares)
    assert (table["pst"]["frozen_magnitude"], table["pst"]["update_init"]) == (True, "lora")
    assert ("of all pruned matrices together" in out.read_text()) is (pattern == "global")
    assert _planned(capsys, out)["num_steps"] > 0


@pytest.fixture
def mixture(tmp_path):
    """Folder of a tiny mixture of experts."""
    base = tmp_path / "base"
    tiny_model("qwen3_moe").save_pretrained(base)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(base)
    return str(base)


def test_a_mixture_of_experts_begins_by_alps_with_equal_shares(made, mixture):
    """Shares by saliency do not go through stacks of experts."""
    _, table, _ = made(mixture, "--train", TRAIN, "--task", "causal-lm", "--max-length", "32", "--force")
    assert (table["start"]["method"], table["start"].get("budgets")) == ("alps", None)
    assert table["pst"]["pattern"] == "matrix"


def test_a_start_that_the_run_does_not_support_leaves_room_for_the_next_best(made, mixture):
    """Solves during training, the best at this sparsity, do not work on stacks of experts; a start by ALPS does."""
    words = ("--task", "classification", "--text-columns", "text", "--sparsity", "0.95", "--max-length", "32")
    _, table, result = made(mixture, "--train", TRAIN, *words, "--steps", "100")
    assert table["start"]["method"] == "alps"
    assert "solves" not in table["schedule"]
    assert "ALPS" not in "".join(result["remarks"])


@pytest.mark.parametrize("more", [("--pattern", "4x4"), ("--method", "gmp"), ("--pattern", "stack")])
def test_a_language_model_begins_dense_where_no_start_was_measured(made, more):
    out, table, _ = made(LLAMA, "--train", TRAIN, "--task", "causal-lm", *more)
    assert "start" not in table
    assert "initial_sparsity" not in table["schedule"]
    assert "ALPS" not in out.read_text()


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"text": ["a film", "the plot"], "label": [0.5, 1.0]}, "regression"),
        ({"sentence": ["a film", "the plot"], "label": [1, 0]}, "classification"),
        ({"premise": ["a", "b"], "hypothesis": ["c", "d"], "source": ["x", "y"], "label": [1, 0]}, "classification"),
    ],
)  # fmt: skip
def test_the_task_and_the_texts_are_seen_in_the_columns(made, tmp_path, columns, task):
    file = tmp_path / "rows.jsonl"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    out, table, _ = made(BERT, "--train", str(file))
    assert table["task"] == task
    assert table["data"]["text_columns"] == [name for name in columns if name not in ("label", "source")]
    assert load_run(out).train.batch_size == 32


def test_a_text_file_is_for_a_language_model(made, tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("the film was fine and the plot was a clever story\n" * 60)
    _, table, _ = made(LLAMA, "--train", str(file))
    assert table["task"] == "causal-lm"


@pytest.fixture
def book(tmp_path):
    """Prose in narrow lines: some eight tokens a line, of the 48 that the tiny model takes."""
    sentence = "the film was fine and the plot was a clever story , and the warm film was fine ."
    paragraphs = [textwrap.fill(f"{sentence} " * count, 36) for count in (2, 1, 5, 3) * 9]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs) + "\n")
    return str(tmp_path / "book.txt")


def test_a_book_is_one_text_and_says_so(made, capsys, book):
    out, table, result = made(LLAMA, "--train", book)
    assert table["data"]["sample_by"] == "document"
    assert (table["data"]["train"], table["data"]["validation"]) == (f"{book}[:90%]", f"{book}[90%:]")
    lines, held_out = result["remarks"]
    assert lines == f'{book}: its lines are parts of longer texts, not documents: data.sample_by = "document"'
    assert held_out.startswith(f"held out for validation: the last 10 % of {book}, ")
    assert "# Row of a .txt file: " in out.read_text()
    assert _planned(capsys, out)["remarks"] == []


def test_a_large_book_is_read_by_paragraphs_that_run_on(made, capsys, book, monkeypatch):
    monkeypatch.setattr(plain_text, "DOCUMENT_BYTES", 1000)
    out, table, _ = made(LLAMA, "--train", book)
    assert (table["data"]["sample_by"], table["data"]["document_mask"]) == ("paragraph", False)
    assert _planned(capsys, out)["remarks"] == []


def test_a_tenth_is_held_out(made, capsys):
    out, table, result = made(BERT, "--train", TRAIN, "--steps", "80", "--method", "lora")
    assert (table["data"]["train"], table["data"]["validation"]) == (f"{TRAIN}[:90%]", f"{TRAIN}[90%:]")
    assert result["remarks"] == [f"held out for validation: the last 10 % of {TRAIN}, 24 examples"]
    assert (result["examples"], _planned(capsys, out)["num_examples"]) == (216, 216)
    assert list(table["data"])[:2] == ["train", "validation"]


@pytest.mark.thorough
def test_a_run_with_rows_held_out_is_trained_resumed_and_evaluated(made, capsys, tmp_path):
    run = ("--method", "lora", "--steps", "120", "--output-dir", str(tmp_path / "run"))
    out, _, _ = made(BERT, "--train", TRAIN, *run)
    assert main(["train", str(out), "--set", "train.num_steps=2"]) == 0
    assert main(["eval", str(tmp_path / "run"), "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["examples"] == 24
    resume = ("train", str(tmp_path / "run"), "--resume")
    assert main([*resume]) == 0
    assert main([*resume, "--set", f'data.train="{TRAIN}[:80%]"']) == 2
    assert f"data.train = '{TRAIN}[:80%]' differs from the data of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "the film", "label": i // 50} for i in range(100)], "[90%:] has one class only"),
        ([{"text": "the film", "label": i // 5} for i in range(100)], "[:90%] lacks some classes"),
        ([{"text": "the film", "label": i % 2} for i in range(4)], "[90%:]' has no examples"),
    ],
)
def test_rows_that_make_no_fair_validation_are_not_held_out(made, capsys, tmp_path, rows, words):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, table, result = made(BERT, "--train", str(file), "--method", "lora")
    assert table["data"]["train"] == str(file)
    assert "validation" not in table["data"]
    (remark,) = result["remarks"]
    assert remark.startswith("no validation data: ")
    assert words in remark
    assert remark.endswith(". Name a file with --validation")
    assert _planned(capsys, out)["num_examples"] == len(rows)


def test_nothing_is_held_out_where_it_is_not_wanted(made):
    _, table, result = made(BERT, "--train", TRAIN, "--validation", "none")
    assert "validation" not in table["data"]
    assert (result["examples"], result["remarks"]) == (240, [])
    _, table, result = made(BERT, "--train", f"{TRAIN}[:50%]", "--force")
    assert (table["data"]["train"], result["examples"]) == (f"{TRAIN}[:50%]", 120)
    assert result["remarks"] == [
        f"no validation data: {TRAIN}[:50%] is a slice, and --validation may name the rest of {TRAIN}"
    ]


@pytest.mark.parametrize("odd", ["bad\nmethod = 3", "bad\x00\x1b[2J", "bad\r\x7f", "bad\u2028x"])
def test_a_comment_is_one_line_whatever_the_classes_are_called(made, tmp_path, odd):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "the film", "label": label} for label in (odd, "good", "schön")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 9))
    out, table, result = made(BERT, "--train", str(file))
    assert set(result["classes"]) == {odd, "good", "schön"}
    assert table["method"] == "pst"
    (comment,) = [line for line in out.read_text().splitlines() if "3 classes" in line]
    assert comment.isprintable()
    assert "schön" in comment


def test_commands_are_quoted_for_the_shell(tmp_path, capsys):
    out = tmp_path / "my runs; rm -r $HOME" / "it's.toml"
    assert main(["init", BERT, "--train", TRAIN, "--ranks", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    plan, train = said.partition("next: ")[2].rstrip("\n").split("; then ")
    assert shlex.split(plan) == ["pst-ds", "plan", str(out), "--ranks", "2"]
    assert shlex.split(train)[-3:] == ["pst_ds", "train", str(out)]
    in_comments = [shlex.split(line.partition(": ")[2]) for line in out.read_text().splitlines()[:2]]
    assert in_comments == [shlex.split(plan), shlex.split(train)]


@pytest.mark.few(4)
@pytest.mark.parametrize("method", init.METHODS)
def test_every_method_is_planned(made, mixture, capsys, method):
    model = [mixture, "--task", "causal-lm", "--max-length", "32"] if method == "experts" else [BERT]
    out, table, result = made(*model, "--train", TRAIN, "--method", method, "--sparsity", "0.7")
    assert _planned(capsys, out)["trained_parameters"] == result["trained_parameters"]
    assert table.get("schedule", {}).get("final_sparsity", 0.0) == (0.0 if method in ("dense", "lora") else 0.7)
    assert ("initial_sparsity" in table.get("schedule", {})) is (method == "pst")


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_nothing_is_written_over(made, tmp_path, capsys):
    out, _, _ = made(BERT, "--train", TRAIN)
    before = out.read_bytes()
    assert f"{out} exists. Name another file with --out, or overwrite it with --force" in _refused(
        capsys, BERT, "--train", TRAIN, "--sparsity", "0.5", "--out", str(out)
    )
    assert out.read_bytes() == before
    _, table, _ = made(BERT, "--train", TRAIN, "--sparsity", "0.5", "--force")
    assert table["schedule"]["final_sparsity"] == 0.5


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("folder", [".", "tests/data"])
def test_a_folder_is_not_a_run_file(capsys, folder, force):
    assert f"--out {folder} is a folder. Name a file to write" in _refused(
        capsys, BERT, "--train", TRAIN, "--out", folder, *force
    )


def test_what_cannot_be_is_2_and_writes_nothing(tmp_path, capsys):
    out = ("--out", str(tmp_path / "run.toml"))
    odd = tmp_path / "odd.csv"
    odd.write_text("a,b,c,label\nx,y,z,1\n")
    for arguments, words in (
        ((BERT, "--train", "no.jsonl"), "--train no.jsonl does not exist"),
        (("no/such/model", "--train", TRAIN), "no/such/model"),
        ((BERT, "--train", str(odd)), "Name them with --text-columns. Columns: a, b, c, label"),
        ((BERT, "--train", TRAIN, "--sparsity", "1.5"), "--sparsity 1.5 must be in [0, 1)"),
        ((BERT, "--train", TRAIN, "--pattern", "3:2"), "3:2"),
        ((BERT, "--train", TRAIN, "--pattern", "2:4", "--sparsity", "0.9"), "Fix: --sparsity 0.5"),
        ((BERT, "--train", TRAIN, "--epochs", "0"), "--epochs 0.0"),
        ((BERT, "--train", TRAIN, "--ranks", "8", "--batch-size", "5"), "make it 8 or more"),
        ((BERT, "--train", TRAIN, "--batch-size", "999"), "--batch-size 999"),
        ((BERT, "--train", TRAIN, "--task", "causal-lm"), "Name a causal language model"),
        ((BERT, "--train", TRAIN, "--label-column", "lable"), "--label-column 'lable'"),
        ((LLAMA, "--train", TRAIN, "--label-column", "lable"), "columns: text, label"),
    ):
        assert words in _refused(capsys, *arguments, *out)
    assert list(tmp_path.iterdir()) == [odd]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"sentence": "a film", "stars": 3, "id": 7}, "--label-column: stars, id"),
        ({"a": "a film", "b": "the plot", "c": "good"}, "--label-column: a, b, c"),
        ({"text": "a film"}, "Name a causal language model"),
    ],
)
def test_a_model_that_writes_no_text_needs_a_label_column(tmp_path, capsys, row, words):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 30)
    said = _refused(capsys, BERT, "--train", str(file), "--out", str(tmp_path / "run.toml"))
    assert words in said
    assert ("is_decoder" in said) is ("--label-column" not in said)
    assert not (tmp_path / "run.toml").exists()
