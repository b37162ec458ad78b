"""Branch, train, mix: branches become experts, routers tell their corpora apart, and an interrupted command resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig

from pst_ds.errors import InputError
from tools.quality import texts
from tools.quality.grid import load_grid
from tools.upcycle import __main__ as tool
from tools.upcycle import corpora
from tools.upcycle.mixtral import distances, fitted_routers, loss_and_shares, mixtral_config, mixture
from tools.upcycle.recovered import recovered

from .small_grid import filled

IDS = torch.arange(24).view(2, 12)
HIDDEN, EXPERTS = 32, 4


def llama(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 35, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()


def random_routers():
    return list(torch.randn(2, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_equal_branches_compute_what_one_of_them_does(tied):
    dense = llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    made = mixture([dense] * EXPERTS, random_routers(), 2)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) is tied
    expected = dense(IDS).logits
    torch.testing.assert_close(made(IDS).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert max(distances(made).values()) < 1e-6


@torch.no_grad()
def test_expert_e_is_the_mlp_of_branch_e_and_the_rest_is_the_mean():
    branches, routers = [llama(seed) for seed in range(EXPERTS)], random_routers()
    made = mixture(branches, routers, 2)
    hidden = torch.randn(1, 9, HIDDEN)
    gates, chosen = (hidden @ routers[1].T).softmax(-1).topk(2)
    gates /= gates.sum(-1, keepdim=True)
    outputs = torch.stack([branch.model.layers[1].mlp(hidden) for branch in branches], 2)
    expected = (outputs.gather(2, chosen[..., None].expand(-1, -1, -1, HIDDEN)) * gates[..., None]).sum(2)
    torch.testing.assert_close(made.model.layers[1].mlp(hidden), expected, rtol=1e-4, atol=1e-5)
    mean = torch.stack([branch.model.layers[1].self_attn.q_proj.weight for branch in branches]).mean(0)
    torch.testing.assert_close(made.model.layers[1].self_attn.q_proj.weight, mean)


def test_the_distance_of_two_experts_is_half_their_difference():
    made = mixture([llama()] * EXPERTS, random_routers(), 1)
    stack = made.model.layers[0].mlp.experts.down_proj
    stack.data[0::2], stack.data[1::2] = 0.5, 1.5
    assert distances(made)["model.layers.0.mlp.experts.down_proj"] == pytest.approx(0.5)


def test_fitted_routers_send_a_corpus_to_its_own_expert():
    dense, generator = llama(), torch.Generator().manual_seed(0)
    corpora_of_words = [torch.randint(8 * e, 8 * e + 8, (4, 12), generator=generator) for e in range(EXPERTS)]
    made = mixture([dense] * EXPERTS, fitted_routers(dense, corpora_of_words), 1)
    for expert, rows in enumerate(corpora_of_words):
        loss, shares = loss_and_shares(made, rows)
        assert loss == pytest.approx(dense(rows, labels=rows).loss.item(), rel=1e-4)
        assert shares[:, expert].min() > 0.8
        torch.testing.assert_close(shares.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("config", "experts", "per_token", "message"),
    [
        (LlamaConfig(attention_bias=True), 8, 2, "not a Llama without biases"),
        (MixtralConfig(), 8, 2, "'mixtral': not a Llama"),
        (LlamaConfig(), 2, 3, "there are 2 experts. Choose 1 to 2"),
    ],
)
def test_what_cannot_be_made_a_mixture_is_refused(config, experts, per_token, message):
    with pytest.raises(InputError, match=message):
        mixtral_config(config, experts, per_token)


def test_pieces_of_a_document_are_all_of_it_and_long_enough():
    text = "".join(f"{'word ' * (7 * n % 90)}\n" for n in range(99))
    found = corpora.pieces(text)
    assert "".join(found) == text
    assert all(len(piece.split()) >= corpora.PARAGRAPH_WORDS for piece in found[:-1])
    some = corpora.first_words([text], 700)
    assert 700 <= sum(len(piece.split()) for piece in some) < 700 + 2 * corpora.PARAGRAPH_WORDS
    assert set(some) < set(found)


def test_the_bible_is_trained_on_where_it_is_not_tested(monkeypatch, tmp_path):
    book = " ".join(f"Sentence {n} of the book, `of {n} words'." for n in range(40000))
    (tmp_path / texts.BIBLE_FILE).parent.mkdir()
    (tmp_path / texts.BIBLE_FILE).write_text(f"BOOK = {book!r}")
    monkeypatch.setattr(texts, "PACKAGES", tmp_path)
    train, test = (set("\n".join(part).splitlines()) for part in corpora.bible())
    assert train
    assert test
    assert not train & test
    assert len(train | test - {""}) >= 40000


def test_an_interrupted_command_resumes_and_gives_the_same_mixture(tmp_path, monkeypatch, capsys):
    llama().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(tmp_path / "base")
    words = [json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines()]
    thirds = {name: (words[n::3], words[n:12:3]) for n, name in enumerate(("one", "two", "three"))}
    monkeypatch.setattr(corpora, "CORPORA", {name: lambda third=third: third for name, third in thirds.items()})
    monkeypatch.setattr(corpora.texts, "make", lambda names: None)
    monkeypatch.setattr(tool, "SEQUENCE", 16)

    def run(folder, *more):
        options = ["--steps", "2", "--router-steps", "2", "--rate", "1e-2", "--set", "data.max_length=16"]
        words = ["upcycle", "--base", str(tmp_path / "base"), "--out", str(tmp_path / folder), *options, *more]
        monkeypatch.setattr(sys, "argv", words)
        tool.main()
        return tmp_path / folder / "dense" / "model.safetensors"

    whole = run("whole")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(tool, "mix", stop)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    branches = [tmp_path / "parts/branches" / name / "dense/model.safetensors" for name in thirds]
    before = [branch.stat().st_mtime_ns for branch in branches]
    assert run("parts").read_bytes() == whole.read_bytes()
    assert [branch.stat().st_mtime_ns for branch in branches] == before
    mixed, made = (AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / part) for part in ("mixture", "dense"))
    changed = {name for name, param in made.named_parameters() if not torch.equal(param, mixed.get_parameter(name))}
    assert changed == {f"model.layers.{block}.mlp.gate.weight" for block in range(2)}
    assert min(distances(made).values()) > 0.001
    capsys.readouterr()
    run("whole", "--apart")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["apart:", "loss", *thirds]


def stop(*arguments):
    raise KeyboardInterrupt


def test_what_is_recovered_is_a_share_of_what_one_shot_removal_adds():
    grid = load_grid(tool.GRID)
    added = {"dense": 0.0, "reap": 0.4, "at-once": 0.1}
    lines, _ = filled(grid, lambda cell: 0.5 - added.get(cell.method, 0.2) - 0.02 * cell.seed)
    head, _, *rows = (line.strip("| ").split(" | ") for line in recovered(grid, lines).splitlines())
    assert head[1:9] == list(corpora.CORPORA)
    found = {row[0]: row[1:] for row in rows}
    title = {method.name: method.title for method in grid.methods.values()}
    assert found[title["reap"]] == [*["0.400"] * 9, "0.0% (1)"]
    assert found[title["at-once"]] == [*["0.120"] * 9, "70.0% ± 2.9% (3)"]
    with pytest.raises(InputError, match="'reap' has not run"):
        recovered(grid, {key: line for key, line in lines.items() if "reap" not in line["name"]})
