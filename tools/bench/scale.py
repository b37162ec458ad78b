"""Step time, mask update time and peak memory of Llama-shaped models from 0.1 to 7 billion parameters, and of OLMoE.

Every size runs in new processes of the deepspeed launcher and is compared with the predictions of ``plan``. Memory is a
rank's peak resident set minus that after its imports.

    python -m tools.bench.scale --json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.memory import memory_plan, zero_settings
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import Batch, time_plan
from tools.bench.scale_rank import model_of
from tools.bench.timing import benchmark_parser, print_result, progress
from tools.machine import hardware

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 32000
LLAMAS: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 20, "num_attention_heads": 20},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 28, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
SHAPES: dict[str, dict[str, int | str]] = {
    **{size: {"model_type": "llama", **shape, "vocab_size": VOCABULARY} for size, shape in LLAMAS.items()},
    **{f"olmoe-{layers}": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304,
    } for layers in (1, 2, 4, 8, 16)},
}  # fmt: skip
"""Model settings by name. OLMoE has 1 to 16 layers: 0.6, 1.0, 1.9, 3.6 and 6.9 billion parameters."""
MIN_AVAILABLE = 1 << 30
"""Bytes of available memory on this machine below which a run is stopped."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_ARENA_MAX": "1"}
"""Makes glibc return freed blocks from 4 MiB on, so that the resident set is the size of the tensors."""


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(LLAMAS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps and updates, after a warm-up")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--port", type=int, default=29517)
    args = parser.parse_args()
    sizes = {}
    for size in args.sizes:
        progress(f"{size} on {args.ranks} ranks")
        sizes[size] = compared(args, size, run(args, size))
    fits = {name: linear_fit(sizes, name) for name in ("step", "update")} if len(sizes) > 2 else {}
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "sizes", "port")}
    result = {
        "benchmark": "scale",
        "hardware": hardware(),
        **settings,
        "dtype": "bfloat16",
        "threads": 1,
        "shapes": {size: SHAPES[size] for size in args.sizes},
        "malloc": MALLOC,
        "ds_config": ds_config(args),
        "sizes": sizes,
        "fits": fits,
    }
    print_result(result, as_json=args.json)


def compared(args: argparse.Namespace, size: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements of all ranks for one size, and the predictions."""
    predicted = predict(args, size, ranks[0]["rates"])
    seconds, peaks = ranks[0]["seconds"], [one["peak"] for one in ranks]
    memory = predicted["memory"]
    return {
        "parameters": predicted["parameters"],
        "pruned_weights": ranks[0]["held"]["pruned_weights"],
        "seconds": seconds,
        "peak_bytes_above_imports": peaks,
        "peak_bytes_of_all_ranks": sum(one["peak"] + one["base"] for one in ranks),
        "gathered_bytes": ranks[0]["gathered"],
        "memory_ratio": memory["peak"] / max(peaks),
        "held_bytes": ranks[0]["held"],
        "phases": ranks[0]["phases"],
        "rates": ranks[0]["rates"],
        "predicted": predicted,
    }


def predict(args: argparse.Namespace, size: str, rates: dict[str, float]) -> dict[str, Any]:
    """Predict memory from shapes, and times from the rates that all ranks measured at the same time."""
    with torch.device("meta"):
        model = model_of(SHAPES[size])
        config = PSTConfig(modules_to_save=(), relative_magnitude=False)
        inject_pst(model, config, num_shards=args.ranks)
    numbers, zero = model_numbers(model), zero_settings(ds_config(args), args.ranks, "gloo")
    checkpointing = not args.no_checkpointing
    trace = trace_micro_batch(model, batch=args.batch, sequence=args.sequence, checkpointing=checkpointing)
    memory = memory_plan(numbers, zero, activations=trace.activations)
    machine = replace(
        MACHINES["cpu"],
        flops=rates["flops"],
        memory_bytes=rates["memory_bytes"],
        node_bytes=rates["network_bytes"] or 1.0,
        latency=rates["latency"],
    )
    tokens = args.batch * args.sequence
    batch = Batch(tokens, args.sequence, recomputed=float(checkpointing), trace=trace)
    times = time_plan(numbers, zero, batch, machine)
    return {
        "parameters": numbers.parameters,
        "memory": memory.as_dict(),
        "seconds": {"step": times.step, "update": times.update},
        "network_seconds": {"step": times.step_network, "update": times.update_network},
        "received_bytes": {"step": times.step_received, "update": times.update_received},
    }


def linear_fit(sizes: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """Fit seconds to pruned weights by least squares."""
    x = np.array([one["pruned_weights"] for one in sizes.values()], dtype=float)
    y = np.array([one["seconds"][name] for one in sizes.values()])
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - slope * x - intercept
    r_squared = 1.0 - residual.var() / y.var() if y.var() else 1.0
    return {"seconds_per_weight": float(slope), "seconds": float(intercept), "r_squared": float(r_squared)}


def run(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """Run one size. Return the measurements of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": SHAPES[size],
            "ds_config": ds_config(args),
            "threads": 1,
            "batch": args.batch,
            "sequence": args.sequence,
            "repeats": args.repeats,
            "checkpointing": not args.no_checkpointing,
            "result": f"{folder}/result.json",
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        command = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_accelerators", str(args.ranks), "--master_port", str(args.port),
            "--module", "tools.bench.scale_rank", f"{folder}/job.json",
        ]  # fmt: skip
        env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "warning", **os.environ}
        code = _run_guarded(command, {**env, **MALLOC, "PYTHONPATH": str(ROOT)})
        result = Path(folder, "result.json")
        if not result.is_file():
            sys.exit(f"{command[-2]} ended with {code}")
        if code:  # a library thread may abort after the last collective
            progress(f"{command[-2]} ended with {code}, after it had written its result")
        return json.loads(result.read_text())


def _run_guarded(command: list[str], env: dict[str, str]) -> int:
    """Run ``command`` and return its exit code. Stop it and its children before this machine runs out of memory."""
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    try:
        while process.poll() is None:
            if (left := psutil.virtual_memory().available) < MIN_AVAILABLE:
                sys.exit(f"{left >> 20} MiB of memory are left on this machine: stopped before it runs out")
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def ds_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return ZeRO-3 settings without prefetching or persistent parameters."""
    return {
        "train_batch_size": args.batch * args.ranks,
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "steps_per_print": 1 << 40,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 1 << 22,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "leaf_module": {"classes": ["pst_ds.nn.experts.PSTExpertStack"]},
        },
    }


if __name__ == "__main__":
    main()
