"""What honest clients of ``pst-ds serve`` wait while another client sends hostile requests.

    python -m tools.bench.hostile notes-int8 --clients 32

Each honest client sends requests of its own, one after the other. One more client repeats a hostile request of at most
1 MiB, as soon as it is answered. Per kind of hostile request: the slowest honest request, with and without it; the
slowest answer of ``/health``; how many honest answers differ from those given to a client alone; and the hostile
client's statuses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.serve import running_server
from tools.bench.timing import conditions
from tools.chaos.serving.health import HealthWatch

_CHAT, _PLAIN = "/chat/completions", "/completions"
_ASK = b'{"model":"m","messages":[{"role":"user","content":"x"}]'


def hostile_requests() -> dict[str, tuple[str, bytes]]:
    """Return the route and the body of each kind of hostile request."""

    def schema(content: object) -> bytes:
        kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}
        return _ASK + b',"max_tokens":2,"response_format":' + json.dumps(kind).encode() + b"}"

    def keys(count: int, value: bytes = b"0") -> bytes:
        return b"{" + b",".join(b'"%x":%s' % (number, value) for number in range(count)) + b"}"

    def prompt(content: object) -> tuple[str, bytes]:
        return _PLAIN, json.dumps({"model": "m", "prompt": content, "max_tokens": 2}).encode()

    message = {"role": "user", "content": ""}
    choice = b',"tool_choice":{"type":"function","function":' + keys(95_000) + b"}}"
    kinds = [
        {"type": "object", "properties": {f"k{n}": {"type": "integer"}}, "required": [f"k{n}"]} for n in range(5000)
    ]
    return {
        "200,000 prompts of one character": prompt(["a"] * 200_000),
        "one prompt of 1 MB": prompt("a" * 1_000_000),
        "32 prompts of 5,000 characters": prompt(["a" * 5_000] * 32),
        "95,000 keys in tool_choice": (_CHAT, _ASK + choice),
        "80,000 keys in logit_bias": (_CHAT, _ASK + b',"logit_bias":' + keys(80_000) + b"}"),
        "340,000 empty lists": (_CHAT, _ASK + b',"metadata":[' + b",".join([b"[]"] * 340_000) + b"]}"),
        "30,000 empty lists": (_CHAT, _ASK + b',"metadata":[' + b",".join([b"[]"] * 30_000) + b"]}"),
        "25,000 messages": (_CHAT, json.dumps({"model": "m", "messages": [message] * 25_000}).encode()),
        "2,000 messages": (_CHAT, json.dumps({"model": "m", "messages": [message] * 2_000}).encode()),
        "a schema of 432 KiB": (_CHAT, schema({"anyOf": kinds})),
        "a schema of 120 KiB": (_CHAT, schema({"anyOf": kinds[:1400]})),
        "a schema of 15 KiB": (_CHAT, schema({"anyOf": kinds[:160]})),
        "a schema of regular expressions": (
            _CHAT,
            schema({"allOf": [{"type": "integer", "multipleOf": number} for number in (999983, 999979, 999961)]}),
        ),
    }  # fmt: skip


@dataclass
class Outcome:
    """What clients saw during a period."""

    seconds: list[float] = field(default_factory=list)
    """Of each honest request."""
    answers: dict[tuple[int, int], str] = field(default_factory=dict)
    """By client and number."""
    hostile: Counter[int] = field(default_factory=Counter)
    """Statuses of the hostile client."""
    health_seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="per honest client")
    parser.add_argument("--tokens", type=int, default=24, help="of an honest answer")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    arguments = parser.parse_args()
    print(json.dumps(conditions()))
    options = ("--threads", "1", "--engine", "native", "--name", "m", "--max-waiting", "64")
    with running_server(arguments.folder, *options) as url:
        solo = {
            (client, number): _honest(url, client, number, arguments.tokens)[0]
            for client in range(arguments.clients)
            for number in range(arguments.requests)
        }
        for name, (route, body) in hostile_requests().items():
            if arguments.only not in name:
                continue
            # both orders, so that a change of the machine's load between them does not count for one side
            quiet = _period(url, arguments, None)
            attacked = _period(url, arguments, (route, body))
            again = _period(url, arguments, None)
            without = statistics.mean([max(quiet.seconds), max(again.seconds)])
            differ = sum(answer != solo[key] for key, answer in attacked.answers.items())
            print(
                f"{name} ({len(body) >> 10} KiB): slowest {max(attacked.seconds):.2f} s, without {without:.2f} s "
                f"({max(attacked.seconds) / without:.2f}); /health {attacked.health_seconds:.3f} s; "
                f"{differ} of {len(attacked.answers)} answers differ; hostile client: {dict(attacked.hostile)}",
                flush=True,
            )


def _period(url: str, arguments: argparse.Namespace, hostile: tuple[str, bytes] | None) -> Outcome:
    """Let the honest clients send all their requests, with the hostile client or without it."""
    outcome, ended = Outcome(), threading.Event()

    def attack() -> None:
        while hostile is not None and not ended.is_set():
            outcome.hostile[_post(url + hostile[0], hostile[1])[0]] += 1

    def one(client: int) -> None:
        for number in range(arguments.requests):
            began = time.perf_counter()
            outcome.answers[client, number] = _honest(url, client, number, arguments.tokens)[0]
            outcome.seconds.append(time.perf_counter() - began)

    attacker = threading.Thread(target=attack)
    with HealthWatch(url.removesuffix("/v1")) as health:
        attacker.start()
        with ThreadPoolExecutor(arguments.clients) as threads:
            list(threads.map(one, range(arguments.clients)))
        ended.set()
        attacker.join()
    outcome.health_seconds = health.found["slowest_seconds"]
    return outcome


def _honest(url: str, client: int, number: int, tokens: int) -> tuple[str, int]:
    """Return the text, and the status, of an honest request."""
    text = f"The river house of client {client} has a paper window number {number}."
    table = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": number}
    status, answer = _post(url + _CHAT, json.dumps(table).encode())
    return (json.loads(answer)["choices"][0]["message"]["content"] if status == 200 else f"status {status}"), status


def _post(url: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


if __name__ == "__main__":
    main()
