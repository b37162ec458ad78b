"""The HTTP application: routes of the chat-completions protocol, keys and limits."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from pst_ds.inference.serve.gate import HEALTH, Access, Gate
from pst_ds.inference.serve.jobs import DONE_STOP, Answering, BusyError, ClosingError, Job
from pst_ds.inference.serve.protocol import (
    ChatMessage,
    ChatRequest,
    Chunks,
    JsonTable,
    ProtocolError,
    completion,
    read_request,
)
from pst_ds.inference.serve.text_stream import TextStream
from pst_ds.train.users.store import UserNameError, UserStoreError

if TYPE_CHECKING:
    from _typeshed import TraceFunction
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pst_ds.train.users.store import State, UserStore

Items = asyncio.Queue[int | str | Exception]
"""Generated tokens, and finally the finish reason or an error."""
Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_SWITCH_SECONDS = 0.0005
"""Longest time that another thread may hold the interpreter before the event loop gets it back."""
_TRACE_EVENTS = 256
"""Lines and calls between two readings of the clock, which is slower than they are."""
USER_MARK = ":"
"""Separator between the name of the model and of a user."""


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


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that the routes need to answer."""

    name: str
    answering: Answering
    tokenizer: Tokenizer
    limits: Limits
    store: UserStore | None = None
    access: Access = field(default_factory=Access)
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reader"), init=False)
    """The only thread that reads requests: tokenizers are not thread-safe, and more would delay the event loop."""

    @property
    def models(self) -> list[str]:
        """Return the model names that a request may use. Raises ProtocolError."""
        if self.store is None:
            return [self.name]
        try:
            self.store.refresh()
        except UserStoreError as error:
            raise _unreadable(error) from None
        return [self.name, *(f"{self.name}{USER_MARK}{user}" for user in self.store.names)]

    def state_of(self, model: str) -> State | None:
        """Return the adapter state of the user in a model's name, None for the base model. Raises ProtocolError."""
        if model == self.name:
            return None
        user = model.removeprefix(self.name + USER_MARK)
        if user != model and self.store is not None:
            try:
                return self.store.latest_state(user)
            except UserNameError:
                pass
            except UserStoreError as error:
                raise _unreadable(error) from None
        raise _no_model(model)

    def read(self, body: bytes) -> tuple[ChatRequest, State | None, list[int]]:
        """Return a request, the state of its user and the tokens of its messages. Raises ProtocolError."""
        asked = read_request(body)
        return asked, self.state_of(asked.model), self.prompt_of(asked.chat)

    def prompt_of(self, messages: list[ChatMessage]) -> list[int]:
        """Return the tokens of the messages. Raises ProtocolError."""
        render = partial(self.tokenizer.apply_chat_template, messages, add_generation_prompt=True, tokenize=False)
        try:
            text = str(call_within(self.limits.template_seconds, render))
            if len(text) > 4 * self.limits.body_bytes:  # only a template that loops expands a body this much
                raise ValueError(f"it wrote {len(text)} characters")
            prompt = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # templates may raise anything
            why = f"the chat template refuses these messages: {str(error)[:1000]}"
            raise ProtocolError(400, why, param="messages") from None
        limits = [most for most in (self.limits.prompt_tokens, self.limits.positions - 1) if most > 0]
        most = min(limits, default=len(prompt))
        if not prompt or len(prompt) > most:
            why = f"the messages have {len(prompt)} tokens; 1 to {most} are supported"
            raise ProtocolError(400, why, param="messages", code="context_length_exceeded")
        return prompt

    def new_tokens_of(self, asked: ChatRequest, prompt: Sequence[int]) -> int:
        """Return how many tokens may be generated. Raises ProtocolError."""
        if asked.max_tokens is not None and asked.max_tokens > self.limits.new_tokens:
            raise ProtocolError(400, f"max_tokens may be at most {self.limits.new_tokens}", param="max_tokens")
        most = asked.max_tokens or self.limits.new_tokens
        return min(most, self.limits.positions - len(prompt)) if self.limits.positions else most


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the result of ``function``. Raises TimeoutError after ``seconds`` of CPU time.

    Python cannot stop a thread from outside, so the code checks the time at its lines and calls. A single call of C
    code is not interrupted. Time that the thread waits does not count.
    """
    end, events = time.thread_time() + seconds, count(1)

    def check(frame: FrameType, event: str, arg: object) -> TraceFunction:
        if not next(events) % _TRACE_EVENTS and time.thread_time() > end:
            raise TimeoutError(f"it ran for more than {seconds:g} seconds")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        return function()
    finally:
        sys.settrace(before)


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(title="pst-ds", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan(service))
    _answer_errors(app)
    began = int(time.time())

    @app.get(HEALTH)
    async def health() -> JSONResponse:
        is_alive = service.answering.is_alive
        return JSONResponse({"status": "ok" if is_alive else "failed"}, 200 if is_alive else 503)

    def described(name: str) -> JsonTable:
        return {"id": name, "object": "model", "created": began, "owned_by": "pst-ds"}

    @app.get("/v1/models")
    async def models() -> JsonTable:
        names = await asyncio.to_thread(lambda: service.models)
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JsonTable:
        if name not in await asyncio.to_thread(lambda: service.models):
            raise _no_model(name)
        return described(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, await request.body(), request)

    limits = service.limits
    app.add_middleware(Gate, access=service.access, most=limits.body_bytes, seconds=limits.body_seconds)
    return app


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return the context that prepares a server process, and closes the service at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        async with anyio.create_task_group():
            pass  # imports what the first stream would wait for
        yield
        service.reader.shutdown()
        await asyncio.to_thread(service.answering.close)
        sys.setswitchinterval(before)

    return lifespan


def _answer_errors(app: FastAPI) -> None:
    """Answer every error with the protocol's error object."""

    @app.exception_handler(ProtocolError)
    async def refused(_: Request, error: ProtocolError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        why = ProtocolError(error.status_code, f"{request.method} {request.scope['path'][:200]}: {error.detail}")
        return JSONResponse(why.body(), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # its trace is logged
        return JSONResponse(ProtocolError(500, "the server failed to process this request").body(), 500)


def _no_model(name: str) -> ProtocolError:
    return ProtocolError(404, f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")


def _unreadable(error: UserStoreError) -> ProtocolError:
    _LOG.error("%s", error)
    return ProtocolError(500, "the adapter of this user, or the store, cannot be read", param="model")


async def _answer(service: Service, body: bytes, request: Request) -> Response:
    loop, arrived = asyncio.get_running_loop(), Items()

    def put(item: int | str | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(arrived.put_nowait, item)

    asked, state, prompt = await loop.run_in_executor(service.reader, service.read, body)
    seed = random.getrandbits(62) if asked.seed is None else asked.seed
    job = Job(prompt, service.new_tokens_of(asked, prompt), asked.sampling, seed, put, state)
    try:
        service.answering.submit(job)
    except BusyError:
        raise ProtocolError(429, "too many requests are waiting. Try again later", code="rate_limit_exceeded") from None
    text = TextStream(service.tokenizer, asked.stop)
    pieces = _pieces(job, arrived, text)
    if asked.stream:
        return StreamingResponse(_events(asked, job, pieces, text), media_type="text/event-stream")
    watch = asyncio.create_task(_watch(request, arrived))
    try:
        parts = [item async for item in pieces]
    finally:
        watch.cancel()
    whole, why = "".join(piece for piece, _ in parts), parts[-1][1]
    return JSONResponse(completion(asked.model, whole, why, len(prompt), text.count))


async def _watch(request: Request, arrived: Items) -> None:
    """Stop waiting for an answer when its client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    arrived.put_nowait(ConnectionError())


async def _pieces(job: Job, arrived: Items, text: TextStream) -> AsyncIterator[tuple[str, str]]:
    """Yield (text, "") as text arrives, then (rest, finish reason). Raises ProtocolError if the model failed."""
    try:
        while not text.stopped:
            item = await arrived.get()
            if isinstance(item, ConnectionError):
                raise ProtocolError(499, "the client has gone")  # nobody reads this
            if isinstance(item, ClosingError):
                raise ProtocolError(503, "the server is closing. Try again later")
            if isinstance(item, Exception):
                raise ProtocolError(500, "the model failed to process this request")
            if isinstance(item, str):
                rest = text.end()
                yield rest, DONE_STOP if text.stopped else item
                return
            if piece := text.add(item):
                yield piece, ""
        yield "", DONE_STOP
    finally:
        job.cancelled = True  # nobody reads on


async def _events(
    asked: ChatRequest, job: Job, pieces: AsyncIterator[tuple[str, str]], text: TextStream
) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream."""
    chunks = Chunks(asked.model)
    yield _event(chunks.delta({"role": "assistant", "content": ""}))
    try:
        async for piece, why in pieces:
            if piece:
                yield _event(chunks.delta({"content": piece}))
            if why:
                yield _event(chunks.delta({}, why))
        if asked.stream_options.include_usage:
            yield _event(chunks.usage(len(job.prompt), text.count))
    except ProtocolError as error:  # the status has been sent already
        yield _event(error.body())
    finally:
        job.cancelled = True
    yield "data: [DONE]\n\n"


def _event(table: JsonTable) -> str:
    return f"data: {json.dumps(table, ensure_ascii=False)}\n\n"
