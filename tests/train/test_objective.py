"""Distillation: the loss against a plain dense model's predictions, and teachers that cannot be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from torch.nn.functional import kl_div, log_softmax

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import bypassed, pst_layers
from pst_ds.parallel.launch import LaunchEnvironment, launch_environment
from pst_ds.train.objective import Objective, load_teacher
from pst_ds.train.run import build, prepare, train_prepared

CAUSAL, CLASSIFY = "tests/data/causal_lm.toml", "tests/data/world_size.toml"


def _prepared(run_file, folder, *overrides):
    run = load_run(run_file, ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides])
    return prepare(run, LaunchEnvironment(0, 1, 0))


def _batch(prepared, count=3):
    examples = prepared.load("train")
    return prepared.task.collate(examples, list(range(count)), prepared.tokenizer)


def _divergence(student, teacher, temperature):
    q, p = (log_softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * float(kl_div(q, p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.25, 2.0)])
def test_the_model_teaches_itself_as_the_dense_one_it_was(tmp_path, weight, temperature):
    from transformers import AutoModelForCausalLM

    settings = [f"distillation.weight={weight}", f"distillation.temperature={temperature}"]
    prepared = _prepared(CAUSAL, tmp_path, *settings)
    engine = build(prepared)
    update_masks(engine.module, 0.7)
    with torch.no_grad():
        for layer in pst_layers(engine.module).values():
            layer.pst_V.normal_(std=0.1)
    batch = _batch(prepared)
    loss = Objective(prepared)(engine, batch)
    dense = AutoModelForCausalLM.from_pretrained("tests/data/tiny-llama", dtype=torch.float32)
    with torch.no_grad():
        student = engine(**batch)
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        teacher = dense(**inputs, use_cache=False)
    rows = batch["labels"][:, 1:] != -100
    expected = _divergence(student.logits[:, :-1][rows], teacher.logits[:, :-1][rows], temperature)
    assert expected > 0.01
    assert float(loss.detach()) == pytest.approx(weight * expected + (1 - weight) * float(student.loss), rel=1e-4)
    engine.backward(loss)
    assert all(bool(layer.pst_A.grad.any() or layer.pst_B.grad.any()) for layer in pst_layers(engine.module).values())
    assert engine.module.training
    assert not any(layer.bypassed for layer in pst_layers(engine.module).values())


def test_an_embedding_with_an_update_is_bypassed_too(tmp_path):
    module = build(_prepared(CLASSIFY, tmp_path, "pst.update_embeddings=['word_embeddings']")).module.eval()
    ids = torch.tensor([[2, 5, 9, 3]])
    before = module(input_ids=ids).logits
    with torch.no_grad():
        for name, param in module.named_parameters():
            if name.endswith(("pst_U", "pst_V")):
                param.normal_()
    assert not torch.allclose(module(input_ids=ids).logits, before)
    with bypassed(module):
        assert torch.equal(module(input_ids=ids).logits, before)


def _train(run_file, folder, *overrides):
    run = load_run(run_file, [f"output_dir={json.dumps(str(folder))}", *overrides])
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


@pytest.mark.thorough
def test_a_folder_teaches_a_classifier(tmp_path):
    from pst_ds.cli.main import main

    _train(CLASSIFY, tmp_path / "dense", "method=dense", "deepspeed_config=", "train.num_steps=6")
    assert main(["export", str(tmp_path / "dense"), "--out", str(tmp_path / "teacher")]) == 0
    teacher = [f'distillation.teacher="{tmp_path / "teacher"}"', "distillation.weight=1.0", "deepspeed_config="]
    settings = [*teacher, "train.num_steps=40", "train.head_learning_rate=0.02", "schedule.final_sparsity=0.1"]
    _train(CLASSIFY, tmp_path / "student", *settings)
    losses = _losses(tmp_path / "student")
    assert losses[-1] < 0.2 * losses[0]  # the head is new; the predictions become the teacher's


@pytest.mark.parametrize(
    ("run_file", "settings", "said"),
    [
        (CLASSIFY, ["distillation.weight=0.5"], "bert.pooler.dense.weight, bert.pooler.dense.bias"),
        (CAUSAL, ["distillation.weight=0.5", "method=dense"], "would train, and the teacher with it"),
        (CAUSAL, ["distillation.weight=0.5", "distillation.teacher=/nowhere"], "'/nowhere' does not exist"),
        (CAUSAL, ["distillation.teacher=/nowhere"], "does nothing with distillation.weight = 0"),
        (CAUSAL, ["distillation.weight=1.5"], "distillation.weight = 1.5 must be in [0, 1]"),
        (CAUSAL, ["distillation.temperature=0.0"], "distillation.temperature = 0.0 must be"),
    ],
)
def test_teachers_that_cannot_be_are_refused(tmp_path, run_file, settings, said):
    with pytest.raises(ConfigError) as error:
        _prepared(run_file, tmp_path, *settings)
    assert said in str(error.value)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", num_labels=3)
    model.save_pretrained(tmp_path / "teacher")
    settings = [f'distillation.teacher="{tmp_path / "teacher"}"', "distillation.weight=0.5", "deepspeed_config="]
    with pytest.raises(ConfigError, match="has the classes LABEL_0, LABEL_1, LABEL_2, and the run"):
        _train(CLASSIFY, tmp_path / "run", *settings)


def _taught(teacher, *overrides):
    return [f'distillation.teacher="{teacher}"', "distillation.weight=0.5", *overrides]


def _llama(folder, model_class="AutoModelForCausalLM", **config):
    """A folder with a random Llama, as tiny-llama but for ``config``."""
    made = transformers.AutoConfig.from_pretrained("tests/data/tiny-llama", **config)
    getattr(transformers, model_class).from_config(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({"vocab_size": 64}, [], "has a vocabulary of 64 tokens, and model.path = 'tests/data/tiny-llama' one of 35"),
        ({"max_position_embeddings": 24}, [], "data.max_length = 32 is more than the 24 positions"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_before_it_is_loaded(tmp_path, config, settings, said):
    folder = tmp_path / "teacher"
    transformers.AutoConfig.from_pretrained("tests/data/tiny-llama", **config).save_pretrained(folder)
    with pytest.raises(ConfigError) as error:
        _prepared(CAUSAL, tmp_path, *_taught(folder, *settings))
    assert said in str(error.value)


def test_an_encoder_teaches_no_language_model(tmp_path):
    with pytest.raises(ConfigError, match=r"distillation\.teacher = .*bert, whose config says is_decoder = false"):
        _prepared(CAUSAL, tmp_path, *_taught("tests/data/tiny-bert"))


def test_a_teacher_of_another_depth_teaches_predictions(tmp_path):
    prepared = _prepared(CAUSAL, tmp_path, *_taught(_llama(tmp_path / "teacher", num_hidden_layers=3)))
    teacher = load_teacher(prepared)
    loss = Objective(prepared, teacher)(build(prepared), _batch(prepared))
    assert bool(loss.isfinite())


def test_a_teacher_keeps_no_keys_and_values(tmp_path):
    prepared = _prepared(CAUSAL, tmp_path, *_taught("tests/data/tiny-llama"))
    teacher = load_teacher(prepared)
    assert teacher(input_ids=_batch(prepared)["input_ids"]).past_key_values is None


def test_a_teacher_without_all_its_weights_is_refused(tmp_path):
    headless = _llama(tmp_path / "headless", "AutoModel")
    other = _llama(tmp_path / "other", vocab_size=64)
    shutil.copy("tests/data/tiny-llama/config.json", other)
    differing = r"has lm_head\.weight of shape \(64, 32\), model\.embed_tokens\.weight .* config\.json gives another"
    for folder, said in ((headless, r"lacks lm_head\.weight, which a LlamaForCausalLM"), (other, differing)):
        prepared = _prepared(CAUSAL, tmp_path, *_taught(folder))
        with pytest.raises(InputError, match=said):
            load_teacher(prepared)


def test_a_decoder_teaches_a_classifier_of_padded_texts(tmp_path):
    """Its config names no padding token, without which transformers takes the last token for the text's."""
    ids = {0: "bad", 1: "good"}
    labels = {"num_labels": 2, "id2label": ids, "label2id": {label: i for i, label in ids.items()}}
    folder = _llama(tmp_path / "teacher", "AutoModelForSequenceClassification", **labels)
    prepared = _prepared(CLASSIFY, tmp_path, "model.path=tests/data/tiny-llama", *_taught(folder))
    teacher = load_teacher(prepared)
    batch = _batch(prepared, 8)
    assert not batch["attention_mask"].all()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for text, mask, logits in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
            alone = plain(input_ids=text[mask.bool()].unsqueeze(0)).logits[0]
            assert torch.allclose(logits, alone, atol=1e-5)


def _with_zeros(folder):
    """tiny-llama, half of every pruned layer zero, and the record that ``pst-ds prune`` leaves."""
    model = transformers.AutoModelForCausalLM.from_pretrained("tests/data/tiny-llama")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "_proj" in name:
                param[param.abs() <= param.abs().median()] = 0.0
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(folder)
    (folder / "pruning.json").write_text("{}")


def test_a_pruned_model_is_not_its_own_teacher(tmp_path):
    _with_zeros(tmp_path / "pruned")
    base = [f'model.path="{tmp_path / "pruned"}"', "schedule.final_sparsity=0.5"]
    zeros = ["method=masked-lora", "pst.initial_mask=zeros"]
    with pytest.raises(ConfigError, match=r"pruning\.json says that it was pruned; name the folder of the dense model"):
        _prepared(CAUSAL, tmp_path, *base, "distillation.weight=0.5")
    with pytest.raises(ConfigError, match=r'own teacher, and with pst\.initial_mask = "zeros" it is already pruned'):
        _prepared(CAUSAL, tmp_path, *base, *zeros, "distillation.weight=0.5")
    (tmp_path / "pruned" / "pruning.json").unlink()
    with pytest.raises(ConfigError, match=r'own teacher, and with pst\.initial_mask = "zeros" it is already pruned'):
        _prepared(CAUSAL, tmp_path, *base, *zeros, "distillation.weight=0.5")
    _prepared(CAUSAL, tmp_path, *base, *zeros, *_taught("tests/data/tiny-llama"))


@pytest.mark.thorough
@pytest.mark.zero3
def test_self_distillation_under_zero3_is_that_of_one_process(run_ranks, tmp_path):
    settings = ["distillation.weight=0.75", "train.num_steps=8"]
    run_ranks(_train, 2, CAUSAL, tmp_path / "zero3", *settings)
    _train(CAUSAL, tmp_path / "local", *settings, "deepspeed_config=")
    assert _losses(tmp_path / "zero3") == pytest.approx(_losses(tmp_path / "local"), abs=1e-3)


@pytest.mark.parametrize("trained", ["false", "true"])
def test_the_loss_in_chunks_is_that_of_whole_logits(tmp_path, trained, monkeypatch):
    """Whichever way; a head that trains is tied to the embedding."""
    settings = ["distillation.weight=0.0", f"pst.modules_to_save={['lm_head'] if trained == 'true' else []}"]
    prepared = _prepared(CAUSAL, tmp_path, *settings)
    found = []
    for in_chunks in (True, False):
        engine = build(prepared)
        objective, batch = Objective(prepared), _batch(prepared)
        assert objective.why_all_logits(engine.module) == ""
        if not in_chunks:
            monkeypatch.setattr(Objective, "_heads", lambda self, module: None)
        loss = objective(engine, batch)
        engine.backward(loss)
        gradients = {name: param.grad for name, param in engine.module.named_parameters() if param.grad is not None}
        found.append((float(loss.detach()), gradients))
    (ours, gradients), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_a_pruned_head_keeps_the_own_loss_of_the_model_and_says_why(tmp_path):
    prepared = _prepared(CAUSAL, tmp_path, 'pst.target_modules=["q_proj", "lm_head"]')
    engine = build(prepared)
    objective, batch = Objective(prepared), _batch(prepared)
    assert "LlamaForCausalLM has a head of class PSTLinear" in objective.why_all_logits(engine.module)
    with torch.no_grad():
        assert torch.equal(objective(engine, batch), engine(**batch).loss)


def test_a_micro_batch_that_predicts_nothing_costs_nothing_whoever_makes_the_loss(tmp_path):
    for number, targets in enumerate(('["q_proj"]', '["q_proj", "lm_head"]')):
        prepared = _prepared(CAUSAL, tmp_path / str(number), f"pst.target_modules={targets}")
        engine = build(prepared)
        batch = _batch(prepared)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        loss = Objective(prepared)(engine, batch)
        engine.backward(loss)
        assert loss == 0.0
        gradients = [param.grad for param in engine.module.parameters() if param.grad is not None]
        assert gradients
        assert not any(gradient.any() or gradient.isnan().any() for gradient in gradients)
