"""What one-shot pruning adds to the loss of a language model, by method: nats a token above the dense model.

Every method prunes the run's model to every share of zeros ("2:4" names a pattern), and the folder is tested on the
first sequences of data.test. Folders that are there already are read, so a killed comparison goes on.

    python -m tools.quality.one_shot run.toml --out runs/one-shot --set train.precision=fp32 --json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from pst_ds.atomic_files import write_text_atomic
from tools.bench.timing import hardware
from tools.verbs import verb

REFERENCE = "sparsegpt"
"""What the others are compared with."""
OUTCOME = "loss.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.toml", help='run file of task "causal-lm"')
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned models")
    parser.add_argument("--methods", nargs="+", default=[REFERENCE, "alps"])
    parser.add_argument("--zeros", nargs="+", default=["0.5", "0.7", "2:4"], help="shares or patterns")
    parser.add_argument("--samples", default="64", help="sequences to calibrate on")
    parser.add_argument("--tested", type=int, default=96, help="sequences of data.test")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    dense = measured(args, "", args.out / "dense", {})
    print(f"dense: {dense['loss']:.4f} nats a token")
    rows: list[dict[str, Any]] = []
    for zeros in args.zeros:
        for method in args.methods:
            found = pruned(args, method, zeros)
            rows.append({"zeros": zeros, "method": method, **found, "added": found["loss"] - dense["loss"]})
            rows[-1]["of_reference"] = share_of_reference(rows)
            share = rows[-1]["of_reference"]
            print(
                f"{zeros} {method}: {rows[-1]['added']:.4f} nats above dense"
                + ("" if share is None else f", {share:.3f} of {REFERENCE}'s")
                + f"; pruned in {found['prune_cpu_seconds']:.0f} CPU s"
            )
    if args.json:
        facts = {"samples": int(args.samples), "tested": args.tested, "dense": dense["loss"]}
        print(json.dumps({"comparison": "one_shot", "hardware": hardware(), **facts, "rows": rows}))


def share_of_reference(rows: list[dict[str, Any]]) -> float | None:
    """What the last row adds, as a share of what the reference adds with as many zeros; None before that is known."""
    last = rows[-1]
    known = [row for row in rows if row["method"] == REFERENCE and row["zeros"] == last["zeros"]]
    return last["added"] / known[0]["added"] if known and known[0]["added"] > 0 else None


def pruned(args: argparse.Namespace, method: str, zeros: str) -> dict[str, Any]:
    """Prune by a method and test what it made."""
    folder = args.out / f"{method}-{zeros.replace(':', 'of')}"
    if (folder / OUTCOME).is_file():
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    share = ["--pattern", zeros] if ":" in zeros else ["--sparsity", zeros]
    settings = [word for setting in args.set for word in ("--set", setting)]
    model, start = folder / "model", time.process_time()
    words = ["--method", method, "--out", str(model), "--samples", args.samples, "--quiet"]
    verb("prune", args.run, *words, *share, *settings)
    return measured(args, str(model), folder, {"prune_cpu_seconds": time.process_time() - start})


def measured(args: argparse.Namespace, model: str, folder: Path, facts: dict[str, float]) -> dict[str, Any]:
    """Return the loss of a ``model``, "" for the run's own, with the ``facts``; written into ``folder`` once known."""
    if (folder / OUTCOME).is_file():
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    found = {**facts, "loss": loss_of(args.run, model, args.set, args.tested)}
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / OUTCOME, json.dumps(found) + "\n")
    return found


def loss_of(run_file: str, model: str, settings: list[str], limit: int) -> float:
    """The mean loss, in nats a token, of a folder (of the run's model: "") on the first sequences of data.test."""
    from transformers import AutoModelForCausalLM

    from pst_ds.config.toml import load_run
    from pst_ds.data.tasks import task_of
    from pst_ds.train.model import load_tokenizer

    run = load_run(run_file, settings)
    task, tokenizer = task_of(run), load_tokenizer(run)
    examples, total, predicted = task.load(run.data, "test", tokenizer, []), 0.0, 0
    causal = AutoModelForCausalLM.from_pretrained(model or run.model.path, dtype=torch.float32).eval()
    for i in range(min(limit, len(examples))):
        batch = task.collate(examples, [i], tokenizer)
        with torch.no_grad():
            total += float(task.outcomes(causal(input_ids=batch["input_ids"]).logits, batch).sum())
        predicted += int((batch["labels"][:, 1:] >= 0).sum())
    return total / predicted


if __name__ == "__main__":
    main()
