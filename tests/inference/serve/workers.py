"""A server of two workers that say who they are, as test_processes.py starts it: no model, so they begin at once."""

from __future__ import annotations

import os
import sys
from functools import partial

from fastapi import FastAPI

from pst_ds.errors import InputError
from pst_ds.inference.serve import processes
from pst_ds.inference.serve.processes import answer_from_workers, bound


def make(wrong: str) -> FastAPI:
    if wrong:
        raise InputError(wrong)
    app = FastAPI()
    app.get("/")(os.getpid)
    return app


if __name__ == "__main__":
    from tests.inference.serve import workers  # spawned processes know it by this name

    processes._HANG_SECONDS = 3  # which is also how long a death while it starts may go unnoticed
    with bound("127.0.0.1", 0) as at:
        print(at.getsockname()[1], flush=True)
        sys.exit(0 if answer_from_workers(partial(workers.make, sys.argv[1]), at, 2) else 1)
