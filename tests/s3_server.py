"""A real S3 protocol on this host: moto's server, and the environment in which s3fs finds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "pst-ds"


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Serve an empty bucket on a free port, point this process's environment to it, and yield its address."""
    import requests
    import s3fs  # seconds, which only tests of S3 should take
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # moto keeps its buckets for the whole process
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=60).raise_for_status()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "tests")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("NO_PROXY", "127.0.0.1")
        # s3fs keeps its clients, and one of an earlier server would go on asking there
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        try:
            yield f"s3://{BUCKET}"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
