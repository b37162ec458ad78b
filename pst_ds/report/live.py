"""A report over HTTP that follows its runs: the page polls the state of their files and reloads when it changes. Needs
no torch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, LAYERS_FILE, METRICS_FILE, RESULT_FILE, RUN_FILE, TUNE_FILE

STATE_PATH = "/state"
FOLLOWED = (RUN_FILE, METRICS_FILE, LAYERS_FILE, RESULT_FILE, TUNE_FILE, CHECKPOINTS)
"""Files of a run that its state depends on."""


def state_of(folders: Sequence[Path]) -> str:
    """Return a string that changes when a file of a run changes."""
    stats = []
    for path in (folder / name for folder in folders for name in FOLLOWED):
        try:
            found = path.stat()
            stats.append((str(path), found.st_mtime_ns, found.st_size))
        except OSError:
            stats.append((str(path), 0, 0))
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


class LiveReport:
    """The current page of ``folders``. ``render`` builds it for a state; calls do not overlap."""

    def __init__(self, folders: Sequence[Path], render: Callable[[str], bytes]):
        self._folders, self._render = folders, render
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] = ("", b"")

    @property
    def state(self) -> str:
        """The current state of the runs."""
        return state_of(self._folders)

    def page(self) -> bytes:
        """Return the page. Raises InputError for files that cannot be read now."""
        with self._lock:
            state = self.state
            if self._page[0] != state:
                self._page = state, self._render(state)
            return self._page[1]


def server_of(report: LiveReport, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of ``report``. Port 0 chooses a free one. Raises InputError."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == STATE_PATH:
                self._answer(200, "text/plain", report.state.encode())
            elif path == "/":
                try:
                    self._answer(200, "text/html", report.page())
                except InputError as error:
                    self._answer(503, "text/plain", f"{error}\n".encode())
            else:
                self._answer(404, "text/plain", b"only / exists\n")

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing, because the page polls all the time."""

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
            for name, value in {**headers, "Cache-Control": "no-store"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be listened on: {error}. Name another port, or 0 for a free one"
        ) from None
