"""Poll ``/health`` from a separate process, which no client's threads delay.

    python -m tools.chaos.serving.health http://127.0.0.1:8000

Ends with its standard input. Prints the number of answers and failures, and the seconds of the slowest answer and of
the 99th percentile; and the largest delay of its wake-ups, which on a loaded machine is part of those.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from http.client import HTTPConnection
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tools.chaos.launch import ROOT

_PAUSE, _GIVE_UP = 0.05, 30.0


class HealthWatch:
    """The polling process, for the duration of the context. ``found``: what it printed."""

    def __init__(self, url: str):
        command = [sys.executable, "-m", "tools.chaos.serving.health", url]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.found: dict[str, Any] = {}

    def __enter__(self) -> HealthWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        printed, _ = self._process.communicate()
        self.found = json.loads(printed)


def main(url: str) -> None:
    address = urlsplit(url)
    failures, seconds, late = 0, [0.0], 0.0
    slept = time.monotonic()
    while not select.select([sys.stdin], [], [], _PAUSE)[0]:
        began = time.monotonic()
        late = max(late, began - slept - _PAUSE)
        connection = HTTPConnection(address.hostname or "", address.port, timeout=_GIVE_UP)
        try:
            connection.request("GET", "/health")
            failures += connection.getresponse().status != 200
        except OSError:
            failures += 1
        connection.close()
        slept = time.monotonic()
        seconds.append(slept - began)
    facts = {"slowest_seconds": max(seconds), "p99_seconds": sorted(seconds)[len(seconds) * 99 // 100], "late": late}
    rounded = {name: round(value, 3) for name, value in facts.items()}
    print(json.dumps({"asked": len(seconds) - 1, "failed": failures, **rounded}))


if __name__ == "__main__":
    main(sys.argv[1])
