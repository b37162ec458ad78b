"""``pst-ds generate`` on tiny models: what it writes, against a loop without a cache, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.generate.answer import Stopwatch
from pst_ds.cli.main import main
from pst_ds.inference.decoder import Decoder

DATA = Path(__file__).resolve().parents[1] / "data"
PROMPT = "the film is"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with 60 % zeros in its projections, dense and as bitmask and csr."""
    top = tmp_path_factory.mktemp("models")
    shutil.copytree(DATA / "tiny-llama", top / "dense")
    tensors = load_file(top / "dense" / "model.safetensors")
    rng = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[torch.rand(tensor.shape, generator=rng) < 0.6] = 0.0
    save_file(tensors, top / "dense" / "model.safetensors", {"format": "pt"})
    for form in ("bitmask", "csr"):
        assert main(["export", str(top / "dense"), "--format", form, "--out", str(top / form)]) == 0
    return top


@pytest.fixture
def copied(folders, tmp_path):
    return Path(shutil.copytree(folders / "dense", tmp_path / "copied"))


def _generate(capsys, folder, *arguments, prompt=PROMPT):
    """(the result, stdout before it, stderr)."""
    capsys.readouterr()
    command = ["generate", str(folder), "--prompt", prompt, "--threads", str(torch.get_num_threads()), "--json"]
    assert main([*command, *arguments]) == 0
    said = capsys.readouterr()
    text, _, last = said.out.rstrip("\n").rpartition("\n")
    return json.loads(last), text, said.err


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("pst-ds generate: ")]
    return line


def _likeliest(folder, prompt, count):
    """The greedy tokens: a whole forward pass for each."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        if token.item() == model.config.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True), ids.shape[1] - start


def test_the_cpu_is_used_when_deepspeed_is_told_so(folders, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for accelerator in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(accelerator, "is_available", lambda: True)
    assert _generate(capsys, folders / "dense", "--max-new-tokens", "2")[0]["device"] == "cpu"


@pytest.mark.parametrize(
    ("name", "options", "sparse"),
    [
        ("dense", [], False),
        ("bitmask", [], True),
        ("bitmask", ["--load-as", "dense"], False),
        ("csr", ["--load-as", "sparse"], True),
        ("csr", [], False),
    ],
)
def test_writes_the_likeliest_tokens(folders, capsys, name, options, sparse):
    expected, tokens = _likeliest(folders / "dense", PROMPT, 12)
    result, text, err = _generate(capsys, folders / name, "--max-new-tokens", "12", *options)
    assert (result["text"], result["new_tokens"]) == (expected, tokens)
    assert text.strip() == expected.strip()
    assert (result["sparse_layers"] > 0) is sparse
    assert result["format"] == name
    assert "prefill: " in err


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_the_native_loop_writes_what_transformers_does(folders, tmp_path, capsys, values):
    options = ["--format", "bitmask", "--values", values, "--group", "row", "--embeddings", values]
    assert main(["export", str(folders / "dense"), *options, "--out", str(tmp_path / "codes")]) == 0
    expected, tokens = _likeliest(tmp_path / "codes", PROMPT, 12)
    result, text, err = _generate(capsys, tmp_path / "codes", "--max-new-tokens", "12")
    assert (result["engine"], result["text"], result["new_tokens"]) == ("native", expected, tokens)
    assert text.strip() == expected.strip()
    assert f"{values}, native" in err
    slow = _generate(capsys, tmp_path / "codes", "--max-new-tokens", "12", "--engine", "torch", "--dtype", "fp32")[0]
    assert (slow["engine"], slow["text"]) == ("torch", expected)
    drawn = [_generate(capsys, tmp_path / "codes", "--temperature", "2", "--seed", s)[0]["text"] for s in "334"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_native_loop_takes_dense_folders_too(folders, capsys):
    result, text, _ = _generate(capsys, folders / "dense", "--max-new-tokens", "3", "--engine", "native")
    assert (result["engine"], result["dtype"], result["text"]) == ("native", "float32", text)
    assert text == _likeliest(folders / "dense", PROMPT, 3)[0]


def test_transformers_goes_on_where_the_native_loop_cannot(folders, tmp_path, capsys, monkeypatch):
    options = ["--format", "bitmask", "--values", "int8"]
    assert main(["export", str(folders / "dense"), *options, "--out", str(tmp_path / "codes")]) == 0
    monkeypatch.setattr("pst_ds.inference.decoder.decoder.MOST_DIFFERENCE", -1.0)
    result, _, err = _generate(capsys, tmp_path / "codes", "--max-new-tokens", "2")
    assert result["engine"] == "torch"
    assert "using transformers instead of the native decoder" in err
    assert "logits differ" in _refused(capsys, tmp_path / "codes", "--prompt", PROMPT, "--engine", "native")


def test_the_native_loop_takes_no_dtype(folders, capsys):
    command = (folders / "dense", "--prompt", PROMPT, "--engine", "native", "--dtype", "bf16", "--load-as", "dense")
    assert "--load-as and --dtype" in _refused(capsys, *command)


def test_bits_of_a_prompt_are_of_the_native_loop(folders, tmp_path, capsys, monkeypatch):
    opened = []
    native = Decoder.from_pretrained
    monkeypatch.setattr(Decoder, "from_pretrained", lambda *a, **options: opened.append(options) or native(*a))
    _generate(capsys, folders / "dense", "--max-new-tokens", "2", "--engine", "native", "--prompt-bits", "8")
    assert [options["prompt_bits"] for options in opened] == [8]
    said = _refused(capsys, folders / "dense", "--prompt", PROMPT, "--prompt-bits", "8")
    assert "Add --engine native" in said


def test_seed_and_temperature(folders, capsys):
    def text(*options):
        return _generate(capsys, folders / "bitmask", "--max-new-tokens", "16", *options)[0]["text"]

    greedy = text()
    drawn = {seed: text("--temperature", "3", "--seed", str(seed)) for seed in range(4)}
    assert len(set(drawn.values())) > 1
    assert text("--temperature", "3", "--seed", "2") == drawn[2]
    assert text("--temperature", "0") == greedy
    assert text("--top-p", "1e-6", "--seed", "5") == greedy  # the likeliest alone is drawn among


def test_a_folder_that_wants_to_draw_does_not_by_default(copied, folders, capsys):
    settings = json.loads((copied / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "top_k": 30}
    (copied / "generation_config.json").write_text(json.dumps(settings))
    expected, _ = _likeliest(folders / "dense", PROMPT, 12)
    assert _generate(capsys, copied, "--max-new-tokens", "12")[0]["text"] == expected


OF_A_FOLDER = [
    {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1}, {"min_p": 0.9}, {"typical_p": 0.1}, {"min_new_tokens": 12},
    {"suppress_tokens": [3, 4, 5, 6]}, {"stop_strings": ["film"]}, {"max_time": 1e-9}, {"use_cache": False},
    {"return_dict_in_generate": True}, {"prompt_lookup_num_tokens": 2},
]  # fmt: skip


@pytest.mark.parametrize("said", OF_A_FOLDER, ids=lambda said: " ".join(said))
def test_what_a_folder_says_of_the_search_does_not_count(copied, folders, capsys, said):
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(settings | said))
    arguments = ("--max-new-tokens", "12")
    expected, _ = _likeliest(folders / "dense", PROMPT, 12)
    assert _generate(capsys, copied, *arguments)[0]["text"] == expected
    drawn = [_generate(capsys, at, *arguments, "--temperature", "2")[0]["text"] for at in (folders / "dense", copied)]
    assert drawn[0] == drawn[1]


def test_the_ends_that_a_folder_names_do_count(copied, folders, capsys):
    whole, _ = _likeliest(folders / "dense", PROMPT, 12)
    ids = AutoTokenizer.from_pretrained(copied)(whole, add_special_tokens=False).input_ids
    settings = json.loads((copied / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], ids[2]]
    (copied / "generation_config.json").write_text(json.dumps(settings))
    assert _generate(capsys, copied, "--max-new-tokens", "12")[0]["new_tokens"] == ids.index(ids[2]) + 1


def test_the_rate_after_the_first_token_is_of_the_others(folders, capsys):
    result, _, err = _generate(capsys, folders / "dense", "--max-new-tokens", "5")
    assert result["new_tokens"] == 5
    assert ", then 4 tokens at " in err
    assert ", then " not in _generate(capsys, folders / "dense", "--max-new-tokens", "1")[2]


def test_stops_where_the_positions_end(folders, capsys):
    prompt = "film " * 20
    tokens = len(AutoTokenizer.from_pretrained(folders / "dense")(prompt).input_ids)
    result, _, err = _generate(capsys, folders / "bitmask", "--max-new-tokens", "100", prompt=prompt)
    assert tokens < 48
    assert result["prompt_tokens"] + result["new_tokens"] <= 48
    assert f"stops after {48 - tokens} tokens: the model has 48 positions" in err
    assert "more than 48 positions" not in err
    assert "48 positions. Shorten it" in _refused(capsys, folders / "bitmask", "--prompt", "film " * 60)


def test_prompt_from_stdin(folders, capsys, monkeypatch):
    expected = _generate(capsys, folders / "dense", "--max-new-tokens", "5")[0]["text"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert _generate(capsys, folders / "dense", "--max-new-tokens", "5", prompt="-")[0]["text"] == expected


def test_chat_uses_the_template(copied, capsys):
    assert "has no chat template" in _refused(capsys, copied, "--prompt", "plot", "--chat")
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{% for m in messages %}the {{ m['content'] }} is{% endfor %}"
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = _generate(capsys, copied, "--chat", "--max-new-tokens", "6", prompt="plot")[0]
    plain = _generate(capsys, copied, "--max-new-tokens", "6", prompt="the plot is")[0]
    assert chat["text"] == plain["text"]


def test_dtype_is_as_asked(folders, capsys):
    assert _generate(capsys, folders / "bitmask", "--max-new-tokens", "2")[0]["dtype"] == "float32"
    assert _generate(capsys, folders / "bitmask", "--max-new-tokens", "2", "--dtype", "bf16")[0]["dtype"] == "bfloat16"


def test_refusals(folders, copied, capsys, tmp_path):
    assert "no such folder" in _refused(capsys, tmp_path / "nothing", "--prompt", "a")
    assert "config.json is missing" in _refused(capsys, tmp_path, "--prompt", "a")
    assert "no causal language model" in _refused(capsys, DATA / "tiny-bert", "--prompt", "a")
    for empty in ("", "  "):
        assert "--prompt is empty" in _refused(capsys, folders / "dense", "--prompt", empty)
    line = _refused(capsys, folders / "dense", "--prompt", "a", "--load-as", "sparse")
    assert "its weights are dense" in line
    assert "pst-ds export" in line
    assert "--temperature" in _refused(capsys, folders / "dense", "--prompt", "a", "--temperature", "-1")
    assert "--top-p" in _refused(capsys, folders / "dense", "--prompt", "a", "--top-p", "1.5")
    line = _refused(capsys, folders / "dense", "--prompt", "a", "--top-p", "1.5")
    assert line == "pst-ds generate: --top-p 1.5: not above 0 and at most 1"
    (copied / "run.toml").write_text("")
    assert "pst-ds export" in _refused(capsys, copied, "--prompt", "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with 'gptq'"),
        ({"vocab_size": 4}, "do not belong together"),
        ({"architectures": None}, "no causal language model"),
        ({"model_type": "no-such-type"}, "config.json"),
    ],
)
def test_refuses_a_config(copied, capsys, change, said):
    config = json.loads((copied / "config.json").read_text()) | change
    (copied / "config.json").write_text(json.dumps(config))
    assert said in _refused(capsys, copied, "--prompt", PROMPT)


def test_refuses_a_folder_without_a_tokenizer(copied, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    assert "no tokenizer" in _refused(capsys, copied, "--prompt", "a")


def test_refuses_damaged_weights(folders, tmp_path, capsys):
    damaged = Path(shutil.copytree(folders / "bitmask", tmp_path / "damaged"))
    file = damaged / "pst_bitmask.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".row_offsets"))
    tensors[name][1] += 1
    save_file(tensors, file, {"format": "pt"})
    assert name.removesuffix(".row_offsets") in _refused(capsys, damaged, "--prompt", "a")
    file.write_bytes(file.read_bytes()[:-8])
    assert str(damaged) in _refused(capsys, damaged, "--prompt", "a")
    shutil.copy(folders / "dense" / "config.json", damaged)
    assert str(damaged) in _refused(capsys, damaged, "--prompt", "a")


def test_rates_are_of_the_prompt_and_of_what_follows(monkeypatch, capsys):
    moments = iter([10.0, 12.0, 12.5, 13.0, 14.0])
    stopwatch = Stopwatch(AutoTokenizer.from_pretrained(DATA / "tiny-llama"), skip_prompt=True)
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    stopwatch.put(torch.arange(3, 11)[None])
    stopwatch.put(torch.tensor([4]))
    assert stopwatch.rates(8)["decode_tokens_per_second"] is None
    for token in (5, 6, 7):
        stopwatch.put(torch.tensor([token]))
    assert stopwatch.rates(8) == {
        "first_token_seconds": 2.0,
        "prefill_tokens_per_second": 4.0,
        "decode_tokens_per_second": 1.5,
    }
