"""A dense model as a mixture of experts: it computes the same, and its run file tells the copies apart."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from pst_ds.cli.main import main as pst_ds
from pst_ds.errors import InputError
from tools.upcycle import __main__ as tool
from tools.upcycle.mixtral import apart, average_experts, loss_of, mixtral_config, token_shares, upcycled

IDS = torch.arange(24).view(2, 12)


def llama(**more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 35, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("experts", "per_token", "uniform"), [(8, 2, False), (8, 2, True), (3, 3, False), (2, 1, False)]
)
@torch.no_grad()
def test_copies_compute_what_the_dense_model_does_whatever_the_router_says(tied, experts, per_token, uniform):
    rotation = {"rope_type": "default", "rope_theta": 5000.0}
    dense = llama(tie_word_embeddings=tied, rope_parameters=rotation)
    made = upcycled(dense, experts, per_token)
    assert isinstance(made, MixtralForCausalLM)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) is tied
    assert sum(p.numel() for p in made.model.layers[0].mlp.experts.parameters()) == experts * 3 * 32 * 48
    if uniform:
        for block in made.model.layers:
            block.mlp.gate.weight.zero_()
    expected = dense(IDS).logits
    torch.testing.assert_close(made(IDS).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert max(apart(made).values()) < 1e-6


def test_routers_spread_the_tokens_and_depend_on_the_seed_alone():
    one, same, other = (upcycled(llama(), 8, 2, seed).model.layers[1].mlp.gate.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    chosen = upcycled(llama(), 8, 2).model.layers[0].mlp.gate(torch.randn(200, 32))[2]
    assert chosen.unique().numel() == 8


def test_experts_are_apart_by_what_differs_from_their_mean():
    made = upcycled(llama(), 2, 1)
    stack = made.model.layers[0].mlp.experts.down_proj
    stack.data[0], stack.data[1] = 0.5, 1.5
    assert apart(made)["model.layers.0.mlp.experts.down_proj"] == pytest.approx(0.5)


@torch.no_grad()
def test_averaged_experts_compute_what_their_mean_does():
    made, start = upcycled(llama(), 4, 2), upcycled(llama(), 4, 2)
    expected = torch.nn.functional.cross_entropy(start(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    for stack in (made.model.layers[1].mlp.experts.down_proj, made.model.layers[0].mlp.experts.gate_up_proj):
        apart_by = torch.randn_like(stack[:2])
        stack[:2] += apart_by
        stack[2:] -= apart_by
    assert loss_of(made, IDS) != pytest.approx(float(expected), rel=1e-3)
    average_experts(made)
    assert max(apart(made).values()) == 0.0
    assert loss_of(made, IDS) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_shares_of_tokens_are_those_that_the_router_chose():
    made = upcycled(llama(), 4, 2)
    for block in made.model.layers:
        block.mlp.gate.weight.zero_()  # all alike: the same two for every token
    shares = token_shares(made, IDS)
    assert list(shares) == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert [sorted(row) for row in shares.values()] == [[0.0, 0.0, 0.5, 0.5]] * 2
    spread = token_shares(upcycled(llama(), 4, 2), IDS)["model.layers.1.mlp.gate"]
    assert sum(spread) == pytest.approx(1.0)
    assert len([share for share in spread if share]) > 2


@pytest.mark.parametrize(
    ("config", "experts", "per_token", "message"),
    [
        (LlamaConfig(attention_bias=True), 8, 2, "of a Llama without biases"),
        (MixtralForCausalLM.config_class(), 8, 2, "and this is mixtral"),
        (LlamaConfig(), 2, 3, "a token goes to 3 of 2 experts; take 1 to 2"),
    ],
)
def test_what_cannot_be_made_a_mixture_is_refused(config, experts, per_token, message):
    with pytest.raises(InputError, match=message):
        mixtral_config(config, experts, per_token)


def test_the_run_file_trains_the_copies_apart(tmp_path, monkeypatch, capsys):
    llama().save_pretrained(tmp_path / "base")  # whose widths torch's grouped product takes in bf16
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(sys, "argv", ["upcycle", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "start")])
    tool.main()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert (start.config.num_local_experts, start.dtype) == (4, torch.bfloat16)
    text = Path("tools/upcycle/run.toml").read_text(encoding="utf-8")
    assert text.count("[[data.sources]]") == len(tool.CORPORA)
    data = Path("tests/data").resolve()
    text = re.sub(r'"runs/quality/data/[^"]*"', f'"{data}/train.jsonl"', text)
    run_file = tmp_path / "run.toml"
    run_file.write_text(text.replace('"runs/upcycled/', f'"{tmp_path}/'), encoding="utf-8")
    settings = ["data.max_length=32", "train.num_steps=3", "train.head_learning_rate=1e-2"]
    assert pst_ds(["train", str(run_file), "--quiet", *(part for one in settings for part in ("--set", one))]) == 0
    assert pst_ds(["export", str(tmp_path / "run"), "--out", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    (tmp_path / "text.txt").write_text("a film of films and no more. " * 200, encoding="utf-8")
    text = ["--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", ["upcycle", "--apart", str(tmp_path / "dense"), *text])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    distances = [float(line.rpartition(" ")[2]) for line in lines[:4]]
    assert min(distances) > 0.001
    assert re.fullmatch(r"loss \d\.\d{4}, with every expert the mean of its stack \d\.\d{4}", lines.pop())
    shares = [[float(number) for number in line.split(" ")[1:5]] for line in lines[4:]]
    assert [sum(row) for row in shares] == pytest.approx([1.0, 1.0], abs=0.005)
