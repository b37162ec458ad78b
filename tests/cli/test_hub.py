"""Commands that name a model of the hub, on a local server: in every state of the cache, with the hub and without."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pst_ds.cli.main import main
from pst_ds.formats import hub
from tests.hub_server import files_of, serving, use_hub
from tests.pairs import every_pair

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "tests/data/train.jsonl"
STATES = ("empty", "config and tokenizer", "index and a shard", "full")
MISSING = ("config.json", "model.safetensors", "model-00002-of-00002.safetensors", "")
"""The file that a machine without the hub misses first, in each state of the cache."""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The tiny Llama in two files."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    shutil.copytree(ROOT / "tests/data/tiny-llama", folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(ROOT / "tests/data/tiny-llama").save_pretrained(folder, max_shard_size="60KB")
    assert (folder / MISSING[2]).is_file()
    return folder


@pytest.fixture
def server(sharded):
    with serving() as server:
        server.repositories["who/llama"] = sharded
        yield server


@pytest.fixture
def at(server, tmp_path, monkeypatch):
    """``at(state, online)``: set the cache to a state, and whether there is a hub."""

    def set_up(state, *, online):
        use_hub(monkeypatch, tmp_path / "cache", server.url)
        if state != "empty":
            folder = hub.downloaded("who/llama")
            for name in files_of(folder):
                is_shard = name.startswith("model-")
                kept = {
                    "config and tokenizer": "model" not in name,
                    "index and a shard": not is_shard or "00001" in name,
                }
                if not kept.get(state, True):
                    (folder / name).resolve().unlink()
                    (folder / name).unlink()
        if not online:
            use_hub(monkeypatch, tmp_path / "cache", None)
        server.sent.clear()

    return set_up


def _run_file(tmp_path, **start):
    text = Path("tests/data/causal_lm.toml").read_text().replace("tests/data/tiny-llama", "who/llama")
    text = text.replace("runs/causal_lm", str(tmp_path / "run")).replace("num_steps = 20", "num_steps = 2")
    text = text.replace('deepspeed_config = "ds_configs/zero3_cpu.json"\n', "")
    if start:
        text += "\n[start]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in start.items())
        text = text.replace("[schedule]", "[schedule]\ninitial_sparsity = 0.5")
    (tmp_path / "run.toml").write_text(text)
    return str(tmp_path / "run.toml")


def _init(tmp_path):
    arguments = ["init", "who/llama", "--train", TRAIN, "--task", "causal-lm", "--max-length", "32", "--steps", "4"]
    arguments += ["--sparsity", "0.5", "--text-columns", "text"]
    return [*arguments, "--out", str(tmp_path / "mine.toml"), "--json"]


@pytest.mark.parametrize("state", STATES)
def test_init_with_a_hub_proposes_the_start_and_downloads_no_weights(at, server, tmp_path, capsys, state):
    at(state, online=True)
    assert main(_init(tmp_path)) == 0
    table = tomllib.loads((tmp_path / "mine.toml").read_text())
    assert table["start"]["method"] == "alps"
    assert not [line for line in json.loads(capsys.readouterr().out.splitlines()[-1])["remarks"] if "[start]" in line]
    assert not [file for method, file, count in server.sent if "model-" in file and count > 100_001]


@pytest.mark.parametrize(("state", "missing"), zip(STATES, MISSING, strict=True))
def test_init_without_a_hub_proposes_the_start_and_says_what_it_could_not_examine(at, tmp_path, capsys, state, missing):
    at(state, online=False)
    if state == "empty":
        assert main(_init(tmp_path)) == 2
        assert "config.json of who/llama is not in the hub's cache" in capsys.readouterr().err
        return
    assert main(_init(tmp_path)) == 0
    assert tomllib.loads((tmp_path / "mine.toml").read_text())["start"]["method"] == "alps"
    remarks = json.loads(capsys.readouterr().out.splitlines()[-1])["remarks"]
    found = [line for line in remarks if line.startswith("[start] was checked with the model's config only")]
    assert len(found) == (1 if missing else 0)
    assert all(f"{missing} of who/llama" in line and "hf download who/llama" in line for line in found)


def _commands(tmp_path):
    """Commands that read the weights, by name."""
    started = _run_file(tmp_path, method="magnitude")
    return {
        "train": ["train", started, "--quiet"],
        "prune": ["prune", started, "--method", "magnitude", "--sparsity", "0.5", "--out", str(tmp_path / "pruned")],
        "inspect": ["inspect", "who/llama"],
    }


@every_pair
@pytest.mark.parametrize("verb", ["train", "prune", "inspect"])
@pytest.mark.parametrize("state", STATES)
def test_commands_with_a_hub_download_what_the_cache_lacks(at, server, tmp_path, capsys, verb, state):
    at(state, online=True)
    assert main(_commands(tmp_path)[verb]) == 0, capsys.readouterr().err
    shards = {file for file in server.received() if "/model-" in file}
    assert len(shards) == {"empty": 2, "config and tokenizer": 2, "index and a shard": 1, "full": 0}[state]
    if verb == "train":
        use_hub_again = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]
        assert main(use_hub_again) == 0, capsys.readouterr().err
    if verb == "prune":
        assert "tokenizer.json" in files_of(tmp_path / "pruned")


@every_pair
@pytest.mark.parametrize("verb", ["train", "prune", "inspect"])
@pytest.mark.parametrize(("state", "missing"), zip(STATES, MISSING, strict=True))
def test_commands_without_a_hub_need_a_full_cache_or_name_file_and_fix(at, tmp_path, capsys, verb, state, missing):
    at(state, online=False)
    code, said = main(_commands(tmp_path)[verb]), capsys.readouterr()
    assert code == (2 if missing else 0), said.err
    if missing:
        (line,) = [line for line in said.err.splitlines() if line.startswith("pst-ds ")]
        assert f"{missing} of who/llama is not in the hub's cache" in line
        assert "Run hf download who/llama where" in line
        assert "Traceback" not in said.err


def test_plan_needs_the_config_only(at, tmp_path, capsys):
    at("config and tokenizer", online=False)
    assert main(["plan", _run_file(tmp_path, method="magnitude"), "--json"]) == 0, capsys.readouterr().err


def test_a_trained_run_is_exported_and_evaluated_without_the_hub(at, tmp_path, capsys):
    at("empty", online=True)
    assert main(["train", _run_file(tmp_path), "--quiet"]) == 0
    at("full", online=False)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0, capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--quiet"]) == 0, capsys.readouterr().err


@pytest.fixture
def users_folder(server, tmp_path, monkeypatch):
    """A folder with the data of the README; the server has tiny models under the names in it."""
    rows = [json.loads(line) for line in Path(TRAIN).read_text(encoding="utf-8").splitlines()]
    shutil.copytree(ROOT / "tests/data/tiny-bert", tmp_path / "encoder")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=35, max_position_embeddings=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(tmp_path / "decoder")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-llama")
    tokenizer.chat_template = (ROOT / "tests/data/chat.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "decoder")
    server.repositories["sentence-transformers/all-MiniLM-L6-v2"] = tmp_path / "encoder"
    server.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = tmp_path / "decoder"
    use_hub(monkeypatch, tmp_path / "cache", server.url)
    monkeypatch.chdir(tmp_path)
    with open("reviews.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows)
    with open("chat.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
            file.write(json.dumps({"messages": turns}) + "\n")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "data", "more"),
    [("sentence-transformers/all-MiniLM-L6-v2", "reviews.csv", []),
     ("HuggingFaceTB/SmolLM2-135M-Instruct", "chat.jsonl", ["--sparsity", "0.5"])],
)  # fmt: skip
def test_the_flows_of_the_readme_start_with_alps_from_an_empty_cache(users_folder, capsys, model, data, more):
    assert main(["init", model, "--train", data, *more, "--out", "mine.toml"]) == 0
    assert tomllib.loads(Path("mine.toml").read_text())["start"]["method"] == "alps"
    fewer = ["--set", "train.num_steps=4", "--set", "train.num_epochs=0", "--set", "start.samples=16"]
    assert main(["train", "mine.toml", "--quiet", *fewer]) == 0, capsys.readouterr().err
    assert main(["export", "runs/mine", "--for", "cpu", "--out", "runs/mine/small"]) == 0, capsys.readouterr().err
    assert main(["verify", "runs/mine/small"]) == 0, capsys.readouterr().err
