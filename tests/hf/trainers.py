"""Trainers of a tiny model with PSTCallback, on one process."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.config.pst import PSTConfig
from pst_ds.core.schedule import CubicSchedule
from pst_ds.hf import PSTCallback
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.optimizer import pst_optimizer

STEPS = 6
SCHEDULE = {"final_sparsity": 0.8, "initial_sparsity": 0.2, "warmup_fraction": 0.2, "cooldown_fraction": 0.4}


def pst_model(base, dtype=torch.float32):
    return inject_pst(AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype), PSTConfig())


def pst_arguments(out, **settings):
    settings = {"report_to": [], "save_strategy": "no", "use_cpu": True, **settings}
    return transformers.TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1, disable_tqdm=True, seed=1, **settings
    )


def pst_trainer(model, data, out, *, callbacks=None, optimizer=None, evaluated=False, **settings):
    return transformers.Trainer(
        model, pst_arguments(out, **settings), train_dataset=data, eval_dataset=data[:8] if evaluated else None,
        processing_class=AutoTokenizer.from_pretrained("tests/data/tiny-bert"),
        optimizers=(optimizer or pst_optimizer(model), None), callbacks=callbacks or [PSTCallback(**SCHEDULE)],
    )  # fmt: skip


def pst_schedule():
    return CubicSchedule(num_steps=STEPS, **SCHEDULE)
