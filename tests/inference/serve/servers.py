"""An application behind a real server, with the settings of ``pst-ds serve``, in a thread of the test."""

from __future__ import annotations

import threading

import uvicorn
from fastapi import FastAPI

from pst_ds.inference.serve.processes import bound, config


def start(app: FastAPI) -> tuple[uvicorn.Server, threading.Thread, str]:
    """Serve ``app`` on a free port; return the server, its thread and its address."""
    at = bound("127.0.0.1", 0)
    server = uvicorn.Server(config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
        assert thread.is_alive()
    return server, thread, f"http://127.0.0.1:{at.getsockname()[1]}"


def stop(server: uvicorn.Server, thread: threading.Thread) -> None:
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
