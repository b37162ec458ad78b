"""PSTCallback under TRL's trainers: supervised fine-tuning of prose and conversations, DPO, and GRPO."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.schedule import OneShotSchedule
from pst_ds.hf import PSTCallback
from pst_ds.nn.inject import bypassed, inject_pst, pst_layers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.train.one_shot.scripts import prune_pretrained

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: trl)")
pytestmark = pytest.mark.usefixtures("alone")

LLAMA = "tests/data/tiny-llama"
STEPS = 6
SCHEDULE = {"final_sparsity": 0.6, "warmup_fraction": 0.2, "cooldown_fraction": 0.4, "update_interval": 1}
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m.content }}{% if m.role == 'assistant' %}{% generation %}{{ ' </s>' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
WORDS = ["film", "plot", "warm", "dull", "the"]


def _text(number, length=6):
    return " ".join(WORDS[(number * (place + 1)) % 5] for place in range(length))


@pytest.fixture
def parts():
    """A model with PST layers, its tokenizer and its optimizer."""
    torch.manual_seed(0)
    model = inject_pst(AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32), PSTConfig())
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, pst_optimizer(model)


def _arguments(kind, out, **more):
    return kind(
        str(out), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, seed=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, **more,
    )  # fmt: skip


def _check(model, trainer):
    """Every matrix has the zeros of the schedule's end, and the small matrices have trained."""
    history = [entry for entry in trainer.state.log_history if "sparsity/target" in entry]
    assert [entry["sparsity/target"] for entry in history][-1] == 0.6
    assert all(math.isfinite(entry["loss"]) for entry in history)
    layers = pst_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        numel = layer.layout.numel
        assert int((layer.masked_weight() == 0).sum()) == math.floor(0.6 * numel)
    assert any(bool(layer.pst_V.detach().any() and layer.pst_U.detach().any()) for layer in layers.values())


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning_of_prose(parts, tmp_path, packing):
    model, tokenizer, optimizer = parts
    data = Dataset.from_dict({"text": [_text(i) for i in range(32)]})
    trainer = trl.SFTTrainer(
        model, _arguments(trl.SFTConfig, tmp_path, max_length=24, packing=packing), train_dataset=data,
        processing_class=tokenizer, optimizers=(optimizer, None), callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    trainer.train()
    _check(model, trainer)


def test_supervised_fine_tuning_of_what_the_assistant_says(parts, tmp_path):
    model, tokenizer, optimizer = parts
    tokenizer.chat_template = TEMPLATE
    rows = [[{"role": "user", "content": _text(i)}, {"role": "assistant", "content": _text(i + 1)}] for i in range(32)]
    trainer = trl.SFTTrainer(
        model, _arguments(trl.SFTConfig, tmp_path, max_length=32, assistant_only_loss=True),
        train_dataset=Dataset.from_dict({"messages": rows}), processing_class=tokenizer,
        optimizers=(optimizer, None), callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    trainer.train()
    _check(model, trainer)


def test_preferences_against_the_dense_base(parts, tmp_path):
    """DPO loads its reference from the base that the model names: the dense one."""
    model, tokenizer, optimizer = parts
    data = Dataset.from_dict(
        {"prompt": [_text(i) for i in range(32)], "chosen": [" warm film"] * 32, "rejected": [" dull plot"] * 32}
    )
    trainer = trl.DPOTrainer(
        model, args=_arguments(trl.DPOConfig, tmp_path, max_length=24), train_dataset=data,
        processing_class=tokenizer, optimizers=(optimizer, None), callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    assert not pst_layers(trainer.ref_model)
    trainer.train()
    _check(model, trainer)
    ids = torch.tensor([[1, 5, 9, 3]])
    with bypassed(model), torch.no_grad():
        expected = trainer.ref_model(input_ids=ids).logits
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)


def test_rewards_of_what_the_sparse_model_writes(parts, tmp_path):
    model, tokenizer, optimizer = parts
    trainer = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=_arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=6),
        train_dataset=Dataset.from_dict({"prompt": [_text(i) for i in range(32)]}),
        processing_class=tokenizer, optimizers=(optimizer, None), callbacks=[PSTCallback(**SCHEDULE)],
    )  # fmt: skip
    trainer.train()
    _check(model, trainer)


def test_supervised_fine_tuning_of_a_model_that_is_pruned_before_its_first_step(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.pad_token = tokenizer.eos_token
    batches = [tokenizer([_text(number)], return_tensors="pt") for number in range(16)]
    start = PruneConfig(method="alps", samples=16, reconstruct=1, sparsity=0.6)
    folder = prune_pretrained(LLAMA, tmp_path / "start", batches, start, precision="fp32")
    config = PSTConfig(initial_mask="zeros", score_rank=0, structured_scores=False)
    model = inject_pst(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    trainer = trl.SFTTrainer(
        model, _arguments(trl.SFTConfig, tmp_path), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"text": _text(number)} for number in range(32)]),
        optimizers=(pst_optimizer(model), None), callbacks=[PSTCallback(OneShotSchedule(0.6))],
    )  # fmt: skip
    trainer.train()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    for name, layer in pst_layers(model).items():
        weight = pruned.get_parameter(f"{name}.weight")
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.masked_weight() == 0, weight == 0)
