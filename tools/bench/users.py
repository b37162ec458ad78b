"""Per-user adapters over one sparse base: accuracy with films as users, and the time to switch users.

    python -m tools.bench.users films RUN --packages DIR --out DIR     # RUN: the demo's runs/demo/pst-90
    python -m tools.bench.users counts EXPORT --packages DIR --out DIR # EXPORT: its runs/demo/pst-90/export
    python -m tools.bench.users native runs/smollm2/int8-50 --threads 1

The corpus names no reviewers, so films are the users: for films outside the training data with at least 30 reviews, the
first 20 are the user's history and the others its queries. ``counts`` is the simplest alternative to an adapter: the
shared logits plus the log of the user's smoothed class frequencies. ``native`` decodes eight sequences with and
without adapters of rank 8 in all linear layers, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.inference.decoder import Decoder
from pst_ds.nn.personal_updates import LEFT, RIGHT
from tools.bench.timing import medians
from tools.demo.films import reviews, split_of_film
from tools.verbs import verb

HISTORY, LEAST = 20, 30
REPEATS = 30


def write_rows(packages: Path, folder: Path) -> tuple[int, int]:
    """Write history.jsonl and queries.jsonl; return (films, queries)."""
    by_film = defaultdict(list)
    for film, text, label in reviews(packages):
        if split_of_film(film) != "train":
            by_film[film].append({"film": film, "text": text, "label": label})
    films = [rows for rows in by_film.values() if len(rows) >= LEAST]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("history", slice(HISTORY)), ("queries", slice(HISTORY, None))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in films for row in rows[part]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(films), sum(len(rows) - HISTORY for rows in films)


def films(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate the films' adapters. Return the results with CPU seconds."""
    found, queries = write_rows(Path(args.packages), Path(args.out))
    settings = [word for setting in ["deepspeed_config=", *args.set] for word in ("--set", setting)]
    of_run = [args.run, *settings, "--store", str(Path(args.out) / "store"), "--by", "film", "--quiet"]
    limit = ["--limit", str(args.limit)] if args.limit else []
    began = time.process_time()
    trained = verb("users", "train", *of_run, "--data", f"{args.out}/history.jsonl", *limit, *args.more)
    seconds = time.process_time() - began
    scored = verb("users", "eval", *of_run, "--data", f"{args.out}/queries.jsonl")
    facts = {name: value for name, value in scored.items() if name != "scores"}
    return {"films": found, "queries": queries, "cpu_seconds": round(seconds, 1), **trained, **facts}


def counts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracy of the shared logits, with and without the user's class counts."""
    write_rows(Path(args.packages), Path(args.out))
    history, queries = (_by_film(Path(args.out) / f"{name}.jsonl") for name in ("history", "queries"))
    logits = _logits(args.export, [row["text"] for rows in queries.values() for row in rows]).split(
        [len(rows) for rows in queries.values()]
    )
    labels = AutoConfig.from_pretrained(args.export).label2id
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    for (film, rows), shared in zip(queries.items(), logits, strict=True):
        seen = torch.tensor([labels[row["label"]] for row in history[film]])
        more = (torch.bincount(seen, minlength=len(labels)) + 1.0).log()
        wanted = torch.tensor([labels[row["label"]] for row in rows])
        for name, of in (("shared", shared), ("with_counts", shared + more)):
            right[name].append((of.argmax(-1) == wanted).float())
    gains = [float(own.mean() - one.mean()) for own, one in zip(right["with_counts"], right["shared"], strict=True)]
    return {
        **{name: round(float(torch.cat(of).mean()), 4) for name, of in right.items()},
        "gain_over_shared": round(statistics.mean(gains), 4),
        "gain_over_shared_standard_error": round(statistics.stdev(gains) / len(gains) ** 0.5, 4),
    }


def _by_film(file: Path) -> dict[str, list[dict[str, Any]]]:
    by_film: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_film[row["film"]].append(row)
    return by_film


def _logits(folder: str, texts: list[str]) -> torch.Tensor:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batches = [
        tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
        for i in range(0, len(texts), 32)
    ]
    with torch.inference_mode():
        return torch.cat([model.eval()(**batch).logits.float() for batch in batches])


def native(args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of the native decoder for eight sequences, without and with users, and for one user."""
    decoder = Decoder.from_pretrained(args.folder, 512, sequences=16, threads=args.threads, verify=False)
    places, assign_ms = decoder._table.places.items(), []
    for sequence in range(8, 16):
        state = {f"{n}.{LEFT}": (torch.randn(place.rows, 8) / 100).bfloat16() for n, place in places}
        state |= {f"{n}.{RIGHT}": (torch.randn(8, place.columns) / 100).bfloat16() for n, place in places}
        began = time.perf_counter()
        decoder.assign(state, sequence)
        assign_ms.append(1e3 * (time.perf_counter() - began))
    for sequence in range(16):
        decoder.forward(range(100, 164), sequence=sequence)
    candidates = {"base": range(8), "users": range(8, 16), "one_user": range(8, 9)}
    seconds = medians({name: partial(decoder.step, range(len(of)), of) for name, of in candidates.items()}, args.steps)
    return {
        **{f"{name}_tokens_per_second": round(len(candidates[name]) / of, 1) for name, of in seconds.items()},
        "users_to_base": round(seconds["base"] / seconds["users"], 3),
        "assign_ms": round(statistics.median(assign_ms), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    of_films = what.add_parser("films")
    of_films.add_argument("run")
    of_films.add_argument("--packages", required=True, help="where the demo unpacked its packages")
    of_films.add_argument("--out", required=True, help="folder for rows and states")
    of_films.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    of_films.add_argument("--limit", type=int, default=0)
    of_films.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options of pst-ds users train")
    of_films.set_defaults(run_it=films)
    of_counts = what.add_parser("counts")
    of_counts.add_argument("export", help="the run's export")
    of_counts.add_argument("--packages", required=True, help="where the demo unpacked its packages")
    of_counts.add_argument("--out", required=True, help="folder for rows")
    of_counts.set_defaults(run_it=counts)
    of_native = what.add_parser("native")
    of_native.add_argument("folder")
    of_native.add_argument("--threads", type=int, default=1)
    of_native.add_argument("--steps", type=int, default=100)
    of_native.set_defaults(run_it=native)
    args = parser.parse_args()
    print(json.dumps(args.run_it(args), indent=1))


if __name__ == "__main__":
    main()
