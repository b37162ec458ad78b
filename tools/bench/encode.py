"""Texts per second of ``pst-ds predict`` and ``pst-ds serve``, and of the same model in memory without either.

    python -m tools.bench.encode runs/demo/onnx reviews.jsonl --rows 10000

All use the same number of threads and take turns; the last column is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pst_ds.inference.encoder.encoder import EMBEDDER, Encoder
from pst_ds.inference.encoder.file import open_file
from tools.bench.serve import running_server
from tools.bench.timing import conditions, medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", help="file with a column of texts")
    parser.add_argument("--rows", type=int, default=1000, help="of the file, for predict")
    parser.add_argument("--batch", type=int, default=8, help="texts of a request")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder, threads, batch = str(arguments.folder), arguments.threads, arguments.batch
    print(json.dumps(conditions() | vars(arguments), default=str))
    data = f"{arguments.data}[:{arguments.rows}]"
    file = open_file(folder, data, (), partial(Encoder, folder, threads=threads))
    texts = [str(text) for text in file.rows[file.columns[0]]]
    with tempfile.TemporaryDirectory() as scratch:
        ways: dict[str, Callable[[], object]] = {
            "model.predict": lambda: file.model.predict(texts),
            "pst-ds predict": lambda: file.predict(Path(scratch) / "out.jsonl"),
        }
        _report(medians(ways, arguments.repeats, warmup=0), len(texts))
    encoder = Encoder(folder, threads=threads, batch=batch)
    requests = [texts[first : first + batch] for first in range(0, batch * arguments.requests, batch)]
    route = "embeddings" if encoder.kind == EMBEDDER else "classify"
    server = running_server(arguments.folder, "--threads", str(threads), "--max-batch", str(batch))
    with server as url, ThreadPoolExecutor(arguments.clients) as clients:
        ask = partial(_ask, f"{url}/{route}", arguments.folder.resolve().name)
        ways = {
            f"model.predict, batches of {batch}": lambda: [encoder.predict(request) for request in requests],
            f"pst-ds serve, {arguments.clients} clients": lambda: list(clients.map(ask, requests)),
        }
        _report(medians(ways, arguments.repeats, warmup=1), batch * len(requests))


def _ask(url: str, name: str, texts: list[str]) -> bytes:
    body = json.dumps({"model": name, "input": texts, "encoding_format": "base64"}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


def _report(seconds: dict[str, float], texts: int) -> None:
    first = next(iter(seconds.values()))
    for name, taken in seconds.items():
        print(f"{name}: {texts / taken:.1f} texts per second, {first / taken:.3f}", flush=True)


if __name__ == "__main__":
    main()
