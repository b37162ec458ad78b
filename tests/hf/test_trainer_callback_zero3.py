"""HF Trainer under DeepSpeed on two ranks: masks, checkpoints without the frozen base, and resuming from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pst_ds import PSTConfig, inject_pst, load_pretrained
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import sharding

pytestmark = pytest.mark.zero3
STEPS, SAVED = 6, 4


def _config(stage, gather):
    section = {"stage": stage, "stage3_param_persistence_threshold": 64, "reduce_bucket_size": 1 << 16}
    if stage == 3:
        section["stage3_gather_16bit_weights_on_model_save"] = gather
    return {
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": section,
    }  # fmt: skip


def _trainer(folder, out, stage, *, gather=False, precision="fp32", **settings):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from pst_ds.hf import PSTCallback, trainer_optimizer

    arguments = TrainingArguments(
        str(out), deepspeed=_config(stage, gather), use_cpu=True, bf16=precision == "bf16", max_steps=STEPS,
        per_device_train_batch_size=4, logging_steps=1, report_to=[], disable_tqdm=True, seed=5,
        **{"save_steps": SAVED, **settings},
    )  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = inject_pst(AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype), PSTConfig())
    assert any(sharding.is_partitioned(p) for p in model.parameters()) == (stage == 3)
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    rows = [json.loads(line) for line in Path("tests/data/train.jsonl").read_text().splitlines()]
    data = [{**tokenizer(r["text"], truncation=True, max_length=24), "labels": int(r["label"] == "good")} for r in rows]
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], processing_class=tokenizer,
        optimizer_cls_and_kwargs=trainer_optimizer(model),
        callbacks=[PSTCallback(final_sparsity=0.8, initial_sparsity=0.2, cooldown_fraction=0.2)],
    )  # fmt: skip


def _trained(trainer):
    """Everything that training changed, whole, and the masks' checksum."""
    model = trainer.model
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    values = dict(zip(params, sharding.fp32_masters(list(params.values())), strict=True))
    return {name: value.clone() for name, value in values.items()}, mask_stats(model).checksum


def _train_and_resume(folder, out, stage, gather, precision):
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # accelerate asks for it
    trainer = _trainer(folder, out, stage, gather=gather, precision=precision)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    whole = _trained(trainer)
    history = trainer.state.log_history
    again = _trainer(folder, out / "again", stage, gather=gather, precision=precision)
    again.train(resume_from_checkpoint=str(out / f"checkpoint-{SAVED}"))
    resumed = _trained(again)
    assert resumed[1] == whole[1]
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    return whole, [entry.get("sparsity/actual") for entry in history if "loss" in entry]


def _keys(value):
    """Every string key of nested dicts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from [key] if isinstance(key, str) else []
            yield from _keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _keys(inner)


def _names_in_files(folder):
    """Every name of a tensor, or whatever else is named, in all files of a checkpoint."""
    names = set()
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
        elif path.suffix in (".pt", ".bin", ".pth") and "training_args" not in path.name:
            names |= set(_keys(torch.load(path, weights_only=False)))
    return names


@pytest.mark.parametrize(
    ("stage", "gather", "precision"), [(3, False, "bf16"), (3, True, "fp32"), (2, False, "bf16"), (0, False, "fp32")]
)
@pytest.mark.few(1)
def test_checkpoints_are_small_and_resume_to_the_same_bits(run_ranks, tmp_path, stage, gather, precision):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert")
    base.save_pretrained(tmp_path / "base")
    results = run_ranks(_train_and_resume, 2, tmp_path / "base", tmp_path, stage, gather, precision)
    assert results[0][0][1] == results[1][0][1]
    (values, checksum), sparsities = results[0]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == pytest.approx(0.8, abs=1e-3)

    folder = tmp_path / f"checkpoint-{STEPS}"
    frozen = {name for name, _ in base.named_parameters() if not name.startswith(("classifier", "bert.pooler"))}
    assert frozen & _names_in_files(folder) == set()
    assert {"config.json", "model.safetensors"} & {path.name for path in folder.iterdir()} == set()
    with pytest.raises(ValueError, match="model_type"):
        AutoModelForSequenceClassification.from_pretrained(folder)

    model = load_pretrained(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), folder)
    assert mask_stats(model).checksum == checksum
    assert all(torch.equal(param, values[name]) for name, param in model.named_parameters() if param.requires_grad)
    assert not any(layer.scores_train for layer in pst_layers(model).values())


def _train_to_the_best(folder, out, stage):
    """Every evaluation is worse than the one before."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    trainer = _trainer(
        folder, out, stage, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, save_total_limit=2,
    )  # fmt: skip
    trainer.evaluate = lambda **_: {"eval_loss": float(trainer.state.global_step)}
    trainer.train()
    trainer.save_model(str(out / "final"))
    return trainer.state.best_metric, trainer.state.best_model_checkpoint, mask_stats(trainer.model).checksum


@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.thorough
def test_the_best_model_is_one_of_the_final_sparsity(run_ranks, tmp_path, stage):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert").save_pretrained(tmp_path / "base")
    results = run_ranks(_train_to_the_best, 2, tmp_path / "base", tmp_path, stage)
    best = tmp_path / f"checkpoint-{STEPS - 1}"  # the ramp's end
    assert results[0] == results[1]
    assert results[0][:2] == (STEPS - 1, str(best))
    model = load_pretrained(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), best)
    assert mask_stats(model).checksum == results[0][2]
    assert mask_stats(model).sparsity == pytest.approx(0.8, abs=1e-3)
    if stage == 2:  # under ZeRO-3 save_model gathers nothing
        assert json.loads((tmp_path / "final" / "pst_config.json").read_text())["step"] == STEPS - 1
