"""Weights that were rounded in training against weights that are rounded afterwards: one run file, some seeds.

For every share of zeros and seed two runs are trained, without and with ``[quantization]``, and exported on the same
grid; both files are tested as they are. Runs that are there already are read, so a killed comparison goes on.

    python -m tools.quality.trained_rounding tools/examples/encoder_90.toml --out runs/rounding --values int4 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic
from tools.bench.timing import hardware
from tools.verbs import verb

KINDS = ("plain", "rounded", "trained")
"""As it was trained without a grid; the same, rounded; rounded while it trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--values", default="int4")
    parser.add_argument("--group", default="64")
    parser.add_argument("--sparsities", nargs="+", default=["0.8", "0.9"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    rows = []
    for sparsity in args.sparsities:
        by_seed = [measured(args, sparsity, seed) for seed in args.seeds]
        rows.append({"sparsity": sparsity, "seeds": by_seed, **gain(by_seed, args.metric)})
        row = rows[-1]
        means = ", ".join(f"{kind} {row[kind]:.4f}" for kind in KINDS)
        print(f"{sparsity}: {means}; trained - rounded {row['gain']:+.4f}, standard error {row['standard_error']}")
    if args.json:
        print(
            json.dumps({"comparison": "trained_rounding", "hardware": hardware(), "values": args.values, "rows": rows})
        )


def measured(args: argparse.Namespace, sparsity: str, seed: str) -> dict[str, Any]:
    """The metrics of all three on the run's test file."""
    folder = args.out / f"{sparsity}-{seed}"
    done = folder / "outcome.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    settings = [*args.set, f"seed={seed}", f"schedule.final_sparsity={sparsity}"]
    grid = [f'quantization.values="{args.values}"', f"quantization.group={args.group}"]
    after = exported(args.run, folder / "plain", settings, ["--values", args.values, "--group", args.group])
    during = exported(args.run, folder / "trained", [*settings, *grid], [])
    found = {
        "seed": seed,
        "plain": after["rounding"]["metrics_before"],
        "rounded": after["metrics"],
        "trained": during["metrics"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(done, json.dumps(found) + "\n")
    return found


def exported(run_file: str, folder: Path, settings: list[str], values: list[str]) -> dict[str, Any]:
    """Train, export and verify a run; return what verify says of the file."""
    run, out = folder / "run", folder / "export"
    options = [word for setting in [f'output_dir="{run}"', *settings] for word in ("--set", setting)]
    verb("train", run_file, "--quiet", "--resume", *options)
    verb("export", str(run), "--out", str(out), "--format", "bitmask", *values)
    return verb("verify", str(out), "--against", str(run))


def gain(by_seed: list[dict[str, Any]], metric: str) -> dict[str, float | None]:
    """Means over the seeds, and by how much the trained ones are ahead; None for the error of a single seed."""
    means = {kind: statistics.fmean(seed[kind][metric] for seed in by_seed) for kind in KINDS}
    gains = [seed["trained"][metric] - seed["rounded"][metric] for seed in by_seed]
    error = round(statistics.stdev(gains) / len(gains) ** 0.5, 5) if len(gains) > 1 else None
    return {**means, "gain": statistics.fmean(gains), "standard_error": error}


if __name__ == "__main__":
    main()
