"""A language model whose tokenizer is a sentencepiece model, from text to a verified export; perplexity per byte."""

from __future__ import annotations

import json
import math

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.data.tasks import task_of

pytestmark = pytest.mark.usefixtures("alone")

WORDS = ["naïve", "film", "plot", "warm", "dull", "the", "Zoë", "and", "very", "scene", "tired", "cast", "story"]


def _lines(start, count):
    """Lines with a rule in them, and letters of more than one byte."""
    for i in range(start, start + count):
        yield " ".join(WORDS[(i * i + 3 * j) % len(WORDS)] for j in range(4 + i % 7)) + "."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as those of Llama 2 are: tokenizer.model and the tokenizer's class, no tokenizer.json."""
    folder = tmp_path_factory.mktemp("llama")
    text = folder / "text.txt"
    text.write_text("\n".join(_lines(0, 400)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=64, model_type="bpe",
        character_coverage=1.0, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _run_file(tmp_path, llama):
    for split, lines in (("train", _lines(0, 200)), ("test", _lines(500, 30))):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
output_dir = "{tmp_path}/run"
task = "causal-lm"
[model]
path = "{llama}"
[data]
train = "{tmp_path}/train.txt"
validation = "{tmp_path}/test.txt"
test = "{tmp_path}/test.txt"
max_length = 32
document_mask = false
[train]
num_steps = 6
batch_size = 8
precision = "fp32"
[schedule]
final_sparsity = 0.5
""",
        encoding="utf-8",
    )
    return path


def test_from_text_to_a_verified_export(tmp_path, llama, verb):
    path = _run_file(tmp_path, llama)
    trained = verb("train", str(path), "--quiet")
    evaluated = verb("eval", f"{tmp_path}/run")
    assert evaluated.items() >= trained["metrics"].items()
    assert evaluated["perplexity"] < 64
    out = str(tmp_path / "out")
    assert main(["export", f"{tmp_path}/run", "--out", out]) == 0
    verified = verb("verify", out, "--against", f"{tmp_path}/run")
    assert verified["max_logit_difference"] == verified["differing_predictions"] == verified["differing_weights"] == 0
    assert verified["metrics"] == pytest.approx({name: evaluated[name] for name in verified["metrics"]}, rel=1e-5)
    total, num_tokens, num_bytes = _in_plain_words(out, tmp_path / "test.txt")
    assert evaluated["perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-4)
    assert evaluated["byte_perplexity"] == pytest.approx(math.exp(total / num_bytes), rel=1e-4)
    assert evaluated["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-4)


def _in_plain_words(folder, file):
    """(nats, tokens, bytes of the text) of an export by transformers alone; each sequence by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = file.read_text(encoding="utf-8").splitlines()
    stream = []
    for line in lines:
        stream += ([tokenizer.eos_token_id] if stream else []) + tokenizer(line)["input_ids"]
    total = 0.0
    for start in range(0, len(stream) - 1, 31):
        piece = torch.tensor([stream[start : start + 32]])
        with torch.no_grad():
            total += float(model(input_ids=piece, labels=piece).loss) * (piece.shape[1] - 1)
    return total, len(stream) - 1, sum(len(line.encode("utf-8")) for line in lines)


def test_its_own_special_tokens_are_used_and_the_bytes_are_all_there(tmp_path, llama):
    run, tokenizer = load_run(_run_file(tmp_path, llama)), AutoTokenizer.from_pretrained(llama)
    sequences = task_of(run).load(run.data, "test", tokenizer, [])
    lines = list(_lines(500, 30))
    begins = [1, *(i + 1 for i, token in enumerate(sequences.tokens.tolist()) if token == 2)]
    assert sequences.tokens[0] == 1
    assert [int(sequences.tokens[i]) for i in begins[1:]] == [1] * 29
    assert sequences.predicted_bytes == sum(len(line.encode("utf-8")) for line in lines)
    whole = [piece for line in lines for piece in (line, "</s><s>")][:-1]
    assert tokenizer.decode(sequences.tokens[1:].tolist()).replace(" ", "") == "".join(whole).replace(" ", "")


def test_another_tokenizer_s_bytes_are_the_same(tmp_path, llama):
    """So perplexity per byte can be compared."""
    run = load_run(_run_file(tmp_path, llama))
    other = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    ours, theirs = (
        task_of(run).load(run.data, "test", tokenizer, [])
        for tokenizer in (AutoTokenizer.from_pretrained(llama), other)
    )
    assert ours.tokens.tolist() != theirs.tokens.tolist()
    assert ours.predicted_bytes == theirs.predicted_bytes
