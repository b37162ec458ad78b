"""Learned ranks on updates that are known: do the components that a budget keeps lie where the updates are?

A residual network of 18 matrices learns from another that differs from it by updates of rank 2 in 3 of them. U V of a
higher rank, with gates, train in all 18, and a budget of 6 components falls along the schedule. Precision is the share
of the kept components that are one of a planted update's; recall, the share of the planted components that have one.

    python -m tools.bench.planted_ranks --json --seeds 5
"""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, mse_loss

from pst_ds.config.pst import PSTConfig, UpdateGates
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule, learning_rate_factor
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.masks.update_rank_budget import ranks_kept
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.optimizer import pst_optimizer
from tools.bench.timing import conditions, print_json

BLOCKS, WIDTH, BATCH, PLANTED, RANK = 9, 16, 64, 3, 2
MATRICES = 2 * BLOCKS


class Residual(nn.Module):
    """x + down(gelu(up(norm(x)))), block after block, of weights from a seed."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MATRICES))
        for layer in self.layers:
            layer.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + down(gelu(up(layer_norm(x, (WIDTH,)))))
        return x


def teacher_of(seed: int) -> tuple[Residual, list[int]]:
    """Return the network of ``seed`` with updates of rank 2, whose singular values are 1, and the matrices that have
    one."""
    teacher, generator = Residual(seed), torch.Generator().manual_seed(seed + 1000)
    chosen = sorted(random.Random(seed).sample(range(MATRICES), PLANTED))
    for i in chosen:
        left, right = (torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))[0] for _ in range(2))
        teacher.layers[i].weight.data += left @ right.t()
    return teacher, chosen


def found_by(seed: int, gates: UpdateGates, rank: int, num_steps: int) -> dict[str, float]:
    """Train one network; return precision, recall and the last loss."""
    teacher, chosen = teacher_of(seed)
    config = PSTConfig(
        target_modules=r"layers\.\d+", modules_to_save=(), score_rank=0, structured_scores=False, update_rank=rank,
        update_init="lora", update_init_scale=1.0, update_gates=gates, target_rank=PLANTED * RANK / MATRICES, seed=seed,
    )  # fmt: skip
    model = inject_pst(Residual(seed), config)
    optimizer = pst_optimizer(model, update_learning_rate=1e-2, gate_learning_rate=2e-2)
    ranks = CubicSchedule(num_steps=num_steps, final_sparsity=config.dropped_share)
    masks = MaskUpdater(model, OneShotSchedule(0.0), rank_budget=ranks)
    generator = torch.Generator().manual_seed(seed + 2000)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(step, num_steps, 0.06)
        x = torch.randn(BATCH, WIDTH, generator=generator)
        with torch.no_grad():
            wanted = teacher(x)
        loss = mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.after_step(optimizer)
    kept = ranks_kept(model)
    hits = sum(min(kept[i], RANK) for i in chosen)
    return {"precision": hits / sum(kept), "recall": hits / (PLANTED * RANK), "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--seeds", type=int, default=5, help="networks (5)")
    parser.add_argument("--rank", type=int, default=4, help="of every update at the start (4); 2 with --gates layer")
    parser.add_argument("--gates", choices=("component", "layer"), default="component")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (200)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rank, runs = time.process_time(), RANK if args.gates == "layer" else args.rank, []
    for seed in range(args.seeds):
        runs.append(found_by(seed, args.gates, rank, args.steps))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3g}" for name, value in runs[-1].items()), flush=True)
    means = {name: sum(run[name] for run in runs) / len(runs) for name in ("precision", "recall")}
    print(f"mean: precision {means['precision']:.3g}, recall {means['recall']:.3g}")
    if args.json:
        seconds = time.process_time() - started
        print_json({"gates": args.gates, **means, "runs": runs, "cpu_seconds": seconds, "conditions": conditions()})


if __name__ == "__main__":
    main()
