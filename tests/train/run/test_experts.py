"""A run on a model whose experts mostly get no token in a step: the same on 1, 2 and 3 ranks, stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.core.bits import unpack_range
from pst_ds.core.experts.routing import Routing
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.calibration import NORMS_FILE
from pst_ds.train.run import prepare, train_prepared
from tests.train.stopping import stopping

NUM_EXPERTS, STOP_AT = 64, 3


def _save_base(folder: Path) -> None:
    """64 experts, of which each token goes to two."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    for param in model.parameters():
        param.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(folder, base, *more, resume=False, quiet=True):
    """Train in this rank; return the share of the calls of an expert that had no token for it."""
    calls, idle, of = 0, 0, Routing.of

    def counting(index, gates, num_experts):
        nonlocal calls, idle
        routing = of(index, gates, num_experts)
        calls += num_experts
        idle += routing.counts.count(0)
        return routing

    settings = [
        f"output_dir={json.dumps(str(folder))}", f"model.path={json.dumps(str(base))}", "data.max_length=16",
        "train.batch_size=6", "train.num_steps=6", "schedule.update_interval=1", "schedule.cooldown_fraction=0.1",
        "schedule.final_sparsity=0.7",
        "eval.interval=0", "train.score_learning_rate=0.05", "train.update_learning_rate=0.01", *more,
    ]  # fmt: skip
    prepared = prepare(load_run("tests/data/causal_lm.toml", settings), launch_environment())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Routing, "of", counting)
        train_prepared(prepared, resume=resume, quiet=quiet)
    return idle / calls


def _stopped(folder, base, *more):
    with stopping(STOP_AT):
        _train(folder, base, *more)


def _goes_on(folder, base, *more):
    return _train(folder, base, *more, resume=True)


def _lines(folder, event):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["event"] == event}


def _checksums(folder):
    return {step: line["mask_checksum"] for step, line in _lines(folder, "mask_update").items()}


@pytest.mark.zero3
@pytest.mark.thorough
def test_masks_do_not_depend_on_ranks_stops_or_checkpointing_though_most_experts_get_no_token(
    run_ranks, tmp_path, capsys
):
    base = tmp_path / "base"
    _save_base(base)
    for ranks in (1, 2, 3):
        for idle in run_ranks(_train, ranks, tmp_path / str(ranks), base):
            assert idle >= 0.25
    _assert_inspected(tmp_path / "3", capsys)
    run_ranks(_train, 2, tmp_path / "checkpointing", base, "model.gradient_checkpointing=true")
    run_ranks(_stopped, 2, tmp_path / "stopped", base)
    run_ranks(_goes_on, 3, tmp_path / "stopped", base)
    expected, losses = _checksums(tmp_path / "1"), _lines(tmp_path / "1", "step")
    assert len(set(expected.values())) >= 4
    zeros = json.loads((tmp_path / "1" / "result.json").read_text())["expert_zeros"]
    for name in ("2", "3", "checkpointing", "stopped"):
        assert json.loads((tmp_path / name / "result.json").read_text())["expert_zeros"] == zeros
        assert _checksums(tmp_path / name) == expected, name
        for step, line in _lines(tmp_path / name, "step").items():
            assert line["loss"] == pytest.approx(losses[step]["loss"], abs=1e-5), (name, step)


def test_norms_and_tokens_of_experts_are_counted_and_those_without_are_named(tmp_path, capsys):
    """The router never chooses the second half of the experts: their weights are ranked by magnitude."""
    _save_base(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    router = model.model.layers[0].mlp.gate
    router.weight.data[NUM_EXPERTS // 2 :] = 0.0
    router.weight.data[: NUM_EXPERTS // 2] *= 20.0
    router.weight.data[0] = -router.weight.data[1]  # one of the two has a positive logit
    router.weight.data[2] = -router.weight.data[3]
    model.save_pretrained(tmp_path / "base")
    more = ("deepspeed_config=", "pst.magnitude=activation", "train.num_steps=2")
    idle = _train(tmp_path / "run", tmp_path / "base", *more, quiet=False)
    assert idle >= 0.5
    said = capsys.readouterr()
    assert "experts were given no token" in said.out + said.err
    assert ", 62, 63" in said.out + said.err
    for line in _lines(tmp_path / "run", "step").values():
        assert line["expert_tokens/least"] == 0
        assert 32 <= line["expert_tokens/none"] < 64
        assert line["expert_tokens/median"] == 0.0
    norms = load_file(tmp_path / "run" / NORMS_FILE)["model.layers.0.mlp.experts.down_proj"].view(NUM_EXPERTS, -1)
    assert torch.equal(norms[NUM_EXPERTS // 2 :], torch.ones(NUM_EXPERTS // 2, 8))
    torch.testing.assert_close(norms.mean(1), torch.ones(NUM_EXPERTS))
    assert (norms != 1.0).any(1).sum() >= 2
    _assert_inspected(tmp_path / "run", capsys)


def _assert_inspected(run, capsys):
    """Zeros of every expert as the masks have them, and how many of them are in experts of few tokens."""
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    masks = read_checkpoint(run / "checkpoints" / "final").masks
    result = json.loads((run / "result.json").read_text())
    (tokens,) = result["expert_tokens"].values()
    stacks = {layer["name"]: layer for layer in found["layers"] if "expert_zeros" in layer}
    assert len(stacks) == 2
    for name, layer in stacks.items():
        kept = unpack_range(masks[name], layer["weights"], 1, 0, layer["weights"]).view(NUM_EXPERTS, -1)
        assert layer["expert_zeros"] == (1 - kept.int()).sum(1).tolist()
        assert layer["expert_tokens"] == tokens
        assert result["expert_zeros"][name] == layer["expert_zeros"]
    weights = sum(layer["weights"] for layer in stacks.values())
    assert weights == NUM_EXPERTS * (2 * 8 + 8) * 16
