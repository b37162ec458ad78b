"""The HTTP application of any model: routes that all have, keys, limits, errors and counters."""

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pst_ds.inference.serve.gate import HEALTH, PAGE, Access, Gate
from pst_ds.inference.serve.metrics import Metrics, Record
from pst_ds.inference.serve.protocol import JsonTable, ProtocolError
from pst_ds.inference.serve.queue import Worker
from pst_ds.inference.serve.readers import Readers

_SWITCH_SECONDS = 0.00005
"""Longest time that a thread holds the interpreter while another waits: a pass must not wait for the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a request."""

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """Seconds until a body must have arrived."""
    template_seconds: float = 1.0
    """CPU seconds of the chat template per request."""
    prompt_tokens: int = 0
    """Longest prompt; 0 for what the model's positions allow."""
    new_tokens: int = 512
    positions: int = 0
    """Positions of the model; 0 for no limit."""
    vocabulary: int = 0
    """Tokens of the model."""
    answers: int = 32
    """Answers to one request."""
    token_characters: int = 0
    """Characters of the longest token, which bound the characters of a prompt; 0 for no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(ABC):
    """A model and how it answers requests."""

    name: str
    worker: Worker[Any]
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    metrics: Metrics = field(default_factory=Metrics, init=False)
    readers: Readers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "readers", Readers(self.worker.most_waiting))  # the class is frozen

    @property
    def load(self) -> dict[str, int]:
        """Numbers of running and of waiting requests; those that wait to be read wait too."""
        load = self.worker.load
        return load | {"waiting": load["waiting"] + self.readers.waiting}

    @property
    def models(self) -> list[str]:
        """The model names that a request may use. Raises ProtocolError."""
        return [self.name]

    @abstractmethod
    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of this kind of model."""


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        async with anyio.create_task_group():
            pass  # imports what the first stream would wait for
        yield
        service.readers.close()
        await asyncio.to_thread(service.worker.close)
        sys.setswitchinterval(before)

    app = FastAPI(title="pst-ds", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _answer_errors(app)
    began = int(time.time())

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        if service.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.metrics.note_load(service.load)
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def described(name: str) -> JsonTable:
        return {"id": name, "object": "model", "created": began, "owned_by": "pst-ds"}

    @app.get("/v1/models")
    async def models() -> JsonTable:
        # in a thread: the names of users are read from files
        names = await asyncio.to_thread(lambda: service.models)
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonTable:
        if name not in await asyncio.to_thread(lambda: service.models):
            raise no_model(name)
        return described(name)

    service.add_routes(app)
    limits = service.limits
    # the last one added is the outermost: Record also counts what Gate rejects
    app.add_middleware(Gate, access=service.access, most=limits.body_bytes, seconds=limits.body_seconds)
    quiet = (HEALTH, PAGE, "/metrics")
    app.add_middleware(Record, metrics=service.metrics, load=lambda: service.load, quiet=quiet)
    return app


def no_model(name: str) -> ProtocolError:
    return ProtocolError(404, f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")


def _answer_errors(app: FastAPI) -> None:
    """Answer every error with the protocol's error object."""

    @app.exception_handler(ProtocolError)
    async def refused(_: Request, error: ProtocolError) -> JSONResponse:
        headers = None
        if error.status in (429, 503):
            headers = {"Retry-After": "1"}  # seconds
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        hint = ""
        if error.status_code == 404:
            routes = [route for route in app.routes if isinstance(route, Route)]
            answered = [route.path for route in routes if "POST" in (route.methods or ())]
            hint = f". This model answers POST {' and '.join(answered)}"
        place = f"{request.method} {request.scope['path'][:200]}"
        why = ProtocolError(error.status_code, f"{place}: {error.detail}{hint}")
        return JSONResponse(why.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # its trace is logged
        return JSONResponse(ProtocolError(500, "the server failed to process this request").body(), 500)
