"""Decoder: folders of codes and of floats, sequences side by side, streams, and what it refuses."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pst_ds.hf  # noqa: F401 (transformers reads packed folders)
from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.inference.decoder import Decoder, DecoderError, Sampling
from pst_ds.inference.decoder.decoder import PROMPT_TOKENS
from pst_ds.runtime.native_loop import LEVELS, best_level

DATA = Path(__file__).resolve().parents[2] / "data"
EXPORTS = {
    "dense": None,
    "bitmask": ["--format", "bitmask"],
    "int8": ["--format", "bitmask", "--values", "int8", "--embeddings", "int8"],
    "int4": ["--format", "bitmask", "--values", "int4", "--group", "row", "--embeddings", "int4"],
    "dense int8": ["--format", "dense", "--values", "int8", "--embeddings", "int8"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Llama with 70 % zeros in its projections, in every kind of folder."""
    top = tmp_path_factory.mktemp("models")
    shutil.copytree(DATA / "tiny-llama", top / "dense")
    tensors = load_file(top / "dense" / "model.safetensors")
    rng = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[torch.rand(tensor.shape, generator=rng) < 0.7] = 0.0
    save_file(tensors, top / "dense" / "model.safetensors", {"format": "pt"})
    for name, options in EXPORTS.items():
        if options:
            assert main(["export", str(top / "dense"), *options, "--out", str(top / name)]) == 0
    return top


@pytest.fixture(scope="module")
def ids(folders):
    decoder = Decoder.from_pretrained(folders / "dense", verify=False)
    return torch.randint(3, decoder.vocabulary, (24,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_folder_gives_the_logits_of_transformers(folders, ids, name):
    model = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=ids[None], use_cache=False).logits[0]
    decoder = Decoder.from_pretrained(folders / name, threads=1, cache="fp32")
    got = decoder.forward(ids, all_logits=True)
    assert torch.cosine_similarity(got.double(), expected.double(), dim=-1).min() > 1 - 1e-5


def test_the_model_is_not_kept_in_memory(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "int8", dtype=torch.float32).eval()
    decoder = Decoder.from_model(model, 16)
    layer = weakref.ref(model.model.layers[0].mlp.down_proj)
    del model
    gc.collect()
    assert layer() is None
    assert decoder.forward([3]).isfinite().all()


def test_codes_are_read_in_fewer_bytes(folders):
    size = {name: Decoder.from_pretrained(folders / name, verify=False).weight_bytes for name in EXPORTS}
    assert size["int4"] < size["int8"] <= size["dense int8"] < size["dense"]


def test_tokens_split_over_calls_change_no_bit(folders, ids):
    decoder = Decoder.from_pretrained(folders / "int8", threads=1)
    whole = decoder.forward(ids, all_logits=True)
    decoder.reset(7)
    assert torch.equal(decoder.forward(ids[7:], all_logits=True), whole[7:])
    assert decoder.length == len(ids)
    decoder.reset()
    assert torch.equal(decoder.forward(ids), whole[-1])


def test_more_tokens_than_a_pass_takes(folders, ids):
    decoder = Decoder.from_pretrained(folders / "int8", threads=1)
    whole = decoder.forward(ids, all_logits=True)
    decoder.reset()
    decoder._most = 10
    assert torch.equal(decoder.forward(ids, all_logits=True), whole)
    decoder.reset()
    assert torch.equal(decoder.forward(ids), whole[-1])


def test_prompts_of_8_bits(folders, ids):
    """Near those of 16 bits, where the instructions can; fewer than sixteen tokens are as they were."""
    exact, coarse = (Decoder.from_pretrained(folders / "int8", threads=1, prompt_bits=bits) for bits in (16, 8))
    expected, got = (decoder.forward(ids, all_logits=True) for decoder in (exact, coarse))
    assert torch.cosine_similarity(got.double(), expected.double(), dim=-1).min() > 0.999
    assert torch.equal(got, expected) == (LEVELS[best_level()] not in ("avx512", "amx"))
    exact.reset(), coarse.reset()
    few = ids[: PROMPT_TOKENS - 1]
    assert torch.equal(coarse.forward(few), exact.forward(few))
    assert torch.equal(coarse.forward([4]), exact.forward([4]))


def test_sequences_side_by_side_are_those_alone(folders, ids):
    decoder = Decoder.from_pretrained(folders / "int8", threads=1, sequences=3)
    prompts = [ids[:5].tolist(), ids[5:6].tolist(), ids[6:18].tolist()]
    together = decoder.generate(prompts, 8)
    assert together == [list(decoder.stream(prompt, 8)) for prompt in prompts]
    end = together[1][2]
    stopped = decoder.generate(prompts, 8, end=[end])
    assert stopped[1] == together[1][: together[1].index(end) + 1]
    decoder.reset(sequence=2)
    alone = decoder.forward(ids[:4], sequence=2)
    decoder.reset()
    assert torch.equal(decoder.forward(ids[:4]), alone)


def test_the_stream_is_greedy_and_ends(folders, ids):
    decoder = Decoder.from_pretrained(folders / "int8", context=32, threads=1)
    written = list(decoder.stream(ids[:10], 100))
    assert len(written) == 32 - 10 + 1  # the last token needs no place in the cache
    logits = []
    decoder.reset()
    for token in [*ids[:10].tolist(), *written[:-1]]:
        logits.append(decoder.forward([token]))
    assert [int(row.argmax()) for row in logits[9:]] == written
    assert list(decoder.stream(ids[:10], 100, end=written[:1])) == written[:1]
    assert list(decoder.stream(ids[:10], 3)) == written[:3]


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    assert Sampling().choose(logits).tolist() == [3, 0]
    assert Sampling(1e-45).choose(logits).tolist() == [3, 0]  # which is no normal number in fp32
    assert Sampling(1.0, top_k=1).choose(logits).tolist() == [3, 0]
    assert Sampling(1.0, top_p=0.5).choose(logits).tolist() == [3, 0]
    many = logits[:1].expand(4000, -1)
    drawn = Sampling(2.0).choose(many, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits[0] / 2).softmax(-1), rtol=0, atol=0.03)
    two = Sampling(1.0, top_k=2).choose(many, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert two[:2].sum() == 0
    assert two[2] > 0


def test_a_row_with_many_likely_tokens_keeps_them_next_to_a_certain_row():
    """Rows do not change each other: the nucleus of one may be a single token, that of another most of a vocabulary."""
    size, draws, top_p = 1000, 3000, 0.9
    flat = -torch.arange(float(size)) / size
    certain = torch.full((size,), -50.0).index_fill(0, torch.tensor([7]), 50.0)
    chances = flat.double().softmax(-1)
    nucleus = int((chances.cumsum(-1) < top_p).sum()) + 1
    logits = torch.stack([certain, *[flat] * draws])
    first, *others = Sampling(1.0, top_p=top_p).choose(logits, torch.Generator().manual_seed(0)).tolist()
    assert first == 7
    assert nucleus * 0.9 < len(set(others)) <= nucleus
    assert max(others) < nucleus


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_what_a_call_refuses(folders, ids):
    decoder = Decoder.from_pretrained(folders / "int8", context=16, threads=1)
    decoder.forward(ids[:10])
    for call, said in (
        (lambda: decoder.forward(ids[:7]), "17 tokens do not fit into a context of 16"),
        (lambda: decoder.forward([]), "at least one"),
        (lambda: decoder.forward([decoder.vocabulary]), "tokens are 0 to"),
        (lambda: decoder.forward([-1]), "tokens are 0 to"),
        (lambda: decoder.reset(11), "has 10 tokens"),
        (lambda: decoder.step([1, 2], [0, 0]), "different sequences"),
        (lambda: decoder.generate([[1], [2]], 4), "2 prompts for 1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert decoder.length == 10


def test_what_cannot_be_opened(folders, tmp_path):
    with pytest.raises(DecoderError, match="fp32, bf16, int8"):
        Decoder.from_pretrained(folders / "int8", cache="int4")
    with pytest.raises(DecoderError, match="8 or 16 bits"):
        Decoder.from_pretrained(folders / "int8", prompt_bits=4)
    with pytest.raises(InputError, match="no such folder"):
        Decoder.from_pretrained(tmp_path / "none")


def test_the_context_is_no_longer_than_the_model_has(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "dense")
    decoder = Decoder.from_model(model, 1 << 20, verify=False)
    assert decoder.context == model.config.max_position_embeddings
