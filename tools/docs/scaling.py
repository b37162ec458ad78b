"""Write the tables of docs/how-to/large-models.md: what ``pst-ds plan`` predicts for the models they name."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pst_ds.config.toml import load_run
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.plan import Plan, PlanOptions
from pst_ds.planning.plan import plan as plan_run
from pst_ds.planning.time import TimePlan

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "large-models.md"
WORLDS = (8, 64, 512)
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
MODELS = {
    "7B": (4096, 11008, 32, 32000, 32, 32),
    "70B": (8192, 28672, 80, 128256, 64, 8),
    "405B": (16384, 53248, 126, 128256, 128, 8),
}
SEQUENCES = {"7B": 4, "70B": 1, "405B": 1}
"""Sequences per GPU. With one, the host takes longer for a step of the 7B model than an H100 does."""
ROWS = (("7B", 16), ("70B", 16), ("70B", 4), ("405B", 16))
"""Models of the table, and bits of their frozen base and embeddings."""
RUN = """
output_dir = "runs/scaling"
task = "causal-lm"
deepspeed_config = {deepspeed}
model = {{ path = {folder}, gradient_checkpointing = true }}
data = {{ train = "not-read.jsonl", max_length = 4096 }}
schedule = {{ final_sparsity = 0.5 }}
train = {{ num_steps = 1000, batch_size = {batch}, precision = "bf16" }}
"""


def write_run(folder: Path, name: str, world: int) -> Path:
    """Write the run file of a row, and a model of which there is only a config.json."""
    config: dict[str, Any] = dict(zip((*KEYS, "num_key_value_heads"), MODELS[name], strict=True))
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    deepspeed = json.dumps(str(ROOT / "ds_configs" / "zero3.json"))
    batch = SEQUENCES[name] * world
    (folder / "run.toml").write_text(RUN.format(deepspeed=deepspeed, folder=json.dumps(str(folder)), batch=batch))
    return folder / "run.toml"


@cache
def plans(name: str, bits: int = 16) -> dict[int, Plan]:
    """Return the plans by number of GPUs. One trace serves all: a micro-batch is the same on every rank."""
    found: dict[int, Plan] = {}
    trace = None
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            frozen = [f"model.base_bits={bits}", f"model.embedding_bits={bits}"]
            run = load_run(write_run(Path(folder), name, world), frozen)
            found[world] = plan_run(run, PlanOptions(world, "h100", no_data=True, trace=trace))
            trace = found[world].trace
    return found


@cache
def times_of_machines() -> dict[str, TimePlan]:
    """Return the times of the 7B run on 8 GPUs of each kind."""
    trace = plans("7B")[8].trace
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(write_run(Path(folder), "7B", 8))
        gpus = [name for name, machine in MACHINES.items() if machine.device != "cpu"]
        return {name: plan_run(run, PlanOptions(8, name, no_data=True, trace=trace)).time for name in gpus}


def models_table() -> str:
    rows = [
        "| model | GPUs | weights, GB | copies, GB | gathers, GB | activations, GB | peak, GB | received per step, GB "
        "| from other nodes, GB | step, s | host, s | mask update, ms | step and update / full fine-tuning |",
        "|---" * 13 + "|",
    ]
    for name, bits in ROWS:
        for world, plan in plans(name, bits).items():
            memory, time = plan.memory.as_dict(), plan.time
            parts = "".join(
                f" {memory[part] / 1e9:.2f} |" for part in ("weights", "copies", "gathers", "activations", "peak")
            )
            label = name if bits == 16 else f"{name}, {bits}-bit base"
            rows.append(
                f"| {label} | {world:,} |{parts} {time.step_received / 1e9:.1f} | {time.step_between_nodes / 1e9:.1f} "
                f"| {time.step:.2f} | {time.step_host:.2f} | {time.update * 1e3:.1f} | {time.over_full:.3f} |"
            )
    return "\n".join(rows)


def machines_table() -> str:
    rows = [
        "| name | products, TFLOP/s | memory, GB/s | within a node, GB/s | between nodes, GB/s | code "
        "| step and update / full fine-tuning, 7B on 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    times = times_of_machines()
    for name, m in MACHINES.items():
        ratio = f"{times[name].over_full:.3f}" if name in times else ""
        rows.append(
            f"| `{name}` | {m.flops / 1e12:.4g} | {m.memory_bytes / 1e9:.4g} | {m.node_bytes / 1e9:.4g} "
            f"| {m.network_bytes / 1e9:.4g} | {m.code} | {ratio} |"
        )
    return "\n".join(rows)


TABLES = {"models": models_table, "machines": machines_table}


def page(text: str) -> str:
    """Return ``text`` with every table between ``<!-- table: NAME -->`` and ``<!-- end -->`` written again."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
