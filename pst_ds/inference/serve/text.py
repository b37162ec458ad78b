"""Routes of causal models: chat and plain completions, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase as Tokenizer

from pst_ds.checkpoint.user_store import State, UserNameError, UserStore, UserStoreError
from pst_ds.inference.serve.app import Service, no_model
from pst_ds.inference.serve.cpu_limit import call_within
from pst_ds.inference.serve.gate import PAGE
from pst_ds.inference.serve.grammar import Grammar, GrammarError, Grammars
from pst_ds.inference.serve.jobs import DONE_STOP, Answering, Job, Token
from pst_ds.inference.serve.prompt_size import ReaderTokenizers
from pst_ds.inference.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    JsonTable,
    ProtocolError,
    chat_request,
    read_json,
    validated,
)
from pst_ds.inference.serve.replies import ChatReply, CompletionReply, Piece, Reply, TokenText, usage
from pst_ds.inference.serve.text_stream import TextStream
from pst_ds.inference.serve.tools import ToolCalls

Item = Token | str | Exception
"""A generated token, and finally the finish reason or an error."""
_LOG = logging.getLogger(__name__)
USER_MARK = ":"
"""Separator between the name of the model and of a user."""
_DONE_CALLS = "tool_calls"
_CHAT_PAGE = Path(__file__).with_name("chat.html")
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextService(Service):
    """A causal model, and the users of a store."""

    worker: Answering
    tokenizer: Tokenizer
    tokenizers: ReaderTokenizers
    grammars: Grammars
    store: UserStore | None = None

    @property
    def models(self) -> list[str]:
        if self.store is None:
            return [self.name]
        try:
            self.store.refresh()
        except UserStoreError as error:
            raise _unreadable(error) from None
        return [self.name, *(f"{self.name}{USER_MARK}{user}" for user in self.store.names)]

    def add_routes(self, app: FastAPI) -> None:
        @app.get(PAGE)
        async def page() -> Response:
            return HTMLResponse(_CHAT_PAGE.read_text(), headers={"Content-Security-Policy": _PAGE_POLICY})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await _answer(self, request, is_chat=True)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await _answer(self, request, is_chat=False)

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
        raise no_model(model)

    def read_completion(self, body: bytes, is_long: bool = False) -> Question:
        """Return what a request for plain completions asks. Raises ProtocolError.

        Everything that needs no tokens is checked before the first text is tokenised.
        """
        asked = validated(CompletionRequest, read_json(body))
        self._require_limits(asked, len(asked.prompts))
        # the sizes of all prompts before the tokens of any: a rejected request must be cheap
        for prompt in asked.prompts:
            self._require_size(prompt, "prompt")
        state = self.state_of(asked.model)
        prompts = [self.continued(prompt, is_long) for prompt in asked.prompts]
        reply = CompletionReply(asked.model, has_logprobs=asked.likeliest is not None)
        return self._question(asked, state=state, prompts=prompts, reply=reply)

    def read_chat(self, body: bytes, is_long: bool = False) -> Question:
        """Return what a request for chat asks. Raises ProtocolError."""
        asked = chat_request(read_json(body))
        self._require_limits(asked, 1)
        tools = [tool.model_dump() for tool in asked.callable_tools]
        state = self.state_of(asked.model)
        prompts = [self.prompt_of(asked.chat, tools, is_long)]
        names = [tool.function.name for tool in asked.callable_tools]
        reply = ChatReply(asked.model, has_logprobs=asked.logprobs)
        question = self._question(asked, state=state, prompts=prompts, reply=reply)
        return replace(question, names=names, grammar=self._grammar_of(asked))

    def _grammar_of(self, asked: ChatRequest) -> Grammar | None:
        schema = asked.schema_of_answer
        if schema is None:
            return None
        try:
            return self.grammars.of_schema(schema)
        except GrammarError as error:
            place = "tools" if asked.must_call else "response_format"
            raise ProtocolError(400, f"the JSON schema is not supported: {error}", param=place) from None

    def _require_limits(self, asked: ChatRequest | CompletionRequest, prompts: int) -> None:
        """Raise ProtocolError for a request for too many or too long answers."""
        if prompts * asked.n > self.limits.answers:
            why = f"{prompts} prompts with {asked.n} answers each; at most {self.limits.answers} answers are given"
            raise ProtocolError(400, why, param="n")
        if asked.max_tokens is not None and asked.max_tokens > self.limits.new_tokens:
            raise ProtocolError(400, f"max_tokens may be at most {self.limits.new_tokens}", param="max_tokens")
        self._require_tokens(asked.sampling.logit_bias, "logit_bias")
        if asked.likeliest is not None:
            try:
                _ = self.grammars.tokens
            except GrammarError as error:
                raise ProtocolError(400, f"logprobs are not supported: {error}", param="logprobs") from None

    def _question(
        self, asked: ChatRequest | CompletionRequest, state: State | None, prompts: list[list[int]], reply: Reply
    ) -> Question:
        repeated: list[list[int]] = []
        for prompt in prompts:
            repeated += [prompt] * asked.n
        return Question(asked=asked, state=state, prompts=repeated, reply=reply)

    def prompt_of(
        self, messages: Sequence[JsonTable], tools: Sequence[JsonTable] = (), is_long: bool = False
    ) -> list[int]:
        """Return the tokens of messages and of the tools that the answer may call. Raises ProtocolError."""
        tokenizer = self.tokenizers.of(is_long)
        template = tokenizer.chat_template
        if template is None:
            why = "this model has no chat template. Use /v1/completions, or start the server with a template"
            raise ProtocolError(400, why, param="messages")
        if tools and "tools" not in str(template):
            raise ProtocolError(400, "the model's chat template does not support tools. Omit it.", param="tools")
        conversation: list[Any] = list(messages)  # transformers declares values as strings only
        # as text, so that its size is checked before it is tokenised
        render = partial(
            tokenizer.apply_chat_template,
            conversation,
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
        )
        try:
            text = str(call_within(self.limits.template_seconds, render))
            if len(text) > 4 * self.limits.body_bytes:  # only a template that loops expands a body this much
                raise ValueError(f"it wrote {len(text)} characters")
            self._require_size(text, "messages")
            # the template has written the special tokens
            prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except ProtocolError:
            raise
        except Exception as error:  # templates may raise anything
            why = f"the chat template refuses these messages: {str(error)[:1000]}"
            raise ProtocolError(400, why, param="messages") from None
        return self._of_right_length(prompt, "messages")

    def continued(self, prompt: str | list[int], is_long: bool = False) -> list[int]:
        """Return the tokens of a plain prompt. Raises ProtocolError."""
        self._require_size(prompt, "prompt")
        if isinstance(prompt, str):
            tokens = self.tokenizers.of(is_long)(prompt)["input_ids"]
            return self._of_right_length(list(tokens), "prompt")
        self._require_tokens(prompt, "prompt")
        return self._of_right_length(prompt, "prompt")

    def _require_tokens(self, tokens: Collection[int], param: str) -> None:
        if self.limits.vocabulary and max(tokens, default=0) >= self.limits.vocabulary:
            raise ProtocolError(400, f"tokens are below {self.limits.vocabulary}", param=param)

    @property
    def _most_prompt_tokens(self) -> int | None:
        """Longest prompt; None for no limit."""
        # one position remains for the answer's first token
        limits = (self.limits.prompt_tokens, self.limits.positions - 1)
        return min((most for most in limits if most > 0), default=None)

    def _require_size(self, prompt: str | list[int], param: str) -> None:
        """Raise ProtocolError for a prompt that is too long for any tokenisation of it, at no cost."""
        most = self._most_prompt_tokens
        if most is None:
            return
        unit = "tokens"
        if isinstance(prompt, str):
            most *= self.limits.token_characters  # 0 if the longest token is not known
            unit = "characters"
        if most and len(prompt) > most:
            why = f"{param}: {len(prompt)} {unit}; 1 to {most} are supported"
            raise ProtocolError(400, why, param=param, code="context_length_exceeded")

    def _of_right_length(self, prompt: list[int], param: str) -> list[int]:
        most = self._most_prompt_tokens or len(prompt)
        if not prompt or len(prompt) > most:
            why = f"{param}: {len(prompt)} tokens; 1 to {most} are supported"
            raise ProtocolError(400, why, param=param, code="context_length_exceeded")
        return prompt

    def new_tokens_of(self, asked: ChatRequest | CompletionRequest, prompt: Sequence[int]) -> int:
        """Return how many tokens may be generated."""
        most = asked.max_tokens or self.limits.new_tokens
        if self.limits.positions:
            most = min(most, self.limits.positions - len(prompt))
        return most

    def answers(self, question: Question, arrived: asyncio.Queue[tuple[int, Item]]) -> list[Answer]:
        """Return the answers to be generated, whose tokens go to ``arrived`` with their index."""
        loop = asyncio.get_running_loop()
        asked = question.asked

        # called in the worker's thread, where an asyncio.Queue may not be touched
        def put(index: int, item: Item) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(arrived.put_nowait, (index, item))

        seed = asked.seed
        if seed is None:
            seed = random.getrandbits(62)
        answers = []
        for index, prompt in enumerate(question.prompts):
            job = Job(
                prompt=prompt,
                max_tokens=self.new_tokens_of(asked, prompt),
                sampling=asked.sampling,
                seed=seed ^ index,  # several answers to one prompt differ
                put=partial(put, index),
                state=question.state,
            )
            job.likeliest = asked.likeliest
            if question.grammar is not None:
                job.grammar = question.grammar.copy()  # a grammar holds its place in one answer
            answers.append(Answer(index, job=job, service=self, stops=asked.stop, names=question.names))
        return answers


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks: one answer for each of ``prompts``, which repeat for several answers."""

    asked: ChatRequest | CompletionRequest
    state: State | None
    prompts: list[list[int]]
    reply: Reply
    names: Sequence[str] = ()
    """Tools that an answer may call."""
    grammar: Grammar | None = None


class Answer:
    """One answer to a request, as its tokens arrive."""

    def __init__(self, index: int, job: Job, service: TextService, stops: Sequence[str], names: Sequence[str]):
        self.index = index
        self.job = job
        self._service = service
        self.text = TextStream(service.tokenizer, stops)
        self._calls = ToolCalls(names) if names else None
        self._tokens: list[TokenText] = []
        """Tokens with log-probabilities whose text is not final yet."""
        self._last = 0.0
        """Time of the last token."""

    def take(self, item: Item) -> Piece | None:
        """Return the piece that is final now, the last one with a finish reason. Raises ProtocolError."""
        if isinstance(item, ProtocolError):
            raise item
        if isinstance(item, GrammarError):
            why = f"the JSON schema cannot be followed after {len(self.job.written)} tokens of the answer: {item}"
            raise ProtocolError(400, why, param="response_format" if self._calls is None else "tools")
        if isinstance(item, Exception):
            raise ProtocolError(500, "the model failed to process this request")
        if isinstance(item, str):
            text = self.text.end()
            if self.text.stopped:  # the text that was held back has a stop string
                return self._end(text, DONE_STOP)
            return self._end(text, item)
        if self.job.likeliest is not None:
            self._tokens.append(self._token(item))
        now = time.monotonic()
        if self._last:
            self._service.metrics.between.observe(now - self._last)
        self._last = now
        text = self.text.add(item.number)
        if self.text.stopped:
            self.job.cancelled = True
            return self._end(text, DONE_STOP)
        if self._calls is not None:
            text = self._calls.add(text)
        if not text:
            return None
        tokens = self._tokens
        self._tokens = []
        return Piece(self.index, text, tokens)

    def _end(self, text: str, why: str) -> Piece:
        calls: list[JsonTable] = []
        if self._calls is not None:
            text = self._calls.add(text)
            held_back, calls = self._calls.end()
            text += held_back
        if calls:
            why = _DONE_CALLS
        return Piece(self.index, text=text, tokens=self._tokens, calls=calls, why=why)

    def _token(self, token: Token) -> TokenText:
        def data(number: int) -> bytes:
            return self._service.grammars.tokens.decode_bytes([number])

        likeliest = [TokenText(data(number), logprob) for number, logprob in token.likeliest]
        return TokenText(data(token.number), token.logprob, likeliest)


async def _answer(service: TextService, request: Request, *, is_chat: bool) -> Response:
    began = time.monotonic()
    body = await request.body()
    read = service.read_chat if is_chat else service.read_completion
    # in another thread: templates and tokenisers would stop the streams of all others
    question = await service.readers.read(body, read, service.worker.waiting)
    if await request.is_disconnected():
        raise ProtocolError(499, "the client has gone")  # nobody reads this
    arrived: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
    answers = service.answers(question, arrived)
    service.worker.submit(*(answer.job for answer in answers))
    pieces = _pieces(service, answers, arrived, began, request.scope["pst_ds_facts"])
    if question.asked.stream:
        return _Stream(_events(question, answers, pieces), answers)
    watch = asyncio.create_task(_watch(request, arrived))
    whole = [Piece(answer.index) for answer in answers]
    try:
        async for piece in pieces:
            whole[piece.index].append(piece)
    finally:
        watch.cancel()
    return JSONResponse(question.reply.whole(whole, _used(question, answers)))


class _Stream(StreamingResponse):
    """A stream whose answers are cancelled at its end, also if its client has gone before the first event."""

    def __init__(self, events: AsyncIterator[str], answers: Sequence[Answer]):
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.job.cancelled = True


async def _watch(request: Request, arrived: asyncio.Queue[tuple[int, Item]]) -> None:
    """Stop waiting for an answer when its client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    arrived.put_nowait((-1, ConnectionError()))


async def _pieces(
    service: TextService,
    answers: Sequence[Answer],
    arrived: asyncio.Queue[tuple[int, Item]],
    began: float,
    facts: dict[str, object],
) -> AsyncIterator[Piece]:
    """Yield pieces of all answers as they arrive. Raises ProtocolError if the model failed. Notes counters."""
    missing = {answer.index for answer in answers}
    first = 0.0
    try:
        while missing:
            index, item = await arrived.get()
            if index < 0:
                raise ProtocolError(499, "the client has gone")  # nobody reads this
            if not first and isinstance(item, Token):
                first = time.monotonic() - began
                service.metrics.first.observe(first)
            if index not in missing:  # a token that was under way when a stop string ended the answer
                continue
            piece = answers[index].take(item)
            if piece is None:
                continue
            if piece.why:
                missing.remove(index)
            yield piece
    finally:
        for answer in answers:
            answer.job.cancelled = True  # nobody reads on
        facts["first_token_seconds"] = round(first, 4)
        for kind, number in _counts(answers).items():
            service.metrics.tokens.labels(kind).inc(number)
            facts[f"{kind}_tokens"] = number


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "prompt": sum(len(answer.job.prompt) for answer in answers),
        "cached": sum(answer.job.reused for answer in answers),
        "new": sum(answer.text.count for answer in answers),
    }


def _used(question: Question, answers: Sequence[Answer]) -> JsonTable:
    """Return the usage; the protocol counts a prompt once for several answers to it."""
    first_of_prompts = answers[:: question.asked.n]
    counts = _counts(first_of_prompts)
    new_tokens = _counts(answers)["new"]
    return usage(counts["prompt"], new_tokens, cached=counts["cached"])


async def _events(question: Question, answers: Sequence[Answer], pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream."""
    reply = question.reply
    for answer in answers:
        opening = reply.opening(answer.index)
        if opening is not None:
            yield _event(opening)
    try:
        async for piece in pieces:
            # the protocol's last chunk has the finish reason only
            if piece.text or piece.calls or piece.tokens:
                yield _event(reply.chunk(replace(piece, why=None)))
            if piece.why:
                yield _event(reply.chunk(Piece(piece.index, why=piece.why)))
        if question.asked.stream_options.include_usage:
            yield _event(reply.usage(_used(question, answers)))
    except ProtocolError as error:  # the status has been sent already
        yield _event(error.body())
    finally:
        for answer in answers:
            answer.job.cancelled = True
    yield "data: [DONE]\n\n"


def _event(table: JsonTable) -> str:
    return f"data: {json.dumps(table, ensure_ascii=False)}\n\n"


def _unreadable(error: UserStoreError) -> ProtocolError:
    _LOG.error("%s", error)
    return ProtocolError(500, "the adapter of this user, or the store, cannot be read", param="model")
