"""A plain DeepSpeed loop: fine-tune a text classifier under any ZeRO stage, and prune it meanwhile.

    deepspeed tools/examples/deepspeed_loop.py bert-base-uncased train.jsonl out --config zero3.json

Each line of train.jsonl has a "text" and a "label"; the JSON names no optimizer. ``out/pst`` gets the trained
parameters, ``out/state`` DeepSpeed's checkpoint for --resume, ``out/merged`` an ordinary model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
from merged import save_merged
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

from pst_ds import (
    CubicSchedule,
    MaskUpdater,
    PSTConfig,
    adapter_checkpoints,
    inject_pst,
    pst_parameter_groups,
    save_pretrained,
)


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    deepspeed.init_distributed()
    config = json.loads(Path(asked.config).read_text(encoding="utf-8"))
    partitions = HfDeepSpeedConfig(config)  # from_pretrained looks it up under ZeRO-3, while it is alive
    labels, batches = _batches(asked, config["train_micro_batch_size_per_gpu"])
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    options = {"num_labels": len(labels), "dtype": dtype}
    model = inject_pst(AutoModelForSequenceClassification.from_pretrained(asked.model, **options), PSTConfig())
    adapter_checkpoints(model)
    optimizer = torch.optim.AdamW(pst_parameter_groups(model, num_steps=asked.steps))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if asked.resume and engine.load_checkpoint(asked.resume)[0] is None:
        raise SystemExit(f"--resume={asked.resume} has no checkpoint of DeepSpeed's; name the folder out/state")
    schedule = CubicSchedule(final_sparsity=asked.sparsity, num_steps=asked.steps)
    masks = MaskUpdater(engine, schedule, step=engine.global_steps - engine.skipped_steps)

    engine.train()
    seen = engine.global_steps * engine.gradient_accumulation_steps()
    for batch in islice(batches, seen, None):
        if masks.step >= (asked.stop_at or asked.steps):
            break
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        new = masks.after_step(engine)
        if new and engine.global_rank == 0:
            print(f"step {masks.step}: loss {loss.item():.4f}, sparsity {new.sparsity:.4f}, flips {new.flip_rate:.4f}")

    if asked.stop_at:
        engine.save_checkpoint(f"{asked.out}/state")
    out = Path(asked.out)
    save_pretrained(engine, out / "pst", step=masks.step)
    del partitions
    if engine.global_rank == 0:
        save_merged(AutoModelForSequenceClassification, asked.model, out / "pst", out / "merged", **options)


def _batches(asked: argparse.Namespace, size: int) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the names of the classes, and an endless iterator over this rank's micro-batches."""
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = [json.loads(line) for line in Path(asked.data).read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if len(rows) < world * size:
        raise SystemExit(f"{asked.data} has {len(rows)} rows, but {world} ranks need {world * size} per batch")

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            for start in range(0, len(rows) - world * size + 1, world * size):
                taken = rows[start + rank * size :][:size]
                texts = [row["text"] for row in taken]
                inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
                yield {**inputs, "labels": torch.tensor([labels.index(row["label"]) for row in taken])}

    return labels, endless()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a pretrained encoder")
    parser.add_argument("data", help="JSONL file")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--config", required=True, help="DeepSpeed JSON, without an optimizer")
    parser.add_argument("--sparsity", type=float, default=0.9, help="final sparsity")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stop-at", type=int, default=0, help="save and stop after this step")
    parser.add_argument("--resume", help="the folder out/state that --stop-at has saved")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
