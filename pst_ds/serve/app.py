"""The HTTP application: routes of the chat-completions protocol, keys and limits."""

from __future__ import annotations

import asyncio
import hmac
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pst_ds.errors import InputError
from pst_ds.serve.batches import DONE_STOP, Batches, BusyError, Job
from pst_ds.serve.protocol import ChatRequest, Chunks, ProtocolError, chat_request, completion
from pst_ds.serve.texts import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pst_ds.users.store import UserStore

Message = MutableMapping[str, Any]
USER_MARK = ":"
"""Stands between the model's name and a user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    body_bytes: int = 1 << 20
    prompt_tokens: int = 0
    """0 is what the model's positions leave."""
    new_tokens: int = 512
    positions: int = 0
    """Of the model; 0 for no limit."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes answer from."""

    name: str
    batches: Batches
    tokenizer: Tokenizer
    limits: Limits
    store: UserStore | None = None
    keys: Sequence[str] = ()

    def user_of(self, model: str) -> str | None:
        """Return the user that a model's name means, None for the base. Raises ProtocolError."""
        if model == self.name:
            return None
        name, mark, user = model.partition(USER_MARK)
        if name == self.name and mark and self.store is not None and user in self.store:
            return user
        raise ProtocolError(404, f"the model {model[:200]!r} does not exist", param="model", code="model_not_found")

    def prompt_of(self, asked: ChatRequest) -> list[int]:
        """Return the tokens of the messages. Raises ProtocolError."""
        try:
            ids: Any = self.tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like
            raise ProtocolError(400, f"the chat template refuses these messages: {error}", param="messages") from None
        prompt = list(ids["input_ids"])
        most = self.limits.prompt_tokens or max(0, self.limits.positions - 1) or len(prompt)
        if not prompt or len(prompt) > most:
            raise ProtocolError(
                400, f"the messages are {len(prompt)} tokens, and 1 to {most} are served", param="messages",
                code="context_length_exceeded",
            )  # fmt: skip
        return prompt

    def new_tokens_of(self, asked: ChatRequest, prompt: Sequence[int]) -> int:
        """Return how many tokens may be written. Raises ProtocolError."""
        if asked.max_tokens is not None and asked.max_tokens > self.limits.new_tokens:
            raise ProtocolError(400, f"max_tokens may be at most {self.limits.new_tokens}", param="max_tokens")
        most = asked.max_tokens or self.limits.new_tokens
        return min(most, self.limits.positions - len(prompt)) if self.limits.positions else most


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batches.close)

    app = FastAPI(title="pst-ds", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    began = int(time.time())

    @app.exception_handler(ProtocolError)
    async def refused(_: Request, error: ProtocolError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _require_key(request, service.keys)
        users = [] if service.store is None else service.store.names
        names = [service.name, *(f"{service.name}{USER_MARK}{user}" for user in users)]
        data = [{"id": name, "object": "model", "created": began, "owned_by": "pst-ds"} for name in names]
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        _require_key(request, service.keys)
        try:
            asked = chat_request(json.loads(await request.body()))
        except (ValueError, RecursionError):
            raise ProtocolError(400, "the body is not JSON") from None
        return await _answer(service, asked)

    app.add_middleware(_BodyLimit, most=service.limits.body_bytes)
    return app


async def _answer(service: Service, asked: ChatRequest) -> Response:
    user, prompt = service.user_of(asked.model), service.prompt_of(asked)
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[int | str | Exception] = asyncio.Queue()
    seed = random.getrandbits(62) if asked.seed is None else asked.seed
    job = Job(
        prompt, service.new_tokens_of(asked, prompt), asked.sampling, seed,
        lambda item: _hand_over(loop, arrived, item), user,
    )  # fmt: skip
    try:
        service.batches.submit(job)
    except BusyError:
        raise ProtocolError(429, "too many requests wait; try again later", code="rate_limit_exceeded") from None
    except InputError as error:
        raise ProtocolError(404, str(error), param="model", code="model_not_found") from None
    text = TextStream(service.tokenizer, asked.stop)
    pieces = _pieces(job, arrived, text)
    if asked.stream:
        return StreamingResponse(_events(service, asked, job, pieces, text), media_type="text/event-stream")
    parts = [item async for item in pieces]
    return JSONResponse(
        completion(asked.model, "".join(piece for piece, _ in parts), parts[-1][1], len(prompt), text.count)
    )


def _hand_over(
    loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[int | str | Exception], item: int | str | Exception
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(arrived.put_nowait, item)


async def _pieces(
    job: Job, arrived: asyncio.Queue[int | str | Exception], text: TextStream
) -> AsyncIterator[tuple[str, str]]:
    """Yield (text, "") as it comes, and at the end (rest, why). Raises ProtocolError where the model failed."""
    try:
        while True:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise ProtocolError(500, "the model failed at this request")
            if isinstance(item, str):
                rest = text.end()
                yield rest, DONE_STOP if text.stopped else item
                return
            if piece := text.add(item):
                yield piece, ""
            if text.stopped:
                yield "", DONE_STOP
                return
    finally:
        job.cancelled = True  # nobody reads on


async def _events(
    service: Service, asked: ChatRequest, job: Job, pieces: AsyncIterator[tuple[str, str]], text: TextStream
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
        if asked.with_usage:
            yield _event(chunks.usage(len(job.prompt), text.count))
    except ProtocolError as error:  # the status is sent already
        yield _event(error.body())
    finally:
        job.cancelled = True
    yield "data: [DONE]\n\n"


def _event(table: dict[str, Any]) -> str:
    return f"data: {json.dumps(table, ensure_ascii=False)}\n\n"


def _require_key(request: Request, keys: Sequence[str]) -> None:
    """Raise ProtocolError unless the request has one of ``keys``, where there are some."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    same = [hmac.compare_digest(given, key.encode()) for key in keys]  # all of them, in whatever time that takes
    if keys and not any(same):
        raise ProtocolError(401, "this server wants one of its keys (Authorization: Bearer …)", code="invalid_api_key")


class _BodyLimit:
    """Answers 413 to a request whose body is longer than ``most`` bytes, whatever it says of its length."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self._most:
                error = ProtocolError(413, f"the body has more than {self._most} bytes")
                await JSONResponse(error.body(), 413)(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, receive_again, send)
