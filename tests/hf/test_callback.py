"""PSTCallback in HF Trainer on one process: masks, logs, small checkpoints, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.errors import InputError
from pst_ds.hf import PSTCallback, trainer_optimizer
from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload
from pst_ds.nn.pretrained import load_pretrained
from pst_ds.parallel.ds_config import DeepSpeedConfigError
from pst_ds.train.mask_update import mask_stats
from pst_ds.train.optimizer import pst_optimizer

STEPS = 6
SCHEDULE = {"final_sparsity": 0.8, "initial_sparsity": 0.2, "warmup_fraction": 0.2, "cooldown_fraction": 0.4}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data():
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    rows = [json.loads(line) for line in Path("tests/data/train.jsonl").read_text().splitlines()]
    options = {"truncation": True, "max_length": 24, "padding": "max_length"}
    return [{**tokenizer(row["text"], **options), "labels": int(row["label"] == "good")} for row in rows]


def _model(base, dtype=torch.float32):
    return inject_pst(AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype), PSTConfig())


def _arguments(out, **settings):
    settings = {"report_to": [], "save_strategy": "no", "use_cpu": True, **settings}
    return TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1, disable_tqdm=True, seed=1, **settings
    )


def _trainer(model, data, out, *, callback=None, optimizer=None, evaluated=False, **settings):
    return Trainer(
        model, _arguments(out, **settings), train_dataset=data, eval_dataset=data[:8] if evaluated else None,
        processing_class=AutoTokenizer.from_pretrained("tests/data/tiny-bert"),
        optimizers=(optimizer or pst_optimizer(model), None), callbacks=[callback or PSTCallback(**SCHEDULE)],
    )  # fmt: skip


def _schedule():
    return CubicSchedule(num_steps=STEPS, **SCHEDULE)


def test_the_trainer_s_logs_have_the_sparsity_of_every_step(base, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = _model(base)
    trainer = _trainer(model, data, tmp_path, report_to=["tensorboard"])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sparsity/target"] for entry in history] == [_schedule().sparsity_at(s) for s in range(1, STEPS + 1)]
    sizes = [layer.layout.numel for layer in pst_layers(model).values()]
    for entry in history:
        zeros = sum(math.floor(entry["sparsity/target"] * size) for size in sizes)
        assert entry["sparsity/actual"] == pytest.approx(zeros / sum(sizes))
    assert history[0]["flip_rate"] == pytest.approx(history[0]["sparsity/actual"])  # those before the first step
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for tag in ("sparsity/target", "sparsity/actual", "flip_rate"):
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{tag}")]
        assert logged == [(entry["step"], pytest.approx(entry[tag])) for entry in history]
    assert not any(layer.scores_train for layer in pst_layers(model).values())


def test_a_callback_that_is_added_later_is_refused(base, data, tmp_path):
    model = _model(base)
    trainer = Trainer(model, _arguments(tmp_path), train_dataset=data, optimizers=(pst_optimizer(model), None))
    trainer.add_callback(PSTCallback(CubicSchedule(num_steps=STEPS, **SCHEDULE)))
    with pytest.raises(InputError, match="PSTCallback came after the Trainer was made: give it in Trainer"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_in_the_bits_of_one_that_was_not_interrupted(base, data, tmp_path, dtype):
    model, resumed = _model(base, dtype), _model(base, dtype)
    _trainer(model, data, tmp_path / "one", save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "one" / "checkpoint-4"
    assert not {"config.json", "model.safetensors", "pytorch_model.bin"} & {path.name for path in folder.iterdir()}
    trainer = _trainer(resumed, data, tmp_path / "two")
    trainer.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    loaded = load_pretrained(AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype), folder)
    assert json.loads((folder / "pst_config.json").read_text())["step"] == 4
    assert mask_stats(loaded).checksum == mask_stats(model).checksum  # masks are fixed from step 4 on


def test_callback_states_may_be_restored_by_the_trainer(base, data, tmp_path):
    model, resumed = _model(base), _model(base)
    _trainer(model, data, tmp_path / "one", save_strategy="steps", save_steps=3).train()
    trainer = _trainer(
        resumed, data, tmp_path / "two", callback=PSTCallback(OneShotSchedule(0.1)),
        restore_callback_states_from_checkpoint=True, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert json.loads((tmp_path / "two" / "checkpoint-6" / "pst_config.json").read_text())["step"] == 6
    assert mask_stats(resumed).checksum == mask_stats(model).checksum


def test_the_best_model_is_the_one_that_is_saved_afterwards(base, data, tmp_path):
    """The optimizer's masters are those of the last step by then."""
    model = _model(base, torch.bfloat16)
    trainer = _trainer(
        model, data, tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, evaluated=True,
        load_best_model_at_end=True, metric_for_best_model="eval_runtime", greater_is_better=False,
    )  # fmt: skip
    trainer.evaluate = lambda **_: {"eval_runtime": float(trainer.state.global_step), "eval_loss": 0.0}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    trainer.save_model(str(tmp_path / "final"))
    best, final = (load_file(tmp_path / name / "pst_model.safetensors") for name in ("checkpoint-2", "final"))
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert torch.equal(param, best[name].to(param.dtype))
            assert torch.equal(final[name], param.float())
    assert all(torch.equal(final[name], best[name]) for name in best if name.endswith("pst_mask_bits"))


def test_gradient_checkpointing_changes_no_bit(base, data, tmp_path):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = _trainer(_model(base), data, tmp_path, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_steps_that_were_skipped_move_no_mask(base, data, tmp_path, monkeypatch):
    """As a loss scaler skips them; the Trainer counts them all the same."""
    from accelerate.optimizer import AcceleratedOptimizer

    calls = iter(range(100))
    skipped = {1, 3}
    answers = {}

    def step_was_skipped(self):
        step = trainer.state.global_step
        return answers.setdefault(step, next(calls) in skipped)

    model = _model(base)
    trainer = _trainer(model, data, tmp_path)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(step_was_skipped))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    applied = [step - sum(answers[s] for s in range(1, step + 1) if s in answers) for step in range(1, STEPS + 1)]
    assert applied[-1] == STEPS - 2
    assert [entry["sparsity/target"] for entry in history] == [_schedule().sparsity_at(s) for s in applied]


def test_a_merged_model_saves_as_an_ordinary_one(base, data, tmp_path):
    model = _model(base)
    _trainer(model, data, tmp_path).train()
    merge_and_unload(model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSTCallback(), "PSTCallback takes a schedule, or the fields of one"),
        (lambda: PSTCallback(OneShotSchedule(0.5), final_sparsity=0.5), "PSTCallback takes a schedule, or the fields"),
        (lambda: PSTCallback(final_sparsity=1.0), r"PSTCallback: final_sparsity = 1\.0 must be in \[0, 1\)"),
        (lambda: PSTCallback(final_sparsty=0.5), "PSTCallback: .*final_sparsty"),
    ],
)
def test_a_callback_without_a_schedule_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_the_trainer_cannot_do_is_refused_before_training(base, data, tmp_path):
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    with pytest.raises(InputError, match="the Trainer's model has no PST layers; call inject_pst"):
        _trainer(plain, data, tmp_path, optimizer=torch.optim.AdamW(plain.parameters()))
    model = _model(base)
    trainer = _trainer(model, data, tmp_path, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(InputError, match=r"named \['None'\], not \['head', 'scores', 'updates'\].*trainer_optimizer"):
        trainer.train()


def test_a_checkpoint_without_the_callback_s_state_is_refused(base, data, tmp_path):
    _trainer(_model(base), data, tmp_path / "one", save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "one" / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["PSTCallback"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="was written without a PSTCallback"):
        _trainer(_model(base), data, tmp_path / "two").train(resume_from_checkpoint=str(folder))


def test_deepspeed_settings_that_masks_cannot_stand_are_refused(base, monkeypatch):
    from pst_ds.hf import callback

    config = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}, "optimizer": {"type": "AdamW"}}
    monkeypatch.setattr(callback, "_deepspeed_config", lambda: config)
    with pytest.raises(DeepSpeedConfigError, match=r"Trainer.s DeepSpeed config: zero_optimization\.zero_quantized"):
        PSTCallback(final_sparsity=0.5).on_init_end(None, None, None, model=_model(base))


def test_the_optimizer_of_the_trainer_s_making_is_the_same(base, data, tmp_path):
    model, other = _model(base), _model(base)
    _trainer(model, data, tmp_path / "one", optimizer=pst_optimizer(model, update_learning_rate=3e-3)).train()
    trainer = Trainer(
        other, _arguments(tmp_path / "two"), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained("tests/data/tiny-bert"),
        optimizer_cls_and_kwargs=trainer_optimizer(other, update_learning_rate=3e-3),
        callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match=r"torch\.float16"):
        trainer_optimizer(_model(base, torch.float16))


@pytest.mark.gpu
def test_loss_scaling_in_fp16(base, data, tmp_path):
    """Half a dozen steps under autocast and a GradScaler, some of which it skips while it finds its scale."""
    model = _model(base)
    trainer = _trainer(model, data, tmp_path, use_cpu=False, fp16=True)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in history)
    applied = trainer.state.stateful_callbacks["PSTCallback"]["attributes"]["step"]
    assert history[-1]["sparsity/target"] == _schedule().sparsity_at(applied)
