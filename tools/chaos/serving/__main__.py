"""Test a server with users under concurrent load, with invalid requests and a killed worker.

A tiny model with users is trained. The expected answers are written one by one, by the server before the load, greedily
and for two seeds; with ``--engine torch`` by transformers, greedily and without users. ``pst-ds serve`` is started with
several workers, and clients in threads request completions for random users, half of them as streams, mixed with
invalid requests, abandoned streams and connections with half a request. After a third of the load a worker is killed
with SIGKILL; interrupted requests are repeated. In the end every text must be the expected one, every invalid request
must have its documented status, no other worker may have died, the killed one must be replaced, memory must not have
grown, and no worker may have more open files than before the load. With ``--no-kill``, ``/health`` must always have
answered within a second.

    python -m tools.chaos.serving --seconds 120 --json
    python -m tools.chaos.serving --clients 4 --requests 20 --users 4
    python -m tools.chaos.serving --clients 64 --bad 0.1 --no-kill
    python -m tools.chaos.serving --workers 1 --no-kill --bad 0.1 --requests 320 --seconds 1800

Needs the extra ``serve`` and the package openai. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tools.chaos.serving.clients import Load, ask_alone, client
from tools.chaos.serving.health import HealthWatch
from tools.chaos.serving.model import answers, tiny_model
from tools.chaos.serving.server import Server

MOST_GROWTH = 0.05
"""Maximum growth of a worker's memory, from the second fifth of its samples to the last."""
MOST_HEALTH_SECONDS = 1.0
"""Maximum seconds for an answer of /health while no worker is killed."""
_LOOK_SECONDS, _LEAST_SAMPLES = 0.25, 40
_SPARE_FILES, _CLOSE_SECONDS = 8, 30.0
"""Open files that a worker may have more than before the load, some seconds after it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.chaos.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bad", type=float, default=0.05, metavar="SHARE", help="of wrong requests (default: 0.05)")
    kill = "kill a worker at a third of the load, which may cut answers of /health too (default)"
    parser.add_argument("--kill", action=argparse.BooleanOptionalAction, default=True, help=kill)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load at most (default: 120)")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="of each client at most; 0 is no limit")
    parser.add_argument("--engine", choices=("native", "torch"), default="native")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as top:
        facts = load_server(args, Path(top))
    print(json.dumps(facts) if args.json else json.dumps(facts, indent=1))
    return 0 if facts["passed"] else 1


def load_server(args: argparse.Namespace, top: Path) -> dict[str, Any]:
    """Serve, send requests and kill a worker. Return the results."""
    is_native = args.engine == "native"
    served = tiny_model(top, args.users, "int8" if is_native else "bf16")
    users = [None, *(f"user {i:02}" for i in range(args.users if is_native else 0))]
    arguments = served.arguments(args.engine)
    with Server(arguments, workers=args.workers, log=top / "server.log") as server:
        alone = partial(ask_alone, server.url, served.model.name, users, (None, 1, 2))
        right = alone() if is_native else answers(served)
        server.look()
        load = Load(right, name=served.model.name, url=server.url)
        end = time.monotonic() + args.seconds

        def goes_on(number: int) -> bool:
            return time.monotonic() < end and (not args.requests or number < args.requests)

        threads = [
            threading.Thread(target=client, args=(load, args.seed + i, goes_on, args.bad)) for i in range(args.clients)
        ]
        began = time.monotonic()
        total = args.clients * args.requests
        with HealthWatch(server.url) as health:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(_LOOK_SECONDS)
                server.look()
                share = (time.monotonic() - began) / args.seconds
                if args.kill and not server.killed and max(share, load.asked / total if total else 0.0) > 1 / 3:
                    server.kill_one()
        for held in load.held:
            held.close()
        seconds = time.monotonic() - began
        while any(files[-1] > files[0] + _SPARE_FILES for files in server.files.values()):
            time.sleep(_LOOK_SECONDS)  # connections close some seconds after the load
            if time.monotonic() - began > seconds + _CLOSE_SECONDS:
                break
            server.look()
        workers_at_end = len(server.answering())
        replaced = server.wait_for_replacement()
        code = server.stop()
    growth = [grown for samples in server.memory.values() if (grown := _growth(samples)) is not None]
    facts = {
        "clients": args.clients, "users": args.users, "workers": args.workers, "seconds": round(seconds, 1),
        "distinct_answers": len(set(right.values())), "requests": load.asked, "right": load.right,
        "wrong": len(load.wrong), "refused": load.refused.total(), "misjudged": len(load.misjudged), "cut": load.cut,
        "left": load.left, "held": len(load.held), "health": health.found,
        "killed": len(server.killed), "died": server.died, "replaced": replaced,
        "answering_at_end_of_load": workers_at_end, "exit_code": code,
        "mb_of_workers": [round(samples[-1] / 1e6) for samples in server.memory.values()],
        "open_files": [[files[0], max(files), files[-1]] for files in server.files.values()],
        "memory_growth": round(max(growth), 4) if growth else None,
        "examples": [*load.wrong[:5], *load.misjudged[:5]],
    }  # fmt: skip
    ended = code == (0 if args.workers > 1 else -signal.SIGTERM)  # as uvicorn ends
    good = ended and not load.wrong and not load.misjudged and not server.died and replaced and load.right > 0
    is_healthy = args.kill or (health.found["slowest_seconds"] < MOST_HEALTH_SECONDS and not health.found["failed"])
    good = good and all(files[-1] <= files[0] + _SPARE_FILES for files in server.files.values())
    facts["passed"] = bool(good and is_healthy and max(growth, default=0.0) <= MOST_GROWTH)
    return facts


def _growth(samples: list[int]) -> float | None:
    """Return the relative growth of a worker's memory after warm-up; None for a worker with too few samples."""
    if len(samples) < _LEAST_SAMPLES:
        return None
    fifth = len(samples) // 5
    return median(samples[-fifth:]) / median(samples[fifth : 2 * fifth]) - 1.0


if __name__ == "__main__":
    sys.exit(main())
