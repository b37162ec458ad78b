"""Step time, mask update time and peak memory of Llama-shaped models, from 0.1 to 7 billion parameters."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SHAPES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 20, "num_attention_heads": 20},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 28, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000
MIN_AVAILABLE = 1 << 30
"""Bytes that a run leaves to others on this machine; with less it is stopped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for size in args.sizes:
        everyone = run(args, size)
        for one in everyone:
            print(json.dumps(one, indent=1))


def run(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": {"vocab_size": VOCABULARY, **SHAPES[size]},
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
            "--num_accelerators", str(args.ranks), "--master_port", "29517",
            str(Path(__file__).with_name("scale_rank.py")), f"{folder}/job.json",
        ]  # fmt: skip
        env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "warning", **os.environ}
        env |= {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_ARENA_MAX": "1"}
        _run_guarded(command, env)
        return json.loads(Path(folder, "result.json").read_text())


def _run_guarded(command: list[str], env: dict[str, str]) -> None:
    """Run ``command``; end it, and every process it started, before this machine runs out of memory."""
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    lowest = _available()
    try:
        while process.poll() is None:
            lowest = min(lowest, _available())
            if lowest < MIN_AVAILABLE:
                sys.exit(f"{lowest >> 20} MiB of memory are left on this machine: stopped before it runs out")
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        sys.exit(f"{command[-2]} ended with {process.returncode}")


def _available() -> int:
    found = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024


def ds_config(args: argparse.Namespace) -> dict[str, Any]:
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
        },
    }


if __name__ == "__main__":
    main()
