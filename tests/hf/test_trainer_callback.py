"""PSTCallback in HF Trainer on one process: masks, logs, small checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import io
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.checkpoint import adapter as pretrained
from pst_ds.checkpoint.adapter import load_pretrained
from pst_ds.config.pst import PSTConfig
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.errors import InputError
from pst_ds.hf import PSTCallback, trainer_optimizer
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.parallel.ds_config import DeepSpeedConfigError

from .trainers import SCHEDULE, STEPS, pst_arguments, pst_model, pst_schedule, pst_trainer

pytestmark = pytest.mark.usefixtures("alone")


def test_the_trainer_s_logs_have_the_sparsity_of_every_step(base, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = pst_model(base)
    trainer = pst_trainer(model, data, tmp_path, report_to=["tensorboard"])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = [pst_schedule().sparsity_at(step) for step in range(1, STEPS + 1)]
    assert [entry["sparsity/target"] for entry in history] == expected
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


def test_the_trainer_keeps_the_zeros_of_a_pruned_model(base, data, tmp_path):
    pruned = AutoModelForSequenceClassification.from_pretrained(base)
    for layer in pruned.bert.encoder.layer:
        layer.output.dense.weight.data[:, ::2] = 0.0
    model = inject_pst(pruned, PSTConfig(initial_mask="zeros", target_modules=["output.dense"]))
    kept = [layer.weight != 0 for layer in pst_layers(model).values()]
    sparsity = 1.0 - sum(int(of.sum()) for of in kept) / sum(of.numel() for of in kept)
    pst_trainer(model, data, tmp_path, callbacks=[PSTCallback(OneShotSchedule(sparsity))]).train()
    assert all(map(torch.equal, (layer.masked_weight() != 0 for layer in pst_layers(model).values()), kept))


def test_a_callback_that_is_added_later_is_refused(base, data, tmp_path):
    model = pst_model(base)
    trainer = transformers.Trainer(
        model, pst_arguments(tmp_path), train_dataset=data, optimizers=(pst_optimizer(model), None)
    )
    trainer.add_callback(PSTCallback(CubicSchedule(num_steps=STEPS, **SCHEDULE)))
    with pytest.raises(InputError, match="PSTCallback came after the Trainer was made: give it in Trainer"):
        trainer.train()


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_in_the_bits_of_one_that_was_not_interrupted(base, data, tmp_path, dtype):
    model, resumed = pst_model(base, dtype), pst_model(base, dtype)
    pst_trainer(model, data, tmp_path / "one", save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "one" / "checkpoint-4"
    assert not {"config.json", "model.safetensors", "pytorch_model.bin"} & {path.name for path in folder.iterdir()}
    trainer = pst_trainer(resumed, data, tmp_path / "two")
    trainer.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    loaded = load_pretrained(AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype), folder)
    assert json.loads((folder / "pst_config.json").read_text())["step"] == 4
    assert mask_stats(loaded).checksum == mask_stats(model).checksum  # masks are fixed from step 4 on


@pytest.mark.thorough
def test_callback_states_may_be_restored_by_the_trainer(base, data, tmp_path):
    model, resumed = pst_model(base), pst_model(base)
    pst_trainer(model, data, tmp_path / "one", save_strategy="steps", save_steps=3).train()
    trainer = pst_trainer(
        resumed, data, tmp_path / "two", callbacks=[PSTCallback(final_sparsity=0.1)],
        restore_callback_states_from_checkpoint=True, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert json.loads((tmp_path / "two" / "checkpoint-6" / "pst_config.json").read_text())["step"] == 6
    assert mask_stats(resumed).checksum == mask_stats(model).checksum


@pytest.mark.thorough
def test_a_second_training_of_the_same_model_trains_its_scores_again(base, data, tmp_path):
    model = pst_model(base)
    trainer = pst_trainer(model, data, tmp_path)
    trainer.train()
    scores = {name: value.clone() for name, value in model.named_parameters() if name.endswith("pst_R")}
    with pytest.warns(UserWarning, match=r"sparsity of 0\.8, and the schedule starts at 0\.2: pruned weights"):
        trainer.train()
    assert scores
    assert not any(torch.equal(value, model.get_parameter(name)) for name, value in scores.items())


def test_a_subclass_of_the_cubic_schedule_keeps_its_ramp(base, data, tmp_path):
    class Linear(CubicSchedule):
        def sparsity_at(self, step):
            return 0.6 * min(1.0, step / STEPS)

    callback = PSTCallback(Linear(final_sparsity=0.6, num_steps=STEPS, warmup_fraction=0.0, cooldown_fraction=0.0))
    trainer = pst_trainer(pst_model(base), data, tmp_path, callbacks=[callback])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sparsity/target"] for entry in history] == [0.6 * step / STEPS for step in range(1, STEPS + 1)]


@pytest.mark.few(1)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copy_of_the_model_saves_its_own_adapter_state(base, data, tmp_path, way):
    model = pst_model(base)
    pst_trainer(model, data, tmp_path).train()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        other.classifier.bias.fill_(7.0)
    other.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "pst_config.json").read_text())["step"] == STEPS
    assert load_file(tmp_path / "copy" / "pst_model.safetensors")["classifier.bias"].tolist() == [7.0, 7.0]


def test_a_node_s_own_main_process_saves_what_rank_0_does(base, data, tmp_path, monkeypatch):
    """As save_on_each_node has it."""
    model = pst_model(base)
    pst_trainer(model, data, tmp_path).train()
    model.save_pretrained(tmp_path / "rank 0", is_main_process=True)
    monkeypatch.setattr(pretrained, "is_main", lambda: False)
    model.save_pretrained(tmp_path / "rank 8", is_main_process=True)
    model.save_pretrained(tmp_path / "rank 9", is_main_process=False)
    files = [(tmp_path / name / "pst_model.safetensors").read_bytes() for name in ("rank 0", "rank 8")]
    assert files[0] == files[1]
    assert not (tmp_path / "rank 9").exists()


@pytest.mark.thorough
def test_gradient_checkpointing_changes_no_bit(base, data, tmp_path):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = pst_trainer(pst_model(base), data, tmp_path, **settings)
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

    model = pst_model(base)
    trainer = pst_trainer(model, data, tmp_path)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(step_was_skipped))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    applied = [step - sum(answers[s] for s in range(1, step + 1) if s in answers) for step in range(1, STEPS + 1)]
    assert applied[-1] == STEPS - 2
    assert [entry["sparsity/target"] for entry in history] == [pst_schedule().sparsity_at(s) for s in applied]


def test_a_merged_model_saves_as_an_ordinary_one(base, data, tmp_path):
    model = pst_model(base)
    pst_trainer(model, data, tmp_path).train()
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
    with pytest.raises(InputError, match="this BertForSequenceClassification has no PST layers; call inject_pst"):
        pst_trainer(plain, data, tmp_path, optimizer=torch.optim.AdamW(plain.parameters()))
    model = pst_model(base)
    trainer = pst_trainer(model, data, tmp_path, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(InputError, match=r"named \['None'\], not \['head', 'scores', 'updates'\].*trainer_optimizer"):
        trainer.train()


@pytest.mark.thorough
def test_an_optimizer_of_another_model_is_refused(base, data, tmp_path):
    model, other = pst_model(base), pst_model(base)
    trainer = transformers.Trainer(
        model, pst_arguments(tmp_path), train_dataset=data, optimizer_cls_and_kwargs=trainer_optimizer(other),
        callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"trainer_optimizer\(model\) was given another model than the Trainer"):
        trainer.train()
    trainer = pst_trainer(model, data, tmp_path, optimizer=pst_optimizer(other))
    with pytest.raises(InputError, match=r"the optimizer does not hold bert\..*, which is trained: it was made"):
        trainer.train()


def test_a_model_that_is_made_anew_for_training_is_refused(base, data, tmp_path):
    trainer = transformers.Trainer(
        args=pst_arguments(tmp_path), train_dataset=data, model_init=lambda: pst_model(base),
        callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"not the one that it was made with\. model_init, and hyperparameter_search"):
        trainer.train()


def test_a_schedule_that_a_checkpoint_cannot_hold_is_refused_by_name(base, data, tmp_path):
    callbacks, restores = [PSTCallback(OneShotSchedule(0.1))], {"restore_callback_states_from_checkpoint": True}
    with pytest.raises(InputError, match=r"restore_callback_states.* = True .* no OneShotSchedule; leave"):
        pst_trainer(pst_model(base), data, tmp_path, callbacks=callbacks, **restores)


def test_a_model_with_pst_in_a_part_is_refused(base, data, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base)
    inject_pst(model.bert, PSTConfig())
    with pytest.raises(
        InputError, match=r"a part of this BertForSequenceClassification, .* name the part by target_mo"
    ):
        pst_trainer(model, data, tmp_path)


@pytest.mark.thorough
def test_a_checkpoint_without_the_callback_s_state_is_refused(base, data, tmp_path):
    pst_trainer(pst_model(base), data, tmp_path / "one", save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "one" / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["PSTCallback"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="was written without a PSTCallback"):
        pst_trainer(pst_model(base), data, tmp_path / "two").train(resume_from_checkpoint=str(folder))


def test_deepspeed_settings_that_masks_cannot_stand_are_refused(base, monkeypatch):
    from pst_ds.hf import trainer_callback as callback

    config = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}, "optimizer": {"type": "AdamW"}}
    monkeypatch.setattr(callback, "_deepspeed_config", lambda: config)
    with pytest.raises(DeepSpeedConfigError, match=r"Trainer.s DeepSpeed config: zero_optimization\.zero_quantized"):
        PSTCallback(final_sparsity=0.5).on_init_end(None, None, None, model=pst_model(base))


@pytest.mark.thorough
def test_the_optimizer_of_the_trainer_s_making_is_the_same(base, data, tmp_path):
    model, other = pst_model(base), pst_model(base)
    pst_trainer(model, data, tmp_path / "one", optimizer=pst_optimizer(model, update_learning_rate=3e-3)).train()
    trainer = transformers.Trainer(
        other, pst_arguments(tmp_path / "two"), train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained("tests/data/tiny-bert"),
        optimizer_cls_and_kwargs=trainer_optimizer(other, update_learning_rate=3e-3),
        callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match=r"torch\.float16"):
        trainer_optimizer(pst_model(base, torch.float16))


@pytest.mark.gpu
def test_loss_scaling_in_fp16(base, data, tmp_path):
    """Half a dozen steps under autocast and a GradScaler, some of which it skips while it finds its scale."""
    model = pst_model(base)
    trainer = pst_trainer(model, data, tmp_path, use_cpu=False, fp16=True)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in history)
    applied = trainer.state.stateful_callbacks["PSTCallback"]["attributes"]["step"]
    assert history[-1]["sparsity/target"] == pst_schedule().sparsity_at(applied)
