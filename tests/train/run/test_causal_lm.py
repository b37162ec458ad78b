"""Causal language models from the pretrained folder to the reloaded export, and their evaluation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.data import EvalConfig
from pst_ds.config.toml import load_run
from pst_ds.data.tasks import causal_lm as tasks
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.launch import LaunchEnvironment, launch_environment
from pst_ds.train.batches import own_batches
from pst_ds.train.evaluate import evaluation_batches, predict
from pst_ds.train.run import build, prepare, train_prepared

RUN_FILE, LLAMA = "tests/data/causal_lm.toml", "tests/data/tiny-llama"
SPARSITY = 0.7
PRUNED = {"llama": 14, "gpt2": 8}
SHORT = {"schedule.final_sparsity": SPARSITY, "schedule.update_interval": 1, "train.num_steps": 6}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _base(family, folder):
    """A pretrained folder; GPT-2's head is its embedding, Llama's is its own."""
    if family == "llama":
        return LLAMA
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    return str(folder)


def _settings(folder, **more):
    settings = {"output_dir": str(folder / "run"), **SHORT, **more}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _train(settings):
    return train_prepared(prepare(load_run(RUN_FILE, settings), launch_environment()), quiet=True)


def _prepared(tmp_path, **more):
    run = load_run(RUN_FILE, _settings(tmp_path, **{"deepspeed_config": "", **more}))
    return prepare(run, LaunchEnvironment(0, 1, 0))


def _lines(folder, event):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == event}


def _plain_perplexity(folder, sequences, dtype=torch.float32):
    """From the mean loss that transformers gives for each document of each sequence by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    total = count = 0
    pieces = (piece for i in range(len(sequences)) for piece in np.split(sequences[i].tokens, sequences[i].starts))
    for piece in pieces:
        ids = torch.tensor(piece.tolist()).unsqueeze(0)
        if len(piece) > 1:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (len(piece) - 1)
            count += len(piece) - 1
    return math.exp(total / count), count


@pytest.mark.zero3
@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False)])
@pytest.mark.few(1)
def test_from_base_to_reloaded_export_on_two_ranks(run_ranks, tmp_path, family, checkpointing, capsys):
    path = _base(family, tmp_path / "base")
    more = {"model.path": path, "model.gradient_checkpointing": checkpointing, "train.precision": "bf16"}
    first, second = run_ranks(_train, 2, _settings(tmp_path, **more))
    assert first == second | {"seconds": first["seconds"]}
    assert first["task"] == "causal-lm"
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run"), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["max_logit_difference"] == 0.0
    assert verified["differing_predictions"] == verified["differing_weights"] == 0
    assert verified["compared_weights"] == PRUNED[family]
    assert verified["metrics"]["perplexity"] == pytest.approx(first["metrics"]["perplexity"], rel=0.02)  # the test file

    entries = {t["name"]: t for t in json.loads((out / "pst_manifest.json").read_text())["tensors"]}
    exported, base = load_file(out / "model.safetensors"), load_file(f"{path}/model.safetensors")
    assert exported.keys() == base.keys() == entries.keys()
    assert sum(entry["origin"] == "pruned" for entry in entries.values()) == PRUNED[family]
    assert ("lm_head.weight" in entries) == (family == "llama")
    for name, entry in entries.items():
        if entry["origin"] == "pruned":
            assert ".layers." in name or ".h." in name
            for matrix in exported[name].chunk(len(entry["pruned_per_matrix"]), dim=entry["matrix_axis"]):
                assert int((matrix == 0).sum()) == math.floor(SPARSITY * matrix.numel()), name
        else:  # the head too
            assert entry["origin"] == "base"
            assert torch.equal(exported[name], base[name]), name
    sequences = _prepared(tmp_path, **more).load("validation")
    plain, count = _plain_perplexity(out, sequences, torch.bfloat16)
    assert count == len(sequences.tokens) - len(sequences.borders)
    assert verified["metrics"]["perplexity"] == pytest.approx(plain, rel=1e-2)


def test_the_export_keeps_tokenizer_and_generation_settings(tmp_path):
    """Nothing is added that language modelling needs no padding for."""
    path = _base("gpt2", tmp_path / "base")
    run_settings = _settings(tmp_path, **{"model.path": path, "deepspeed_config": ""})
    _train(run_settings)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "base" / name).read_text())
    config, before = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "base"))
    assert {key: value for key, value in config.items() if before.get(key) != value} == {}


@pytest.mark.zero3
@pytest.mark.parametrize(("family", "world_sizes"), [("llama", (2, 3)), ("gpt2", (2,))])
@pytest.mark.thorough
def test_losses_and_masks_do_not_depend_on_the_world_size(run_ranks, tmp_path, family, world_sizes):
    more = {"model.path": _base(family, tmp_path / "base"), "eval.interval": 2}
    _train(_settings(tmp_path / "1", **more, **{"deepspeed_config": ""}))
    expected = {event: _lines(tmp_path / "1" / "run", event) for event in ("step", "evaluation", "mask_update")}
    assert (len(expected["step"]), len(expected["evaluation"])) == (6, 3)
    for ranks in world_sizes:
        run_ranks(_train, ranks, _settings(tmp_path / str(ranks), **more))
        for event, key in (("step", "loss"), ("evaluation", "eval/loss"), ("mask_update", "sparsity/actual")):
            found = _lines(tmp_path / str(ranks) / "run", event)
            assert found.keys() == expected[event].keys()
            for step, line in found.items():
                assert line[key] == pytest.approx(expected[event][step][key], abs=1e-5), (ranks, event, step)


def test_an_update_of_fused_layers_is_exported_and_verified(tmp_path, capsys):
    more = {"model.path": _base("gpt2", tmp_path / "base"), "deepspeed_config": "", "method": "masked-lora"}
    rates = {"train.update_learning_rate": 0.05, "train.precision": "fp32"}
    _train(_settings(tmp_path, **more, **rates))
    for kind in ("dense", "bitmask"):
        assert main(["export", str(tmp_path / "run"), "--format", kind, "--out", str(tmp_path / kind)]) == 0
        assert main(["verify", str(tmp_path / kind), "--against", str(tmp_path / "run"), "--json"]) == 0
        verified = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert verified["max_logit_difference"] == verified["differing_weights"] == 0
    base, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "dense"))
    name = next(name for name in found if name.endswith("h.0.attn.c_attn.weight"))
    kept = found[name] != 0
    assert float((~kept).float().mean()) == pytest.approx(SPARSITY, abs=0.01)
    changed = (found[name] != base[name]) & kept
    assert all(part.any() for part in changed.chunk(3, dim=1))


def _outcomes(path, batch_size, count, overrides):
    more = {"model.path": path, "output_dir": "unused", "eval.batch_size": batch_size, **overrides}
    run = load_run(RUN_FILE, [f"{key}={json.dumps(value)}" for key, value in more.items()])
    prepared = prepare(run, launch_environment())
    sequences = prepared.load("validation")
    sequences = sequences if count is None else sequences.first(count)
    engine = build(prepared)
    engine.eval()
    found = predict(engine, prepared, sequences)
    return found, prepared.task.metrics(found, sequences), sequences


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize(("ranks", "batch_size", "count"), [(1, 4, None), (2, 4, None), (3, 16, None), (3, 4, 2)])
def test_evaluation_is_that_of_each_sequence_by_itself_at_any_world_size(run_ranks, ranks, batch_size, count):
    """The dense model before a step: nothing but the evaluation is on trial."""
    dense = {"method": "dense"}
    found = run_ranks(_outcomes, ranks, LLAMA, batch_size, count, dense)
    sequences = found[0][2]
    expected, predicted = _plain_perplexity(LLAMA, sequences)
    if count is None:
        assert sequences.lengths[-1] not in (sequences.length, 1)
        assert predicted == len(sequences.tokens) - len(sequences.borders)
    else:
        assert len(sequences) == count < ranks
    for outcomes, metrics, _ in found:
        assert outcomes.shape == (len(sequences), 1)
        assert outcomes.dtype == np.float64
        assert metrics["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert metrics["loss"] == pytest.approx(math.log(expected), rel=1e-6)
        assert metrics == found[0][1]


def test_sequences_of_a_batch_have_one_length():
    lengths = [7, 7, 7, 7, 7, 3]
    assert evaluation_batches(lengths, 2, mixed=False) == [[5], [0, 1], [2, 3], [4]]
    assert evaluation_batches(lengths, 4, mixed=True) == [[5, 0, 1, 2], [3, 4]]


def test_metrics_are_those_of_their_definitions():
    found = tasks.language_model_metrics(np.array([3.0, 1.0, 2.0]), 4)
    assert found == {"loss": 1.5, "perplexity": pytest.approx(math.e**1.5)}
    assert tasks.language_model_metrics(np.array([1e5]), 2)["perplexity"] == math.inf
    found = tasks.language_model_metrics(np.array([3.0, 1.0, 2.0]), 4, num_bytes=8)
    assert (found["byte_perplexity"], found["bits_per_byte"]) == pytest.approx((math.e**0.75, 0.75 * math.log2(math.e)))
    assert tasks.language_model_metrics(np.array([1e5]), 2, num_bytes=2)["byte_perplexity"] == math.inf
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.9, 0.05, 0.05]]]))
    (loss,) = tasks.CausalLM(EvalConfig()).outcomes(logits, {"labels": torch.tensor([[0, 1, 2]])})[0]
    assert loss == pytest.approx(math.log(4) + math.log(4 / 3))  # 1 after the first, 2 after the second


def test_every_token_of_a_batch_is_counted_and_the_loss_is_its_mean(tmp_path):
    prepared = _prepared(tmp_path, **{"train.gradient_accumulation_steps": 2})
    engine = build(prepared)
    own = next(own_batches(prepared, prepared.load("train"), 0))
    micro_batches = own.micro_batches
    assert own.tokens == 2 * 6 * 32
    assert len(micro_batches) == 2
    predicted = [int((batch["labels"][:, 1:] != -100).sum()) for batch in (one.inputs for one in micro_batches)]
    for one, count in zip(micro_batches, predicted, strict=True):
        batch = one.inputs
        assert batch["input_ids"].shape == (6, 32)
        assert one.share == pytest.approx(count / (sum(predicted) / 2))
        with torch.no_grad():
            output = engine(**batch)
        sums = prepared.task.outcomes(output.logits, batch)
        assert float(output.loss) == pytest.approx(sums.sum() / count, rel=1e-5)


def test_padding_is_not_counted_among_tokens(tmp_path):
    run = load_run("tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={tmp_path}"])
    prepared = prepare(run, LaunchEnvironment(0, 1, 0))
    own = next(own_batches(prepared, prepared.load("train"), 0))
    batch = own.micro_batches[0].inputs
    assert own.tokens == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()


def test_the_best_checkpoint_has_the_lowest_perplexity(tmp_path, monkeypatch):
    scores = {3: 9.0, 4: 5.0, 5: 4.0, 6: 4.5}
    order = iter([1.0, 2.0, *scores.values()])
    monkeypatch.setattr(tasks.CausalLM, "metrics", lambda self, outcomes, examples: {"perplexity": next(order)})
    prepared = _prepared(tmp_path, **{"eval.interval": 1, "schedule.cooldown_fraction": 0.5})
    assert prepared.run.metric == "perplexity"
    assert prepared.run.eval_batch_size == 8
    result = train_prepared(prepared, quiet=True)
    assert result["best_step"] == 5  # masks are final from step 3 on
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "best").state.metrics == {"perplexity": 4.0}


def test_the_head_is_neither_pruned_nor_trained(tmp_path):
    for family in PRUNED:
        prepared = _prepared(tmp_path, **{"model.path": _base(family, tmp_path / "base")})
        model = prepared.resolved.with_settings(prepared.run).shapes.model
        assert len(pst_layers(model)) == PRUNED[family]
        assert "lm_head" not in pst_layers(model)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(n.rpartition(".")[2].startswith("pst_") for n in trained)
        assert trained


@pytest.mark.zero3
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.thorough
def test_a_head_asked_for_is_trained_with_the_embedding_it_is_tied_to(run_ranks, tmp_path, family, capsys):
    path = _base(family, tmp_path / "base")
    more = {"model.path": path, "pst.modules_to_save": ["lm_head"], "train.head_learning_rate": 0.01}
    run_ranks(_train, 2, _settings(tmp_path, **more))
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_logit_difference"] == 0.0
    entries = json.loads((out / "pst_manifest.json").read_text())["tensors"]
    head = {"llama": "lm_head.weight", "gpt2": "transformer.wte.weight"}[family]
    assert [entry["name"] for entry in entries if entry["origin"] == "trained"] == [head]
    exported, base = load_file(out / "model.safetensors"), load_file(f"{path}/model.safetensors")
    assert not torch.equal(exported[head], base[head])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family == "gpt2")


@pytest.mark.thorough
@pytest.mark.zero3
def test_an_updated_embedding_learns_the_end_token_too(run_ranks, tmp_path):
    """No token is taken for padding: the end token has a row like any other, where documents run on behind it."""
    more = {"pst.update_embeddings": ["embed_tokens"], "train.embedding_learning_rate": 0.05}
    more["data.document_mask"] = False
    run_ranks(_train, 2, _settings(tmp_path, **more))
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run")]) == 0
    new, old = (load_file(f"{f}/model.safetensors")["model.embed_tokens.weight"] for f in (out, LLAMA))
    changed = (new != old).any(1)
    assert changed[2]
    assert int(changed.sum()) > 20


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("method", ["dense", "magnitude"])
def test_baselines_train_every_weight_and_export(run_ranks, tmp_path, method, capsys):
    path = _base("gpt2", tmp_path / "base")
    more = {"model.path": path, "method": method, "train.head_learning_rate": 0.01}
    result, _ = run_ranks(_train, 2, _settings(tmp_path, **more))
    base = load_file(f"{path}/model.safetensors")
    assert result["trained_parameters"] == sum(t.numel() for t in base.values())
    losses = [line["loss"] for line in _lines(tmp_path / "run", "step").values()]
    assert losses[-1] < losses[1]
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run"), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["max_logit_difference"] == 0.0
    assert verified["compared_weights"] == (len(base) if method == "dense" else 8)
    weight = load_file(out / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert int((weight == 0).sum()) == (math.floor(SPARSITY * weight.numel()) if method == "magnitude" else 0)


@pytest.mark.thorough
def test_eval_and_plan_speak_of_sequences(tmp_path, capsys):
    one_process = ["--set", "deepspeed_config="]
    assert main(["train", RUN_FILE, "--quiet", *one_process, "--set", f"output_dir={tmp_path}/run"]) == 0
    assert main(["eval", f"{tmp_path}/run", *one_process, "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    evaluated = json.loads(said[-1])
    assert evaluated["perplexity"] == pytest.approx(result["metrics"]["perplexity"])
    assert "(26 sequences): loss " in said[-2]
    assert main(["plan", RUN_FILE, "--ranks", "2", "--json"]) == 0
    said = capsys.readouterr().out
    planned = json.loads(said.splitlines()[-1])
    assert (planned["num_examples"], planned["trained_in_full"]) == (93, [])
    assert planned["trained_parameters"] == result["trained_parameters"]
    assert "20 steps over 93 sequences" in said
    assert "micro-batches of 6 x 32 tokens" in said


def test_verify_finds_another_model(tmp_path, capsys):
    """Weights of the right names and shapes, of a run with another seed."""
    for seed in (1, 2):
        _train(_settings(tmp_path / str(seed), **{"deepspeed_config": "", "seed": seed}))
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "1" / "run"), "--out", out]) == 0
    assert main(["verify", out, "--against", str(tmp_path / "1" / "run"), "--limit", "3"]) == 0
    assert "on 3 sequences of test: 0 of 14 weight tensors differ, 0 predictions differ" in capsys.readouterr().out
    assert main(["verify", out, "--against", str(tmp_path / "2" / "run")]) == 1
    assert "14 of 14 weight tensors differ" in capsys.readouterr().out
