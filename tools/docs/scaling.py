"""Write the tables of docs/scaling.md from pst_ds/planning/memory.py and pst_ds/planning/time.py."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pst_ds.core.bits import shard_bytes
from pst_ds.core.layout import WeightLayout
from pst_ds.parallel.ds_config import auto_reduce_bucket
from pst_ds.planning.memory import (
    MatrixGroup,
    MemoryPlan,
    ModelNumbers,
    ModuleNumbers,
    TensorGroup,
    ZeroSettings,
    layer_work_bytes,
    llama_activation_bytes,
    memory_plan,
)
from pst_ds.planning.time import MACHINES, Batch, time_plan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RANK = 8
TOKENS = 4096
WORLDS = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Llama:
    """Shape of a Llama model: untied head, one width for keys and values."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    key_value_width: int

    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the pruned matrices of a layer."""
        h, i, kv = self.hidden, self.intermediate, self.key_value_width
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    def numbers(self, shards: int, device: str = "cuda") -> ModelNumbers:
        """What pst_ds.planning.shapes reads from such a model with PST modules of ranks 8 and 8, in bf16."""
        tensors = [
            TensorGroup(self.vocabulary * self.hidden, 2, 2),
            TensorGroup(self.hidden, 2, 2 * self.layers + 1),
        ]
        modules = [
            ModuleNumbers(
                self.vocabulary * self.hidden,
                2 * self.vocabulary * self.hidden,
                2 * self.vocabulary * self.hidden,
                0,
                2,
            ),
            ModuleNumbers(self.hidden, 2 * self.hidden, 2 * self.hidden, 0, 2 * self.layers + 1),
        ]
        for outputs, inputs in self.matrices():
            numel, bits = outputs * inputs, shards * shard_bytes(outputs * inputs, shards)
            factors = (outputs * RANK, inputs * RANK, outputs, inputs, outputs * RANK, inputs * RANK)
            tensors.append(TensorGroup(numel, 2, self.layers))
            tensors.append(TensorGroup(bits, 1, self.layers, is_mask=True))
            tensors += [TensorGroup(n, 2, self.layers, trainable=True, is_factor=True) for n in factors]
            typed = 2 * (numel + sum(factors))
            work = layer_work_bytes(WeightLayout(outputs, inputs), 2, device=device)
            modules.append(ModuleNumbers(numel + sum(factors) + bits, typed + bits, typed, work, self.layers))
        return ModelNumbers(
            tensors=tuple(tensors),
            modules=tuple(modules),
            matrices=tuple(MatrixGroup(o * i, self.layers) for o, i in self.matrices()),
            score_rank=RANK,
            update_rank=RANK,
            dense_weights=self.vocabulary * self.hidden,
            attention_width=self.layers * self.hidden,
        )


MODELS = {
    "7B": Llama(4096, 11008, 32, 32000, 4096),
    "70B": Llama(8192, 28672, 80, 128256, 1024),
    "405B": Llama(16384, 53248, 126, 128256, 1024),
}


def zero3(numbers: ModelNumbers, world: int) -> ZeroSettings:
    """ds_configs/zero3.json."""
    return ZeroSettings(
        stage=3,
        world_size=world,
        backend="nccl",
        reduce_bucket_size=auto_reduce_bucket(numbers.trainables),
        prefetch_bucket_size=50_000_000,
        persistence_threshold=100_000,
        max_live_parameters=1_000_000_000,
        max_reuse_distance=1_000_000_000,
    )


def memory(model: Llama, world: int) -> MemoryPlan:
    numbers = model.numbers(world)
    activations = llama_activation_bytes(
        TOKENS, hidden=model.hidden, intermediate=model.intermediate, layers=model.layers, vocabulary=model.vocabulary
    )
    # the optimizer's groups: scores (A, B, R, C) and updates (U, V)
    groups = [numbers.trainables * (RANK + 1) // (2 * RANK + 1), numbers.trainables * RANK // (2 * RANK + 1)]
    return memory_plan(
        numbers,
        zero3(numbers, world),
        activations=activations,
        device="cuda",
        trainable_groups=groups,
    )


def memory_table() -> str:
    rows = [
        "| model | GPUs | weights | mask bits | optimizer | gathers | activations | mask update | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        for world in WORLDS:
            m = memory(model, world)
            parts = (m.weights, m.masks, m.optimizer, m.gathers, m.activations, m.mask_update, m.peak)
            rows.append(f"| {name} | {world:,} | " + " | ".join(f"{part / 1e9:.2f}" for part in parts) + " |")
    return "\n".join(rows)


def time_table(machine: str = "h100") -> str:
    rows = [
        "| model | GPUs | received a step, GB | a mask update, GB | step: compute, s | step: network, s | step, s "
        "| mask update, ms | share, interval 1 | interval 10 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        for world in WORLDS:
            numbers = model.numbers(world)
            batch = Batch(TOKENS, TOKENS, checkpointing=True)
            t = time_plan(numbers, zero3(numbers, world), batch, MACHINES[machine])
            rows.append(
                f"| {name} | {world:,} | {t.step_received / 1e9:.1f} | {t.update_received / 1e9:.2f} "
                f"| {t.step_compute:.2f} | {t.step_network:.2f} | {t.step:.2f} | {t.update * 1e3:.1f} "
                f"| {t.share_of_masks(1, 1):.2%} | {t.share_of_masks(10, 1):.2%} |"
            )
    return "\n".join(rows)


def machine_table() -> str:
    rows = [
        "| name | products, TFLOP/s | memory, GB/s | in a node, GB/s | between nodes, GB/s | hop, us "
        "| a weight scored, ns | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, m in MACHINES.items():
        rows.append(
            f"| `{name}` | {m.flops / 1e12:.4g} | {m.memory_bytes / 1e9:.4g} | {m.node_bytes / 1e9:.4g} "
            f"| {m.network_bytes / 1e9:.4g} | {m.latency * 1e6:.4g} | {m.update_seconds * 1e9:.3g} | {m.source} |"
        )
    return "\n".join(rows)


TABLES = {"machines": machine_table, "memory": memory_table, "time": time_table}


def page(text: str) -> str:
    """``text`` with every table between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
