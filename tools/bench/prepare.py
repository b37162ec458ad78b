"""How fast text becomes a store: ``pst-ds prepare`` against ``datasets.map`` with the same tokenizer, and two processes
against one.

The text is Python's own library, as JSONL with a file a row, and the tokenizer a byte-level BPE of 8,192 tokens trained
on a part of it, so nothing is fetched. ``map`` tokenises 1,000 rows at a time, without the attention mask, and its
rows are loaded before the clock starts; ``prepare`` reads, tokenises, hashes and writes. Each runs in a fork of
its own and they take turns; MB count bytes of text in UTF-8. CPU seconds are those of the fork and its workers, and the
two processes are compared by the clock on the wall, best of all rounds. "two_by_cpu" is what the clock could show at
best: CPU seconds of one against those of two outside of the workers and half of those inside.

    python -m tools.bench.prepare --json
    python -m tools.bench.prepare --megabytes 16 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.timing import conditions, print_json, progress

BARS = {"cpu_against_map": 1.0, "two_against_one": 1.8}
_VOCABULARY, _TRAINED_ON_BYTES = 8192, 4_000_000


def main() -> None:
    arguments = _parser().parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), arguments.megabytes, arguments.repeats)
    if arguments.json:
        print_json(report)
    else:
        for name, value in report["ratios"].items():
            print(f"{name:>16} {value:5.2f}  (bar {BARS[name]})")
        print(f"{'two_by_cpu':>16} {report['two_by_cpu']:5.2f}")


def measure(folder: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Time all contestants on so much text, in ``folder``."""
    path = folder / "texts.jsonl"
    size = write_texts(path, int(1e6 * megabytes))
    progress(f"{size / 1e6:.1f} MB of text; training a tokenizer")
    tokenizer = train_tokenizer(path)
    contestants: dict[str, Callable[[], object]] = {
        "map": _mapping(path, tokenizer, folder),
        "one": lambda: _prepare(path, tokenizer, folder, 1),
        "two": lambda: _prepare(path, tokenizer, folder, 2),
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, run in contestants.items():
            times[name].append(in_a_fork(run))
            progress(f"round {turn + 1}: {name} {times[name][-1][0]:.2f} s, {times[name][-1][1]:.2f} CPU s")
    rows = [
        {
            "contestant": name,
            "mb_per_cpu_second": size / 1e6 / statistics.median(cpu for _, cpu, _ in of),
            "mb_per_second": size / 1e6 / min(wall for wall, _, _ in of),
            "share_in_workers": statistics.median(workers / cpu for _, cpu, workers in of),
        }
        for name, of in times.items()
    ]
    return {
        "benchmark": "prepare",
        "conditions": conditions(megabytes=size / 1e6, repeats=repeats, vocabulary=_VOCABULARY),
        "rows": rows,
        "ratios": ratios(rows),
        "two_by_cpu": bound_of_two(rows),
        "bars": BARS,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the bars ask for, from the rows of all contestants."""
    by_name = {row["contestant"]: row for row in rows}
    return {
        "cpu_against_map": by_name["one"]["mb_per_cpu_second"] / by_name["map"]["mb_per_cpu_second"],
        "two_against_one": by_name["two"]["mb_per_second"] / by_name["one"]["mb_per_second"],
    }


def bound_of_two(rows: list[dict[str, Any]]) -> float:
    """What two processes are to one at best, by their CPU seconds: what workers do is halved, and all else stays."""
    one, two = (next(row for row in rows if row["contestant"] == name) for name in ("one", "two"))
    return two["mb_per_cpu_second"] / one["mb_per_cpu_second"] / (1.0 - two["share_in_workers"] / 2)


def write_texts(path: Path, num_bytes: int) -> int:
    """Write the sources of Python's library as JSONL, over again if need be; the bytes of text."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    size = 0
    with path.open("w", encoding="utf-8") as out:
        while size < num_bytes:
            for file in files:
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= num_bytes:
                    break
    return size


def train_tokenizer(path: Path) -> Any:
    """A byte-level BPE, trained on the first megabytes of ``path``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts, size = [], 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(line)
            if size > _TRAINED_ON_BYTES:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _mapping(path: Path, tokenizer: Any, folder: Path) -> Callable[[], object]:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}

    def run() -> object:
        return rows.map(tokenize, batched=True, remove_columns=["text"], load_from_cache_file=False)

    return run


def _prepare(path: Path, tokenizer: Any, folder: Path, workers: int) -> object:
    from pst_ds.data.preparation.pieces import Reading
    from pst_ds.data.preparation.prepare import plan_store, prepare_store

    plan = plan_store([str(path)], tokenizer, Reading(), piece_bytes=max(1, path.stat().st_size // 16))
    return prepare_store(plan, tokenizer, folder / f"store-{workers}", num_workers=workers, force=True)


def in_a_fork(run: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds on the wall and of the processor that ``run`` takes in a process of its own with its children, and of the
    processor in these children alone."""
    sys.stdout.flush()
    read, write = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            before = os.times()
            run()
            after = os.times()
            inside = after.children_user + after.children_system - before.children_user - before.children_system
            os.write(write, repr(inside).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status, used = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    if status:
        raise RuntimeError("a contestant failed; what it said is above")
    return wall, used.ru_utime + used.ru_stime, float(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=32.0, help="text to tokenise (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


if __name__ == "__main__":
    main()
