"""Write the tables of docs/scaling.md: what ``pst-ds plan`` plans for the models that they name."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pst_ds.cli.plan_values import Ask, make_plan
from pst_ds.config.toml import load_run
from pst_ds.planning.activations import Trace
from pst_ds.planning.counts import COUNTS
from pst_ds.planning.machines import MACHINES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
WORLDS = (8, 64, 512, 4096)
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
MODELS = {
    "7B": (4096, 11008, 32, 32000, 32, 32),
    "70B": (8192, 28672, 80, 128256, 64, 8),
    "405B": (16384, 53248, 126, 128256, 128, 8),
}
FEW_BITS = ("7B", "70B")
"""Models whose base and embeddings are planned in 4 bits too."""
RUN = """
output_dir = "runs/scaling"
task = "causal-lm"
deepspeed_config = {deepspeed}
model = {{ path = {folder}, gradient_checkpointing = true }}
data = {{ train = "not-read.jsonl", max_length = 4096 }}
schedule = {{ final_sparsity = 0.5 }}
train = {{ num_steps = 1000, batch_size = {world}, precision = "bf16" }}
"""


def write_run(folder: Path, name: str, world: int) -> Path:
    """Write the run file of a row, one sequence a GPU, and a model of which there is only a config.json."""
    config: dict[str, Any] = dict(zip((*KEYS, "num_key_value_heads"), MODELS[name], strict=True))
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    deepspeed = json.dumps(str(ROOT / "ds_configs" / "zero3.json"))
    (folder / "run.toml").write_text(RUN.format(deepspeed=deepspeed, folder=json.dumps(str(folder)), world=world))
    return folder / "run.toml"


@cache
def plans(name: str, bits: int = 16) -> dict[int, dict[str, Any]]:
    """Return the plans by number of GPUs. One trace serves all: a micro-batch is the same on every rank."""
    found: dict[int, dict[str, Any]] = {}
    trace = None
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            frozen = [f"model.base_bits={bits}", f"model.embedding_bits={bits}"]
            run = load_run(write_run(Path(folder), name, world), frozen)
            found[world] = make_plan(run, Ask(world, "h100", no_data=True, trace=trace))
            trace = Trace(**found[world]["trace"])
    return found


@cache
def times_of_machines() -> dict[str, dict[str, Any]]:
    """Return the times of the 7B run on 8 GPUs of each kind."""
    trace = Trace(**plans("7B")[8]["trace"])
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(write_run(Path(folder), "7B", 8))
        gpus = [name for name, machine in MACHINES.items() if machine.device != "cpu"]
        return {name: make_plan(run, Ask(8, name, no_data=True, trace=trace))["time"] for name in gpus}


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in MODELS:
        for world, plan in plans(name).items():
            yield f"| {name} | {world:,} |", plan


def memory_table() -> str:
    rows = [
        "| model | GPUs | weights | mask bits | optimizer | gathers | activations | mask update | peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, plan in _rows():
        m = plan["memory_bytes_per_rank"]
        parts = ("weights", "masks", "optimizer", "gathers", "activations", "mask_update", "peak")
        rows.append(row + "".join(f" {m[part] / 1e9:.2f} |" for part in parts))
    return "\n".join(rows)


def time_table() -> str:
    rows = [
        "| model | GPUs | received a step, GB | a mask update, GB | step: compute, s | step: network, s | step, s "
        "| mask update, ms | share, interval 1 | interval 10 | full fine-tuning, s | both / full |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, plan in _rows():
        t = plan["time"]
        each, tenth = (t["update"] / (interval * t["step"] + t["update"]) for interval in (1, 10))
        rows.append(
            f"{row} {t['step_received'] / 1e9:.1f} | {t['update_received'] / 1e9:.2f} | {t['step_compute']:.2f} "
            f"| {t['step_network']:.2f} | {t['step']:.2f} | {t['update'] * 1e3:.1f} | {each:.2%} | {tenth:.2%} "
            f"| {t['full_step']:.2f} | {t['over_full']:.3f} |"
        )
    return "\n".join(rows)


def machine_table() -> str:
    rows = [
        "| name | products, TFLOP/s | memory, GB/s | in a node, GB/s | between nodes, GB/s | hop, us | launch, us "
        "| code | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in MACHINES.items():
        rows.append(
            f"| `{name}` | {m.flops / 1e12:.4g} | {m.memory_bytes / 1e9:.4g} | {m.node_bytes / 1e9:.4g} "
            f"| {m.network_bytes / 1e9:.4g} | {m.latency * 1e6:.4g} | {m.launch_seconds * 1e6:.4g} | {m.code} "
            f"| {m.source} |"
        )
    return "\n".join(rows)


def counts_table() -> str:
    rows = [
        "| code | M . W: bytes a weight | launches a layer | backward: bytes a weight | launches a layer | a band "
        "| mask update: bytes a weight | launches a matrix | for all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in COUNTS.items():
        rows.append(
            f"| {name} | {c.merge_bytes:g} | {c.forward_launches} | {c.backward_bytes:g} | {c.layer_launches} "
            f"| {c.band_launches} | {c.update_bytes:g} | {c.update_launches} | {c.shared_launches} |"
            if name != "native"
            else f"| {name} | {c.merge_bytes:g} | | {c.backward_bytes:g} | | | | | |"
        )
    return "\n".join(rows)


def gpu_table() -> str:
    rows = ["| 8 GPUs, 7B | step, ms | mask update, ms | full fine-tuning, ms | step / full | both / full |"]
    rows.append("|---|---|---|---|---|---|")
    for name, t in times_of_machines().items():
        rows.append(
            f"| `{name}` | {t['step'] * 1e3:.0f} | {t['update'] * 1e3:.1f} | {t['full_step'] * 1e3:.0f} "
            f"| {t['step'] / t['full_step']:.3f} | {t['over_full']:.3f} |"
        )
    return "\n".join(rows)


def base_table() -> str:
    rows = [
        "| model | GPUs | weights | gathers | peak | received a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in FEW_BITS:
        for world, plan in plans(name, 4).items():
            m, received = plan["memory_bytes_per_rank"], plan["time"]["step_received"]
            parts = "".join(f" {m[part] / 1e9:.2f} |" for part in ("weights", "gathers", "peak"))
            rows.append(f"| {name}, 4 bits | {world:,} |{parts} {received / 1e9:.1f} |")
    return "\n".join(rows)


TABLES = {
    "machines": machine_table, "counts": counts_table, "memory": memory_table, "base": base_table, "time": time_table,
    "gpus": gpu_table,
}  # fmt: skip


def page(text: str) -> str:
    """Return ``text`` with every table between ``<!-- table: NAME -->`` and ``<!-- end -->`` written again."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
