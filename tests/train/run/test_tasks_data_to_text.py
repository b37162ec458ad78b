"""E2E, DART and WebNLG from the hub's files to a verified export, with a tiny GPT-2 and its tokenizer."""

from __future__ import annotations

import json
import random

import datasets
import pytest
import torch
from datasets import Features, List, Value
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.generation import write_texts
from pst_ds.data.tasks import task_of
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare, train_prepared

pytestmark = pytest.mark.usefixtures("alone")

PLACES = ["The Vaults", "Café Adriatic", "Crowne Plaza Hotel", "The Rice Boat"]
FOODS = ["French", "Italian", "Indian", "fast food"]
SUBSETS = {"e2e": "default", "dart": "default", "webnlg": "release_v3.0_en"}
FOLDERS = {"webnlg": {"validation": "dev"}}
END = "<|endoftext|>"
TEXT = Value("string")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a random GPT-2 and a byte-level tokenizer; its one special token begins and ends texts."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([f"{place} serves {food} food" for place in PLACES for food in FOODS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(fast), n_embd=24, n_layer=2, n_head=2, n_positions=96, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.generation_config.do_sample = True  # what a folder says of sampling does not count
    model.generation_config.temperature = 3.0
    model.save_pretrained(folder)
    return folder


def _facts(split, count):
    draw = random.Random(split)
    return [(draw.choice(PLACES), draw.choice(FOODS)) for _ in range(count)]


def _e2e(split):
    """A row for each reference; rows with the same data lie apart."""
    facts = _facts(split, 6) * 2
    mr = [f"name[{place}], food[{food}]" for place, food in facts]
    texts = [f"{place} serves {food} food." for place, food in facts[:6]]
    texts += [f"{food} food is at {place}." for place, food in facts[6:]]
    features = Features({"meaning_representation": TEXT, "human_reference": TEXT})
    return datasets.Dataset.from_dict({"meaning_representation": mr, "human_reference": texts}, features=features)


def _dart(split):
    rows = {"tripleset": [], "subtree_was_extended": [], "annotations": []}
    for place, food in _facts(split, 8):
        rows["tripleset"].append([[place, "FOOD", food], [place, "PRICE_RANGE", "cheap"]])
        rows["subtree_was_extended"].append(False)
        texts = [f"{place} serves cheap {food} food", f"cheap {food} food is at {place}"]
        rows["annotations"].append({"source": ["WikiSQL_lily", "e2e"], "text": texts})
    features = Features(
        {
            "tripleset": List(List(TEXT)),
            "subtree_was_extended": Value("bool"),
            "annotations": {"source": List(TEXT), "text": List(TEXT)},
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def _webnlg(split):
    """The test file also has what another challenge tests, and rows without a reference."""
    rows = {name: [] for name in ("category", "modified_triple_sets", "lex", "test_category")}
    for i, (place, food) in enumerate(_facts(split, 9)):
        name = place.replace(" ", "_")
        rows["category"].append("Food")
        rows["modified_triple_sets"].append({"mtriple_set": [[f"{name} | food | {food}", f"{name} | area | centre"]]})
        texts = [f"{place} in the centre serves {food} food.", f"{food} food is at {place}."][: (i + 1) % 3]
        rows["lex"].append({"comment": ["good"] * len(texts), "lid": ["Id1"] * len(texts), "text": texts})
        file = ("rdf-to-text-generation" if i < 6 else "semantic-parsing") + "-test-data-with-refs-en"
        rows["test_category"].append(file if split == "test" else "")
    features = Features(
        {
            "category": TEXT,
            "modified_triple_sets": {"mtriple_set": List(List(TEXT))},
            "lex": {"comment": List(TEXT), "lid": List(TEXT), "text": List(TEXT)},
            "test_category": TEXT,
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


SHAPES = {"e2e": _e2e, "dart": _dart, "webnlg": _webnlg}


def _repository(folder, name):
    """As the hub converts a dataset: <subset>/<split>/0000.parquet, and no README."""
    for split in ("train", "validation", "test"):
        path = folder / SUBSETS[name] / FOLDERS.get(name, {}).get(split, split) / "0000.parquet"
        path.parent.mkdir(parents=True)
        SHAPES[name](split).to_parquet(path)
    return folder


def _run_file(tmp_path, gpt2, name, dataset):
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
output_dir = "{tmp_path}/run"
[model]
path = "{gpt2}"
[data]
preset = "{name}"
dataset = "{dataset}"
max_length = 64
[eval]
num_beams = 3
max_new_tokens = 12
[train]
num_steps = 6
precision = "fp32"
batch_size = 4
[schedule]
final_sparsity = 0.5
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SHAPES)
def test_from_the_hub_s_files_to_a_verified_export(tmp_path, gpt2, name, verb):
    path = _run_file(tmp_path, gpt2, name, _repository(tmp_path / "hub", name))
    run = load_run(path)
    assert (run.task, run.metric, run.eval.num_beams, run.eval.no_repeat_ngram_size) == (
        "data-to-text",
        "perplexity",
        3,
        4,
    )
    trained = verb("train", str(path), "--quiet")
    assert trained["metrics"].keys() == {"loss", "perplexity"}
    texts_file = tmp_path / "texts.jsonl"
    evaluated = verb("eval", f"{tmp_path}/run", "--texts", str(texts_file))
    assert all(0.0 <= evaluated[metric] <= 100.0 for metric in ("bleu", "rouge_l", "chrf"))
    written = [json.loads(line) for line in texts_file.read_text().splitlines()]
    examples = task_of(run).load(run.data, "test", AutoTokenizer.from_pretrained(gpt2), [])
    assert [line["references"] for line in written] == examples.references
    assert len(examples) == evaluated["examples"]
    out = str(tmp_path / "out")
    assert main(["export", f"{tmp_path}/run", "--out", out]) == 0
    verified = verb("verify", out, "--against", f"{tmp_path}/run")
    assert verified["max_logit_difference"] == verified["differing_predictions"] == verified["differing_weights"] == 0
    weight = load_file(f"{out}/model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    again = write_texts(plain, examples.prompts(60), tokenizer, run.eval, 1, "cpu")  # one at a time, so no padding
    assert again == [line["text"] for line in written]


def _train(path, *overrides):
    return train_prepared(prepare(load_run(path, overrides), launch_environment()), quiet=True)


@pytest.mark.thorough
@pytest.mark.zero3
def test_what_two_ranks_trained_one_process_writes_with(run_ranks, tmp_path, gpt2, verb):
    path = _run_file(tmp_path, gpt2, "dart", _repository(tmp_path / "hub", "dart"))
    zero3 = ["deepspeed_config=ds_configs/zero3_cpu.json", "train.precision=bf16"]
    first, second = run_ranks(_train, 2, path, *zero3)
    assert first == second | {"seconds": first["seconds"]}
    alone = ["--set", "deepspeed_config="]
    evaluated = verb("eval", f"{tmp_path}/run", "--split", "validation", *alone)
    assert evaluated["loss"] == pytest.approx(first["metrics"]["loss"], rel=0.01)
    assert evaluated["bleu"] >= 0.0
    assert main(["export", f"{tmp_path}/run", "--out", f"{tmp_path}/out"]) == 0
    verified = verb("verify", f"{tmp_path}/out", "--against", f"{tmp_path}/run", *alone)
    assert verified["max_logit_difference"] == verified["differing_predictions"] == 0


def test_what_the_presets_read(tmp_path, gpt2):
    tokenizer, found = AutoTokenizer.from_pretrained(gpt2), {}
    for name in SHAPES:
        run = load_run(_run_file(tmp_path, gpt2, name, _repository(tmp_path / name, name)))
        for split in ("train", "test"):
            pairs = task_of(run).load(run.data, split, tokenizer, [])
            lines = [tokenizer.decode(data) for data in pairs.inputs]
            found[name, split] = dict(zip(lines, pairs.references, strict=True))
    place, food = _facts("train", 1)[0]
    assert f"{place} serves {food} food." in found["e2e", "train"][f"name : {place} | food : {food}"]
    assert f"{food} food is at {place}." in found["e2e", "train"][f"name : {place} | food : {food}"]
    assert found["dart", "train"].keys() == {
        f"{place} : food : {food} | {place} : price_range : cheap" for place, food in _facts("train", 8)
    }
    subjects = [(place.replace(" ", "_"), food) for place, food in _facts("test", 6)]
    assert found["webnlg", "test"].keys() == {  # of the third and sixth row no text is known
        f"{name} : food : {food} | {name} : area : centre" for i, (name, food) in enumerate(subjects) if (i + 1) % 3
    }


def test_a_readme_with_configurations_is_read_by_its_names(tmp_path, gpt2):
    repository = _repository(tmp_path / "hub", "webnlg")
    files = "".join(f"  - split: {s}\n    path: release_v3.0_en/{s}/*\n" for s in ("train", "dev", "test"))
    (repository / "README.md").write_text(f"---\nconfigs:\n- config_name: release_v3.0_en\n  data_files:\n{files}---\n")
    path = _run_file(tmp_path, gpt2, "webnlg", repository)
    run = load_run(path, ["data.revision=main", "data.validation=dev"])
    assert len(task_of(run).load(run.data, "validation", AutoTokenizer.from_pretrained(gpt2), [])) == 9


def test_dart_s_own_json_and_plain_pairs(tmp_path, gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    rows = [
        {
            "tripleset": [["A", "Is", "b"]],
            "annotations": [{"source": "x", "text": "A is b"}, {"source": "y", "text": "b"}],
        }
    ]
    (tmp_path / "dart.json").write_text(json.dumps(rows))
    run = load_run(_run_file(tmp_path, gpt2, "dart", ""), [f"data.train={tmp_path}/dart.json"])
    pairs = task_of(run).load(run.data, "train", tokenizer, [])
    assert pairs.references == [["A is b", "b"]]
    assert tokenizer.decode(pairs.inputs[0]) == "A : is : b"
    (tmp_path / "pairs.csv").write_text("mr,ref\nname[A],It is A.\nsay what you like,I do.\n")
    columns = ['data.text_columns=["mr"]', "data.label_column=ref"]
    run = load_run(_run_file(tmp_path, gpt2, "e2e", ""), [f"data.train={tmp_path}/pairs.csv", *columns])
    pairs = task_of(run).load(run.data, "train", tokenizer, [])
    assert [tokenizer.decode(data) for data in pairs.inputs] == ["name : A", "say what you like"]


def test_what_cannot_be_read_is_named(tmp_path, gpt2):
    def refusal(*overrides, name="webnlg", split="test"):
        run = load_run(_run_file(tmp_path, gpt2, name, repository), overrides)
        with pytest.raises(ConfigError) as caught:
            task_of(run).load(run.data, split, AutoTokenizer.from_pretrained(gpt2), [])
        return str(caught.value)

    repository = _repository(tmp_path / "hub", "webnlg")
    assert "data.label_column = 'lex.txt' has no part 'txt' in the data, which has comment, lid, text" in refusal(
        "data.label_column=lex.txt"
    )
    assert "data.label_column = 'lex.' has no part '' in the data" in refusal("data.label_column=lex.")
    assert "has no column 'lexical', which data.label_column" in refusal("data.label_column=lexical.text")
    message = refusal('data.test_rows=["test_category", "rdf"]')
    assert "no row has 'rdf' in column 'test_category', as data.test_rows asks. Name one of rdf-to-text" in message
    assert "has no column 'kind', which data.test_rows" in refusal('data.test_rows=["kind", "rdf"]')
    assert "which is neither a text nor a list of triples" in refusal('data.text_columns=["lex"]', split="train")
    assert "data.separator = " in refusal(f"data.separator={'=>' * 40}")


def test_plan_counts_a_text_of_each_row(tmp_path, gpt2, verb):
    planned = verb("plan", str(_run_file(tmp_path, gpt2, "dart", _repository(tmp_path / "hub", "dart"))))
    assert (planned["num_examples"], planned["unit"], planned["trained_in_full"]) == (16, "examples", [])


def test_settings_that_leave_no_room_are_refused(tmp_path, gpt2, capsys):
    path = _run_file(tmp_path, gpt2, "e2e", _repository(tmp_path / "hub", "e2e"))
    assert main(["train", str(path), "--set", "eval.max_new_tokens=95"]) == 2
    assert "eval.max_new_tokens = 95 leaves no room for data in the 96 positions" in capsys.readouterr().err
    assert main(["train", str(path), "--set", "data.max_length=97"]) == 2
    assert "data.max_length = 97 is more than the 96 positions" in capsys.readouterr().err


def test_scores_need_their_libraries(tmp_path, gpt2, capsys, monkeypatch):
    path = _run_file(tmp_path, gpt2, "e2e", _repository(tmp_path / "hub", "e2e"))
    assert main(["train", str(path), "--quiet"]) == 0
    monkeypatch.setattr("pst_ds.data.generation.find_spec", lambda name: None)
    assert main(["eval", f"{tmp_path}/run"]) == 2
    assert "pip install 'pst-ds[nlg]'" in capsys.readouterr().err
