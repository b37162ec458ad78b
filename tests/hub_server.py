"""A server of the part of the Hugging Face hub's protocol that huggingface_hub and transformers use to read models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".onnx", ".h5", ".msgpack")
"""Endings of files that are stored elsewhere, to which the server redirects."""


class HubServer(ThreadingHTTPServer):
    """Serve folders as repositories, and record what is asked for.

    Attributes:
        repositories: folder of each repository, by "owner/name"; its commit follows from the names and bytes in it.
        gated: names of the repositories that refuse to send files.
        sent: (method, repository's file, bytes sent) of each request for a file's content; "RANGE" for a part of one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.gated = set[str]()
        self.sent: list[tuple[str, str, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/stored"
        """Another host for the client, as the hub's storage is."""

    def commit(self, name: str) -> str:
        """Return the 40 hexadecimal digits of a repository's only revision."""
        digest = hashlib.sha1(name.encode())
        for file in files_of(self.repositories[name]):
            digest.update(file.encode() + (self.repositories[name] / file).read_bytes())
        return digest.hexdigest()

    def received(self, least: int = 0) -> set[str]:
        """Return the names of the files that were sent whole and have more than ``least`` bytes."""
        return {file for method, file, count in self.sent if method == "GET" and count > least}


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/stored/([^/]+/[^/]+)/(.+)", path):
            self._content(match[1], match[2], {})
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        body = json.dumps({"error": code}).encode()
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code, **headers}, body)

    def _is_refused(self, name: str, revision: str | None) -> bool:
        if name not in self.server.repositories:
            self._refuse(401, "RepoNotFound")
        elif revision not in (None, "main", self.server.commit(name)):
            self._refuse(404, "RevisionNotFound")
        else:
            return False
        return True

    def _api(self, name: str, what: str | None, revision: str | None) -> None:
        if self._is_refused(name, revision):
            return
        folder = self.server.repositories[name]
        sizes = {file: (folder / file).stat().st_size for file in files_of(folder)}
        if what == "tree":
            entries = [
                {
                    "type": "file",
                    "path": file,
                    "size": size,
                    "oid": hashlib.sha1((folder / file).read_bytes()).hexdigest(),
                }
                for file, size in sizes.items()
            ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())
            return
        siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
        table = {"id": name, "modelId": name, "sha": self.server.commit(name), "siblings": siblings, "private": False}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(table).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if self._is_refused(name, revision):
            return
        path, commit = self.server.repositories[name] / file, {"X-Repo-Commit": self.server.commit(name)}
        if name in self.server.gated:
            self._refuse(403, "GatedRepo", **commit)
        elif not path.is_file():
            self._refuse(404, "EntryNotFound", **commit)
        elif file.endswith(LARGE):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
            self._send(302, {"Location": f"{self.server.storage}/{quote(name)}/{quote(file)}", **linked, **commit})
        else:
            self._content(name, file, commit)

    def _content(self, name: str, file: str, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that was asked for."""
        data = (self.server.repositories[name] / file).read_bytes()
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted, status = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")), 200
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        method = "RANGE" if status == 206 else self.command
        self.server.sent.append((method, f"{name}/{file}", len(data)))
        self._send(status, headers, data)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving() -> Iterator[HubServer]:
    """Yield a server that answers until the end of the context."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, url: str | None) -> None:
    """Let this process find the hub at ``url``, or no hub for None, and its cache in ``cache``.

    The environment is set too, for processes that it starts; libraries in this process have read it at import.
    """
    import huggingface_hub.hf_api
    from huggingface_hub import constants
    from transformers.utils import hub

    place = url or "http://127.0.0.1:9"
    offline = url is None
    for name, value in {"HF_ENDPOINT": place, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": str(int(offline))}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", place)
    for name in ("HF_HUB_OFFLINE", "_is_offline_mode"):
        if hasattr(hub, name):
            monkeypatch.setattr(hub, name, offline)
