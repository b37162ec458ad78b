"""What a server measures: counters for Prometheus, and a log line per request, without text of users."""

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import Message, Receive, Send

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder in which workers share their counters; read by prometheus_client."""
_LOG = logging.getLogger(__name__)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of a process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter("pst_ds_requests", "Requests by route, status", ["route", "status"], registry=registry)
        timing = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.seconds = timing("pst_ds_request_seconds", "Time of a request")
        self.tokens = Counter("pst_ds_tokens", "Tokens: prompt, cached (in prompts), new", ["kind"], registry=registry)
        self.first = timing("pst_ds_first_token_seconds", "Time to the first token")
        self.between = timing("pst_ds_next_token_seconds", "Time between tokens")
        self.load = Gauge("pst_ds_load", "Requests by state", ["state"], registry=registry, multiprocess_mode="livesum")

    def note_load(self, load: Mapping[str, int]) -> None:
        for state, number in load.items():
            self.load.labels(state).set(number)

    def page(self) -> bytes:
        """Return the counters of all workers in Prometheus' text format."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return generate_latest(self._registry)
        # the load of workers that have ended would be added to that of the others
        for file in Path(folder).glob("gauge_live*_*.db"):
            process = file.stem.rpartition("_")[2]
            if not Path("/proc", process).exists():
                mark_process_dead(int(process), folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return generate_latest(registry)


class Record:
    """Counts requests that ``app`` answers, and logs a line for each."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        metrics: Metrics,
        load: Callable[[], Mapping[str, int]],
        quiet: Collection[str],
    ):
        """``load``: numbers of running and waiting answers. ``quiet``: routes that are neither counted nor logged."""
        self._app = app
        self._metrics = metrics
        self._load = load
        self._quiet = quiet

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._quiet:
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 499  # "client closed request", unless an answer starts
        facts = scope.setdefault("pst_ds_facts", {})  # routes add to it

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            seconds = time.monotonic() - began
            # the route's pattern, because paths of strangers would be an unlimited number of labels
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.observe(seconds)
            self._metrics.note_load(self._load())
            line = {"time": round(time.time(), 3), "route": route, "status": status, "seconds": round(seconds, 4)}
            _LOG.info("%s", json.dumps(line | facts))
