"""FSDP2 without DeepSpeed or accelerate: continue training a language model on a text file, and prune it meanwhile.

    torchrun --nproc-per-node 8 tools/examples/fsdp2_loop.py HuggingFaceTB/SmolLM2-135M corpus.txt out

``out/pst`` gets the trained parameters, ``out/state`` a checkpoint for --resume on any number of ranks, and
``out/merged`` an ordinary model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from merged import save_merged
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds import (
    CubicSchedule,
    MaskUpdater,
    PSTConfig,
    adapter_checkpoints,
    inject_pst,
    pst_optimizer,
    save_pretrained,
)


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))  # and the process group, and this rank's GPU
    # fp32 shards are the optimizer's masters; bf16 copies are gathered for a pass, and the bytes of masks unchanged
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    inject_pst(model, PSTConfig()).to(device)  # before fully_shard
    adapter_checkpoints(model)
    for block in [*model.model.layers, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    optimizer = pst_optimizer(model, num_steps=asked.steps)
    masks = MaskUpdater(model, CubicSchedule(final_sparsity=asked.sparsity, num_steps=asked.steps))
    if asked.resume:
        _load(asked.resume, model, optimizer, masks)

    batches, ranks = _batches(asked).to(device), mesh.size()
    while masks.step < (asked.stop_at or asked.steps):
        batch = batches[(masks.step * ranks + mesh.get_rank()) % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        new = masks.after_step(optimizer)
        if new and mesh.get_rank() == 0:
            print(f"step {masks.step}: loss {loss.item():.4f}, sparsity {new.sparsity:.4f}, flips {new.flip_rate:.4f}")

    out = Path(asked.out)
    if asked.stop_at:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "masks": masks.state_dict()}, checkpoint_id=out / "state")
    save_pretrained(model, out / "pst", step=masks.step)
    if mesh.get_rank() == 0:
        save_merged(AutoModelForCausalLM, asked.model, out / "pst", out / "merged")


def _load(folder: str, model: nn.Module, optimizer: Optimizer, masks: MaskUpdater) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "masks": masks.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    masks.load_state_dict(state["masks"])


def _batches(asked: argparse.Namespace) -> torch.Tensor:
    """Return the file as batches of sequences of equal length: (batches, sequences, tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokens = torch.tensor(tokenizer(Path(asked.data).read_text(encoding="utf-8"))["input_ids"])
    size = asked.batch_size * asked.max_length
    if len(tokens) < size:
        raise SystemExit(f"{asked.data} has {len(tokens)} tokens, which is less than one batch of {size}")
    return tokens[: len(tokens) // size * size].view(-1, asked.batch_size, asked.max_length)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a pretrained decoder with the layout of Llama")
    parser.add_argument("data", help="text file")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--sparsity", type=float, default=0.7, help="final sparsity")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stop-at", type=int, default=0, help="save and stop after this step")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--resume", help="the folder out/state that --stop-at has saved")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
