"""Decoders compared with llama.cpp: rates, losses, what is divided by what, and the object that is printed."""

from __future__ import annotations

import json
import os
import sys
from math import exp

import numpy as np
import pytest
import torch

from pst_ds.errors import InputError
from tests.lazy_module import lazy_module
from tools.bench.peers import __main__ as peers
from tools.bench.peers import decoder_files, decoders, engines, predictions
from tools.bench.ranks import medians_in_turn, working

scipy = lazy_module("scipy")

VOCABULARY = 11


class Cache:
    """A decoder that keeps its tokens and gives the same logits whatever they are: token 3 is e times as likely."""

    def __init__(self):
        self.ids: list[int] = []
        self.threads = 0
        self.calls: list[tuple[str, int]] = []

    def use(self, threads):
        self.threads = threads

    def reset(self, length):
        assert length <= len(self.ids)
        self.ids = self.ids[:length]
        self.calls.append(("reset", length))

    def forward(self, ids):
        self.ids += ids
        self.calls.append(("forward", len(ids)))
        return lambda: np.zeros(VOCABULARY, np.float32)

    def step(self, token, position, sequences):
        self.calls.append((token, position, sequences))

    def all_logits(self, ids):
        logits = np.zeros((len(ids), VOCABULARY), np.float32)
        logits[:, 3] = 1.0
        return logits


def test_decoding_feeds_one_token_at_a_time_after_the_prompt():
    cache = Cache()
    assert engines.decode_rate(cache, 1, [1, 2, 3], [4, 5]) > 0
    assert cache.ids == [1, 2, 3, 4, 5]
    assert cache.threads == 1
    assert cache.calls[-3:] == [("reset", 3), ("forward", 1), ("forward", 1)]


def test_eight_sequences_get_each_token():
    cache = Cache()
    assert engines.batch_rate(cache, 1, [1, 2], [3, 4]) > 0
    assert cache.calls == [(1, 0, 8), (2, 1, 8), (3, 2, 8), (3, 2, 8), (4, 3, 8)]


def test_prefill_begins_with_an_empty_cache():
    cache = Cache()
    cache.forward([9, 9])
    assert engines.prefill_rate(cache, 1, [1, 2, 3]) > 0
    assert cache.ids == [1, 2, 3]


def test_a_chunk_has_a_loss_for_each_token_but_the_first():
    loss, _ = predictions.quality(Cache(), 2, [[3, 3, 0], [0, 3]], {})
    norm = np.log(VOCABULARY - 1 + np.e)
    assert loss == pytest.approx((3 * norm - 2) / 3, abs=1e-6)


def test_losses_of_large_logits_are_finite():
    cache = Cache()
    cache.all_logits = lambda ids: np.full((len(ids), VOCABULARY), 3e4, np.float32)
    assert predictions.quality(cache, 2, [[1, 2]], {})[0] == pytest.approx(np.log(VOCABULARY))


def test_divergence_is_from_the_logits_in_the_file(tmp_path):
    """Of each chunk its own, without those after the last token."""
    chunks, rng = [[1, 2, 3], [4, 5, 6]], np.random.default_rng(0)
    logits = {(who, chunk[0]): rng.normal(size=(3, VOCABULARY)) for who in ("reference", "other") for chunk in chunks}

    def engine(who):
        cache = Cache()
        cache.all_logits = lambda ids: logits[who, ids[0]].astype(np.float32)
        return cache

    predictions.write_logits(engine("reference"), 1, chunks, tmp_path / "kept.logits")
    references = {"kept": tmp_path / "kept.logits"}
    p, q = (
        np.concatenate([scipy.special.softmax(logits[who, i][:-1], 1) for i in (1, 4)])
        for who in ("reference", "other")
    )
    found = predictions.quality(engine("other"), 1, chunks, references)[1]["kept"]
    assert found["kl_mean"] == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean(), rel=1e-5)
    assert found["same_top"] == np.mean(p.argmax(1) == q.argmax(1))
    assert predictions.quality(engine("reference"), 1, chunks, references)[1]["kept"]["kl_mean"] == 0.0


class StandIn:
    """pst_ds.inference.decoder's Decoder as the benchmark calls it."""

    opened: tuple = ()

    @classmethod
    def from_pretrained(cls, folder, *, context, threads, verify, prompt_bits, sequences):
        cls.opened = (folder, context, prompt_bits)
        return cls()

    def __init__(self):
        self.length = 0

    def reset(self, length=0):
        self.length = length

    def forward(self, ids, all_logits=False):
        self.length += len(ids)
        logits = torch.arange(VOCABULARY, dtype=torch.float32)
        return logits.expand(len(ids), -1) if all_logits else logits


def test_our_decoder_is_called_by_its_own_names(monkeypatch, tmp_path):
    module = type(sys)("pst_ds.inference.decoder")
    module.Decoder = StandIn
    monkeypatch.setitem(sys.modules, "pst_ds.inference.decoder", module)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    engine = engines.PstDs(tmp_path, context=64)
    assert StandIn.opened == (tmp_path, 64, 16)
    np.testing.assert_array_equal(engine.forward([1, 2])(), np.arange(VOCABULARY))
    assert engine.all_logits([1, 2, 3]).shape == (3, VOCABULARY)
    assert engines.decode_rate(engine, 1, [1, 2], [3]) > 0


def row(contestant, threads, rate, task="decode"):
    return {
        "task": task,
        "threads": threads,
        "tokens": 64,
        "contestant": contestant,
        "tokens_per_second": rate,
        "file_bytes": 10,
        "quality": {"perplexity": None},
    }


def test_a_ratio_is_ours_over_theirs_on_the_same_threads():
    rows = [
        row("dense, llama.cpp Q8_0", 1, 50.0), row("dense, llama.cpp Q4_0", 1, 80.0),
        row("dense, llama.cpp Q4_0", 2, 100.0), row("50 % int8, pst-ds", 1, 100.0),
        row("80 % int8, pst-ds", 1, 120.0), row("80 % int8, pst-ds", 2, 250.0), row("90 % int8, pst-ds", 2, 300.0),
        row("80 % int4, pst-ds", 2, 50.0),
        row("dense, llama.cpp Q4_0", 1, 400.0, "prefill"), row("80 % int8, pst-ds", 1, 800.0, "prefill"),
        row("80 % int8, prompts of 8 bits, pst-ds", 1, 1200.0, "prefill"),
    ]  # fmt: skip
    assert decoders.ratios(rows) == {
        "decode_over_llamacpp": {"50/Q8_0/1": 2.0, "80/Q4_0/1": 1.5, "80/Q4_0/2": 2.5, "90/Q4_0/2": 3.0},
        "decode_int4_over_llamacpp": {"80/Q4_0/2": 0.5},
        "prefill_over_llamacpp": {"80/Q4_0/1": 2.0},
        "prefill_8_bits_over_llamacpp": {"80/Q4_0/1": 3.0},
    }


def test_every_ratio_has_its_contestants():
    ours = {decoders.our_name(share, "int8") for share in decoders.SHARES}
    for places in decoders.RATIOS.values():
        for percent, kind, threads in (place.split("/") for place in places):
            assert decoders.our_name(int(percent) / 100, "int8") in ours
            assert kind in decoder_files.KINDS
            assert threads in ("1", "2")


class Words:
    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


def test_chunks_are_spread_over_the_text():
    text = " ".join(map(str, range(100)))
    chunks = decoder_files.evenly_spaced_chunks(text, Words(), 4, 10)
    assert [chunk[0] for chunk in chunks] == [0, 25, 50, 75]
    assert all(chunk == list(range(chunk[0], chunk[0] + 10)) for chunk in chunks)


def test_a_short_text_is_refused():
    with pytest.raises(InputError, match="the text has 3 tokens; 2 chunks of 2 take 4"):
        decoder_files.evenly_spaced_chunks("1 2 3", Words(), 2, 2)


def test_bytes_are_of_weights_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"12345")
    (tmp_path / "a.safetensors").write_bytes(b"123")
    (tmp_path / "b.safetensors").write_bytes(b"1")
    assert decoder_files.weight_bytes(tmp_path) == 4
    assert decoder_files.weight_bytes(tmp_path / "a.safetensors") == 3


@pytest.fixture
def tiny_llama(tmp_path, monkeypatch):
    """A Llama with random weights and a tokenizer of bytes and one pair of them, since llama.cpp asks for a merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers import decoders as tokens
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).bfloat16()
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), tokens.ByteLevel()
    tokenizer.add_special_tokens(words[:2])
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    asked = []
    monkeypatch.setattr(decoder_files, "smollm2_folder", lambda top, share: asked.append(share) or folder)
    return model, asked


def test_files_are_packed_once(tiny_llama, tmp_path):
    for _ in range(2):
        assert decoder_files.weight_bytes(decoder_files.packed_folder(tmp_path, "int8", 0.0)) > 0
    assert tiny_llama[1] == [0.0]


def test_without_llama_cpp_one_message_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(sys, "argv", ["peers", "--no-encoders", "--decoders", str(tmp_path), "--json"])
    with pytest.raises(SystemExit, match=r"peers: llama.cpp.*pip install 'pst-ds\[peers\]'"):
        peers.main()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def opened_by(name):
    return lambda: Cache()


def count_of(cache, length):
    return len(cache.all_logits(range(length)))


def refuse(cache):
    raise ValueError("no such thing")


def end(cache):
    os._exit(3)


def test_workers_are_separate_processes():
    parent = Cache()
    with working({"a": lambda: parent, "b": opened_by("b")}, threads=1, method="fork") as workers:
        assert medians_in_turn(workers, count_of, 5, repeats=2, rest=0) == {"a": 5, "b": 5}
        workers["a"].ask(engines.prefill_rate, 1, [1, 2])
        with pytest.raises(RuntimeError, match=r"b: (?s:.*)ValueError: no such thing"):
            workers["b"].ask(refuse)
        assert workers["b"].ask(count_of, 2) == 2
    assert parent.ids == []


def test_a_worker_that_cannot_open_says_why():
    def broken():
        raise InputError("not a model")

    with pytest.raises(RuntimeError, match=r"a: (?s:.*)not a model"), working({"a": broken}, 1, method="fork"):
        pass


def test_a_process_that_dies_is_named():
    with (
        working({"a": Cache}, 1, method="fork") as workers,
        pytest.raises(RuntimeError, match="a: the process ended with exit code 3"),
    ):
        workers["a"].ask(end)


def test_it_prints_its_object(tmp_path, monkeypatch, capsys):
    names = ["dense, llama.cpp Q8_0", "50 % int8, pst-ds"]
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    fakes = [decoders.Contestant(name, weights, lambda path, context: Cache()) for name in names]
    monkeypatch.setattr(decoders, "contestants", lambda top: fakes)
    material = decoders.Material([1, 2], [3, 4], [[3, 3, 3]])
    monkeypatch.setattr(decoders, "text_material", lambda *inputs: material)
    monkeypatch.setattr(decoders, "working", lambda openers, threads, preload: working(openers, threads, method="fork"))
    monkeypatch.setattr(engines, "llama_cpp", lambda: None)
    monkeypatch.setattr(peers, "llama_cpp_build", lambda: {"built_for": "tests"})
    options = ["--no-encoders", "--decoders", str(tmp_path), "--threads", "1", "--decoder-repeats", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["peers", *options])
    peers.main()
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert [(r["task"], r["contestant"]) for r in found["rows"]] == [
        (t, n) for t in ("decode", "decode8", "prefill") for n in names
    ]
    assert {r["file_bytes"] for r in found["rows"]} == {4}
    expected = exp(np.log(VOCABULARY - 1 + np.e) - 1)
    assert found["rows"][0]["quality"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert set(found["ratios"]["decode_over_llamacpp"]) == {"50/Q8_0/1"}
    assert found["llama_cpp"] == {"built_for": "tests"}
    assert printed[0].split(" | ")[3:] == ["decode 2, 1 thr.", "decode8 2, 1 thr.", "prefill 2, 1 thr. |"]


def test_llama_cpp_decodes_the_files_that_are_made(tiny_llama, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'pst-ds[peers]'")
    pytest.importorskip("gguf", reason="needs gguf: pip install 'pst-ds[gguf]'")
    ids = [5, 90, 7, 44, 31]
    model = tiny_llama[0].float()
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].numpy()
    for kind in ("BF16", "Q8_0"):
        engine = engines.LlamaCpp(decoder_files.gguf_file(tmp_path, kind), context=64)
        logits = engine.all_logits(ids)
        assert logits.shape == right.shape
        assert np.corrcoef(logits.ravel(), right.ravel())[0, 1] > 0.999
        engine.reset(3)
        engine.forward(ids[3:4])
        last = engine.forward(ids[4:])()
        np.testing.assert_allclose(last, logits[-1], atol=0.02 * np.abs(logits).max())
