"""make demo: prune a pretrained encoder to 50 % and 90 % sparsity under ZeRO-3 on two ranks, with two baselines.

Trains with the deepspeed launcher, exports, reloads with plain transformers, packs, and writes quantised files: sparse
runs in int8 and int4, and in ONNX Runtime next to the dense run in int8. Prints two tables of the measurements, which
are also written to runs/demo/results.json. Data and model: see tools/demo/films.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pst_ds.config.toml import load_run
from pst_ds.core.kernels.host import cpu_name, multiplies_bf16
from tools.bench.timing import print_table
from tools.demo.films import install_packages, write_splits
from tools.demo.small_files import COMPARED_REVIEWS, small_files
from tools.verbs import verb

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("runs/demo")
RUN_FILE = "tools/demo/run.toml"
RUNS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "train.head_learning_rate": 2e-4, "train.adam_beta2": 0.999},
    "magnitude-90": {
        "method": "magnitude",
        "schedule.final_sparsity": 0.9,
        "train.head_learning_rate": 3e-4,
        "train.adam_beta2": 0.999,
    },
    "pst-50": {"schedule.final_sparsity": 0.5, "schedule.initial_sparsity": 0.25},
    "pst-90": {
        "schedule.final_sparsity": 0.9,
        "schedule.initial_sparsity": 0.8,
        "start.method": "alps",
        "start.samples": 1024,
        "start.reconstruct": 2,
        "pst.magnitude": "activation",
    },
    "pst-90-1x4": {"schedule.final_sparsity": 0.9, "schedule.initial_sparsity": 0.45, "pst.pattern": "1x4"},
}
"""Settings of each run on top of tools/demo/run.toml: PST as `pst-ds init` writes it, at 90 % initialised with ALPS,
the last one with `--pattern 1x4`; the others with rates tuned for this data (tools/quality/logs/tuning-log.md).
"""


def main() -> int:
    parser = argparse.ArgumentParser("python -m tools.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: the run file's)")
    parser.add_argument("--batch-size", type=int, help="reviews of a step (default: the run file's)")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="some of the runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(ROOT)

    started = time.monotonic()
    install_packages(FOLDER / "packages")
    for name, labels in write_splits(FOLDER / "packages", FOLDER / "data").items():
        print(
            f"{name:>10}: {sum(labels.values())} reviews ({', '.join(f'{n} {k}' for k, n in sorted(labels.items()))})"
        )
    common = {"train.precision": precision(), "seed": args.seed, "deepspeed_config": deepspeed_config()}
    if args.steps:
        common["train.num_steps"] = args.steps
    if args.batch_size:
        common["train.batch_size"] = args.batch_size
    results = []
    for name in args.only or RUNS:
        settings = {**common, **RUNS[name], "output_dir": f"{FOLDER}/{name}"}
        print(f"\n== {name} ==", flush=True)
        results.append(run_one(name, [f"{key}={json.dumps(value)}" for key, value in settings.items()]))
    print("\n== small files ==", flush=True)
    small = small_files(FOLDER, results, load_run(RUN_FILE).data.max_length)
    found = {"machine": machine(), "runs": results, "small_files": small}
    (FOLDER / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_runs(results)
    print_small_files(small)
    print(f"\n{FOLDER}/results.json written; {time.monotonic() - started:.0f} s in all on {machine()}")
    return 0


def run_one(name: str, settings: list[str]) -> dict[str, Any]:
    """Plan, train, export and verify one run."""
    options = [option for setting in settings for option in ("--set", setting)]
    folder, out = str(FOLDER / name), str(FOLDER / name / "export")
    if name == "pst-90":
        verb("plan", RUN_FILE, *options, "--ranks", str(ranks()))
    train(RUN_FILE, options)
    trained = json.loads((FOLDER / name / "result.json").read_text(encoding="utf-8"))
    exported = verb("export", folder, "--out", out)
    verified = verb("verify", out, "--against", folder)
    packed = pack(folder) if exported["sparsity_measured"] else {}
    return {
        "name": name,
        "sparsity_requested": exported["sparsity_requested"],
        "sparsity_measured": exported["sparsity_measured"],
        "trained_parameters": trained["trained_parameters"],
        "optimizer_bytes_per_rank": trained["optimizer_bytes_per_rank"],
        "accuracy": verified["metrics"]["accuracy"],
        "seconds": trained["seconds"],
        "reloaded_equal": verified["reloaded_equal"],
        "export_dir": out,
        **packed,
    }


def pack(folder: str) -> dict[str, Any]:
    """Export as bitmask in the training precision, and verify the export on a part of the test examples."""
    out = f"{folder}/packed"
    exported = verb("export", folder, "--format", "bitmask", "--dtype", precision(), "--out", out)
    verified = verb("verify", out, "--against", folder, "--limit", COMPARED_REVIEWS)
    dense_bytes = exported["dense_bf16_bytes"] * (1 if precision() == "bf16" else 2)
    return {
        "packed_dir": out,
        "packed_bytes_ratio": exported["file_bytes"] / dense_bytes,
        "packed_equal": verified["reloaded_equal"],
    }


def train(run_file: str, options: list[str]) -> None:
    """Run launch/local.sh with this Python's deepspeed on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = ["launch/local.sh", "--ranks", str(ranks()), run_file, "--restart", *options]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def ranks() -> int:
    """Return the number of ranks: two on CPU, otherwise the number of GPUs, at most two."""
    return min(num_gpus(), 2) or 2


def deepspeed_config() -> str:
    return "ds_configs/zero3.json" if num_gpus() else "ds_configs/zero3_cpu.json"


def precision() -> str:
    """Return "bf16" if the hardware multiplies it, otherwise "fp32"."""
    import torch

    if num_gpus():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if multiplies_bf16() else "fp32"


def machine() -> str:
    import torch

    if num_gpus():
        return f"{ranks()} x {torch.cuda.get_device_name(0)}, {precision()}"
    return f"{cpu_name()}, {os.cpu_count()} cores, {ranks()} ranks, {precision()}"


def print_runs(results: list[dict[str, Any]]) -> None:
    head = (
        "run", "requested", "measured in file", "trained", "optimizer B/rank", "accuracy", "seconds", "reloaded equal",
        "bitmask / dense file",
    )  # fmt: skip
    rows = [
        (
            r["name"],
            f"{r['sparsity_requested']:.2f}",
            f"{r['sparsity_measured']:.6f}",
            f"{r['trained_parameters']:,}",
            f"{r['optimizer_bytes_per_rank']:,}",
            f"{r['accuracy']:.2%}",
            f"{r['seconds']:.0f}",
            "yes" if r["reloaded_equal"] else "NO",
            f"{r['packed_bytes_ratio']:.3f}" if r.get("packed_equal") else "-",
        )
        for r in results
    ]
    print_table(head, rows)


def print_small_files(small: list[dict[str, Any]]) -> None:
    rows = [
        (
            r["file"],
            f"{r['file_bytes'] / 1e6:.1f}",
            f"{r['bits_per_weight']:.2f}" if r.get("bits_per_weight") else "-",
            f"{r['accuracy']:.2%}",
            f"{100 * (r['accuracy'] - r['accuracy_of_run']):+.2f}",
            {True: "yes", False: "NO", None: "-"}[r.get("reloaded_equal")],
            f"{r['ms']:.1f}" if "ms" in r else "-",
        )
        for r in small
    ]
    print_table(
        ("file", "MB", "bits a weight", "accuracy", "points over its run", "reloaded equal", "ms for 128 tokens"), rows
    )


if __name__ == "__main__":
    sys.exit(main())
