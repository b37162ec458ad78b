"""Tokens per second and time to the first token of ``pst-ds serve``, and of the decoder without a server.

    python -m tools.bench.serve runs/smollm2/int8-50 --clients 1 8 --threads 1

Each client sends a request as soon as its last one is answered. A stream's first token is timed with all clients but
one running long answers, for each length of prompt. The decoder runs before and after the server; both take turns.
--shared: tokens of a system prompt that two requests have in common. --crowd: clients with random requests of 8 to 512
tokens; how many slots are busy while requests wait, and how many answers differ from those written alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tools.bench.timing import conditions

NEW_TOKENS = 64
WORDS = ("river", "house", "paper", "window", "garden", "letter", "stone", "music", "winter", "market")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024], help="tokens, roughly")
    parser.add_argument("--shared", type=int, nargs="*", default=[], help="tokens of a common system prompt")
    parser.add_argument("--crowd", type=int, default=0, metavar="CLIENTS")
    parser.add_argument("--requests", type=int, default=4, help="per client")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engine", choices=("native", "torch"), default="native")
    arguments = parser.parse_args()
    print(json.dumps(conditions() | {"threads": arguments.threads, "engine": arguments.engine}))
    before = _alone(arguments.folder, arguments.threads)
    batch = str(max(arguments.clients) + 1)
    options = ("--threads", str(arguments.threads), "--max-batch", batch, "--engine", arguments.engine)
    with running_server(arguments.folder, *options) as url:
        _ask(url, _prompt(16, 0), 4)
        rates = {clients: _rate(url, clients, arguments.requests) for clients in arguments.clients}
        idle, busy = (
            {n: _first_token(url, n, load) for n in arguments.prompts} for load in (0, max(arguments.clients))
        )
        for tokens in arguments.shared:
            first, second = _shared(url, tokens)
            print(f"system prompt of {tokens}: {first:.3f} s, then {second:.3f} s ({first / second:.1f} times as soon)")
        if arguments.crowd:
            share, wrong, asked = _crowd(url, arguments.crowd, arguments.requests, max(arguments.clients) + 1)
            print(f"crowd: {share:.3f} of the slots are busy while requests wait; {wrong} of {asked} answers differ")
    alone = statistics.median([before, _alone(arguments.folder, arguments.threads)])
    print(f"the decoder alone: {alone:.1f} tokens per second")
    for clients, rate in rates.items():
        print(f"{clients} clients: {rate:.1f} tokens per second, {rate / alone:.2f} of the decoder alone")
    for tokens in arguments.prompts:
        (quiet, _), (median, longest) = idle[tokens], busy[tokens]
        print(
            f"first token of {tokens}: idle {quiet:.3f} s; among {max(arguments.clients)} answers {median:.3f} s in "
            f"the median, {longest:.3f} s at most ({longest / quiet:.2f})"
        )


def _prompt(tokens: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=max(1, tokens - 30)))


def _alone(folder: Path, threads: int) -> float:
    """Return the tokens per second of the decoder in a separate process, prompt included."""
    code = (
        "import sys, time; from pst_ds.inference.decoder import Decoder; from transformers import AutoTokenizer\n"
        "folder, threads, text, new = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])\n"
        "decoder = Decoder.from_pretrained(folder, threads=threads, verify=False)\n"
        "prompt = AutoTokenizer.from_pretrained(folder)(text)['input_ids']\n"
        "rates = []\n"
        "for _ in range(6):\n"
        "    start = time.perf_counter(); list(decoder.stream(prompt, new))\n"
        "    rates.append(new / (time.perf_counter() - start))\n"
        "print(sorted(rates)[3])\n"
    )
    words = [sys.executable, "-c", code, str(folder), str(threads), _prompt(46, 0), str(NEW_TOKENS)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


@contextmanager
def running_server(folder: Path, *options: str) -> Iterator[str]:
    """Start ``pst-ds serve``; yield its address, and end it."""
    words = [sys.executable, "-m", "pst_ds", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            said = next(line for line in process.stdout if line.startswith("serving"))
            url = said.partition(" at ")[2].split()[0]
            while not _listens(url):
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def _listens(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/models").read())
    except urllib.error.URLError:
        return False


def _shared(url: str, tokens: int) -> tuple[float, float]:
    """Return median seconds to the first token for a new system prompt, and for a second request with the same one."""
    pairs = []
    for number in range(5):
        system = {"role": "system", "content": _prompt(tokens, 7000 + number)}
        pairs.append([_ask(url, _prompt(40, 10 * number + n), 4, [system])[0] for n in range(2)])
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs)


def _crowd(url: str, clients: int, requests: int, slots: int) -> tuple[float, int, int]:
    """Return the share of busy slots while requests wait, and how many of the answers differ from those alone."""
    draw = random.Random(5)
    asked = [(_prompt(46, n), draw.randint(8, 512), n % 2) for n in range(clients * requests)]
    found, ended, shares = [""] * len(asked), threading.Event(), list[float]()

    def one(number: int) -> None:
        found[number] = _text(url, *asked[number], number)

    def watch() -> None:
        while not ended.wait(0.05):
            load = _load(url)
            if load["waiting"]:
                shares.append(load["running"] / slots)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(one, range(len(asked))))
    ended.set()
    watcher.join()
    sample = range(0, len(asked), 8)
    wrong = sum(_text(url, *asked[number], number) != found[number] for number in sample)
    return statistics.mean(shares), wrong, len(sample)


def _load(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        lines = re.findall(r'^pst_ds_load{state="(\w+)"} (\S+)$', answer.read().decode(), re.MULTILINE)
    return {state: float(number) for state, number in lines}


def _text(url: str, text: str, new_tokens: int, temperature: float, seed: int) -> str:
    table = {"model": _model(url), "messages": [{"role": "user", "content": text}], "max_tokens": new_tokens,
             "temperature": temperature, "seed": seed}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(table).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


@cache
def _model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def _ask(url: str, text: str, new_tokens: int, before: Sequence[dict[str, str]] = ()) -> tuple[float, int]:
    """Return seconds to the first token of a stream, and the number of its tokens."""
    table = {"model": _model(url), "messages": [*before, {"role": "user", "content": text}], "stream": True,
             "max_tokens": new_tokens, "temperature": 0, "stream_options": {"include_usage": True}}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(table).encode(), {"Content-Type": "application/json"}
    )
    start, first, count = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not first and b'"role"' not in line and line.strip():  # text, or the end of an answer without any
                first = time.perf_counter() - start
            if b'"completion_tokens"' in line:
                count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return first, count


def _rate(url: str, clients: int, requests: int) -> float:
    """Return the tokens per second of all clients together."""

    def one(client: int) -> int:
        return sum(_ask(url, _prompt(16, 100 * client + n), NEW_TOKENS)[1] for n in range(requests))

    with ThreadPoolExecutor(clients) as threads:
        start = time.perf_counter()
        return sum(threads.map(one, range(clients))) / (time.perf_counter() - start)


def _first_token(url: str, tokens: int, load: int) -> tuple[float, float]:
    """Return median and maximum seconds to the first token of a prompt, while ``load`` answers are being written."""
    stops = threading.Event()

    def keep_busy(client: int) -> None:
        while not stops.is_set():
            _ask(url, _prompt(16, client), 4 * NEW_TOKENS)

    with ThreadPoolExecutor(max(1, load)) as threads:
        for client in range(load):
            threads.submit(keep_busy, client)
        time.sleep(1.0 if load else 0.0)  # all are writing
        found = [_ask(url, _prompt(tokens, 1000 + n), 16)[0] for n in range(6)]
        stops.set()
    return statistics.median(found), max(found)


if __name__ == "__main__":
    main()
