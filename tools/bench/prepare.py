"""Throughput of ``pst-ds prepare`` compared with ``datasets.map``, and of two processes compared with one.

The corpus is the source code of Python's library as JSONL with one file per row; the tokenizer is a byte-level BPE of
8,192 tokens trained on a part of it, so nothing is downloaded. ``map`` tokenises batches of 1,000 rows without the
attention mask, and its rows are loaded before the clock starts; ``prepare`` reads, tokenises, hashes and writes. Each
runs in a forked process, in turns; MB are bytes of UTF-8 text. CPU seconds include workers; one and two processes are
compared by the shortest wall time of all rounds.

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

from tools.bench.timing import benchmark_parser, conditions, print_result, progress

_VOCABULARY, _TRAINED_ON_BYTES = 8192, 4_000_000


def main() -> None:
    arguments = _parser().parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(Path(scratch), arguments.megabytes, arguments.repeats)
    print_result(report, as_json=arguments.json)


def measure(folder: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Time all contestants on a corpus of that size, in ``folder``."""
    path = folder / "texts.jsonl"
    size = write_texts(path, int(1e6 * megabytes))
    progress(f"{size / 1e6:.1f} MB of text; training a tokenizer")
    tokenizer = train_tokenizer(path)
    contestants: dict[str, Callable[[], object]] = {
        "map": _mapping(path, tokenizer, folder),
        "one": lambda: _prepare(path, tokenizer, folder, 1),
        "two": lambda: _prepare(path, tokenizer, folder, 2),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, run in contestants.items():
            times[name].append(in_a_fork(run))
            progress(f"round {turn + 1}: {name} {times[name][-1][0]:.2f} s, {times[name][-1][1]:.2f} CPU s")
    rows = [
        {
            "contestant": name,
            "mb_per_cpu_second": size / 1e6 / statistics.median(cpu for _, cpu in of),
            "mb_per_second": size / 1e6 / min(wall for wall, _ in of),
        }
        for name, of in times.items()
    ]
    return {
        "benchmark": "prepare",
        "conditions": conditions(megabytes=size / 1e6, repeats=repeats, vocabulary=_VOCABULARY),
        "rows": rows,
        "ratios": ratios(rows),
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the speed of one process relative to ``map``, and of two processes relative to one."""
    by_name = {row["contestant"]: row for row in rows}
    return {
        "cpu_against_map": by_name["one"]["mb_per_cpu_second"] / by_name["map"]["mb_per_cpu_second"],
        "two_against_one": by_name["two"]["mb_per_second"] / by_name["one"]["mb_per_second"],
    }


def write_texts(path: Path, num_bytes: int) -> int:
    """Write the source files of Python's library as JSONL, repeated if necessary. Return the bytes of text."""
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
    """Train a byte-level BPE on the first megabytes of ``path``."""
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


def in_a_fork(run: Callable[[], object]) -> tuple[float, float]:
    """Run ``run`` in a forked process. Return its wall seconds, and the CPU seconds of it and its children."""
    sys.stdout.flush()
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise RuntimeError("a contestant failed; its output is above")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=32.0, help="size of the corpus (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    return parser


if __name__ == "__main__":
    main()
