"""accelerate: continue training a language model on a text file, and prune it meanwhile.

    accelerate launch tools/examples/accelerate_causal_lm.py HuggingFaceTB/SmolLM2-135M corpus.txt out

A custom loop on one process, DistributedDataParallel or DeepSpeed, as configured by ``accelerate config``. ``out/pst``
gets the trained parameters, ``out/state`` a checkpoint for --resume, ``out/merged`` an ordinary model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from merged import save_merged
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from pst_ds import (
    CubicSchedule,
    MaskUpdater,
    PSTConfig,
    adapter_checkpoints,
    inject_pst,
    print_trainable_parameters,
    pst_optimizer,
    save_pretrained,
)


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    # every optimizer step has the same number of batches, also at the end of the file, so a resumed run can count them
    accumulation = GradientAccumulationPlugin(num_steps=asked.accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation, cpu=asked.cpu)  # before from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    loader: Any = DataLoader(_sequences(tokenizer, asked), batch_size=asked.batch_size)  # type: ignore[arg-type]

    model = inject_pst(AutoModelForCausalLM.from_pretrained(asked.model), PSTConfig())
    if accelerator.is_main_process:
        print_trainable_parameters(model)
    adapter_checkpoints(model)
    optimizer = pst_optimizer(model, num_steps=asked.steps)
    rates = get_linear_schedule_with_warmup(optimizer, 0, asked.steps * accelerator.num_processes)
    model, optimizer, loader, rates = accelerator.prepare(model, optimizer, loader, rates)
    masks = MaskUpdater(model, CubicSchedule(final_sparsity=asked.sparsity, num_steps=asked.steps))
    accelerator.register_for_checkpointing(masks)
    if asked.resume:
        accelerator.load_state(asked.resume)

    model.train()
    for batch in islice(_endless(loader), masks.step * asked.accumulation, None):
        if masks.step >= (asked.stop_at or asked.steps):
            break
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            new = masks.after_step(optimizer)
        if new and accelerator.is_main_process:
            print(f"step {masks.step}: loss {loss.item():.4f}, sparsity {new.sparsity:.4f}, flips {new.flip_rate:.4f}")

    if asked.stop_at:
        accelerator.save_state(asked.out + "/state")
    out = Path(asked.out)
    save_pretrained(model, out / "pst", step=masks.step)
    if accelerator.is_main_process:
        save_merged(AutoModelForCausalLM, asked.model, out / "pst", out / "merged")
        tokenizer.save_pretrained(out / "merged")


def _sequences(tokenizer: Any, asked: argparse.Namespace) -> torch.Tensor:
    """Return the file as sequences of equal length: (sequences, tokens)."""
    tokens = torch.tensor(tokenizer(Path(asked.data).read_text(encoding="utf-8"))["input_ids"])
    if len(tokens) < asked.max_length:
        raise SystemExit(
            f"{asked.data} has {len(tokens)} tokens, which is less than one sequence of --max-length={asked.max_length}"
        )
    return tokens[: len(tokens) // asked.max_length * asked.max_length].view(-1, asked.max_length)


def _endless(loader: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a pretrained decoder")
    parser.add_argument("data", help="text file")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--sparsity", type=float, default=0.7, help="final sparsity")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stop-at", type=int, default=0, help="save and stop after this step")
    parser.add_argument("--accumulation", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per rank and batch")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", help="a folder that --stop-at has saved")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
