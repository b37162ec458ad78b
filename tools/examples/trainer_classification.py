"""HF Trainer: fine-tune a text classifier and prune it meanwhile. With --deepspeed under any ZeRO stage.

    python tools/examples/trainer_classification.py bert-base-uncased train.jsonl out
    deepspeed tools/examples/trainer_classification.py bert-base-uncased train.jsonl out --deepspeed zero3.json

Each line of train.jsonl has a "text" and a "label". ``out/pst`` gets the trained parameters, ``out/merged`` an ordinary
model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merged import save_merged
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from pst_ds import PSTConfig, inject_pst, print_trainable_parameters, save_pretrained
from pst_ds.hf import PSTCallback, trainer_optimizer


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    # not every transformers 5 has this setting
    order: dict[str, Any] = {"train_sampling_strategy": "sequential"} if asked.in_order else {}
    arguments = TrainingArguments(  # before from_pretrained, which partitions the weights under ZeRO-3
        asked.out,
        max_steps=asked.steps,
        per_device_train_batch_size=asked.batch_size,
        **order,
        deepspeed=asked.deepspeed,
        use_cpu=asked.cpu,
        logging_steps=asked.logging_steps,
        save_steps=asked.save_steps,
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = [json.loads(line) for line in Path(asked.data).read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    data = [
        {**tokenizer(row["text"], truncation=True, max_length=asked.max_length), "labels": labels.index(row["label"])}
        for row in rows
    ]

    model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=len(labels))
    model = inject_pst(model, PSTConfig())  # the classification head is trained in full
    print_trainable_parameters(model)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=trainer_optimizer(model, num_steps=asked.steps),
        callbacks=[PSTCallback(final_sparsity=asked.sparsity)],
    )
    trainer.train(resume_from_checkpoint=asked.resume)

    out = Path(asked.out)
    save_pretrained(model, out / "pst", step=asked.steps)
    if trainer.is_world_process_zero():
        save_merged(
            AutoModelForSequenceClassification, asked.model, out / "pst", out / "merged", num_labels=len(labels)
        )
        tokenizer.save_pretrained(out / "merged")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a pretrained encoder")
    parser.add_argument("data", help="JSONL file")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--sparsity", type=float, default=0.9, help="final sparsity")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32, help="examples per rank and batch")
    parser.add_argument("--max-length", type=int, default=128, help="tokens per example")
    parser.add_argument("--in-order", action="store_true", help="keep the order of the file")
    parser.add_argument("--deepspeed", help="DeepSpeed JSON, without an optimizer")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--resume", help="a checkpoint-N folder to resume from")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
