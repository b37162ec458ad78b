"""What a rank spends on data until its first batch, from tokens on disk: seconds, CPU seconds and resident memory.

The stores are made here: one of the tokens of about 200 MB of text, and one of 10 GB of tokens in a sparse file, with a
document every 500 tokens; the first by the writer of ``pst-ds prepare``, the second with a manifest alone, for opening
looks at no more. Each is opened in a process of its own, which has torch, transformers and the tokenizer loaded before
it begins to count; then it makes two batches, the first of a run and one far on, as after a resume.

    python -m tools.bench.mapped --json
    python -m tools.bench.mapped --open STORE --tokenizer FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.timing import conditions, print_json, status_bytes

BARS = {"seconds": 2.0, "resident_bytes": 30e6}
TOKENIZER = "tests/data/tiny-llama"
STORES = {"200 MB of text": 55_000_000, "10 GB, sparse": 5_000_000_000}
_DOCUMENT, _WRITTEN = 500, 60_000_000
"""Tokens of a document; tokens up to which a store is written in full."""
_LENGTH, _BATCH, _FAR = 2048, 8, 100_000


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.open:
        print_json(opening(arguments.open, arguments.tokenizer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            {
                "store": name,
                **_measured(make_store(Path(scratch) / name, count, arguments.tokenizer), arguments.tokenizer),
            }
            for name, count in STORES.items()
        ]
    if arguments.json:
        print_json(
            {"benchmark": "mapped", "conditions": conditions(length=_LENGTH, batch=_BATCH), "rows": rows, "bars": BARS}
        )
        return
    for row in rows:
        print(f"{row['store']:>16}: {row['seconds']:.2f} s, {row['resident_bytes'] / 1e6:.1f} MB")


def make_store(folder: Path, num_tokens: int, tokenizer_folder: str) -> Path:
    """A store of ``num_tokens``: of random words, or of zeros in a file with nothing on disk where there are many."""
    from transformers import AutoTokenizer

    from pst_ds.data.tokens.identity import identity_of
    from pst_ds.data.tokens.manifest import MANIFEST, STARTS_FILE, TOKENS, Manifest, ShardRecord
    from pst_ds.data.tokens.tokenize import Documents
    from pst_ds.data.tokens.writer import ShardWriter, finish_store

    identity = identity_of(AutoTokenizer.from_pretrained(tokenizer_folder))
    folder.mkdir()
    count, drawn = num_tokens // _DOCUMENT, np.random.default_rng(0)
    if num_tokens <= _WRITTEN:
        with ShardWriter(folder, 0, identity) as shard:
            for _ in range(0, count, 1000):
                tokens = drawn.integers(3, identity.vocabulary, 1000 * _DOCUMENT)
                shard.add(Documents(tokens, np.full(1000, _DOCUMENT)))
            record = shard.finish()
        finish_store(folder, identity, [record], {})
        return folder
    record = ShardRecord(
        number=0, tokens=num_tokens, documents=count, text_bytes=0, closed_by_us=False, sha256={TOKENS: "0" * 64}
    )
    with (folder / record.file(TOKENS)).open("wb") as file:
        file.truncate(record.num_file_bytes(TOKENS, identity.dtype))
    (np.arange(count, dtype="<i8") * _DOCUMENT).tofile(folder / STARTS_FILE)
    manifest = Manifest(tokenizer=identity, shards=(replace(record),), starts_sha256="0" * 64)
    (folder / MANIFEST).write_text(manifest.text())
    return folder


def _measured(store: Path, tokenizer: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench.mapped", "--open", str(store), "--tokenizer", tokenizer]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def opening(store: str, tokenizer_folder: str) -> dict[str, Any]:
    """Open a store as ``pst-ds train`` does, and make two batches."""
    from transformers import AutoTokenizer

    from pst_ds.config.data import DataConfig
    from pst_ds.config.run import EvalConfig
    from pst_ds.data.tasks.causal_lm import CausalLM

    tokenizer, task = AutoTokenizer.from_pretrained(tokenizer_folder), CausalLM(EvalConfig())
    data = DataConfig(train=store, max_length=_LENGTH)
    before, start, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    examples = task.load(data, "train", tokenizer, [])
    digest = examples.digest
    batches = task.batches(examples, _BATCH, 7)
    for number in (0, _FAR):
        batch = next(iter(batches.after(number)))
        task.num_targets(examples, batch)
        task.collate(examples, batch, tokenizer)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "resident_bytes": status_bytes("VmRSS") - before,
        "sequences": len(examples),
        "digest": digest,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", metavar="STORE", help="measure this store, or file of tokens, in this process")
    parser.add_argument("--tokenizer", default=TOKENIZER, metavar="DIR", help=f"its tokenizer (default: {TOKENIZER})")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


if __name__ == "__main__":
    main()
