"""Routes of classifiers, regressors and embedding models, whose waiting texts are computed in batches."""

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pst_ds.inference.encoder.encoder import EMBEDDER, Encoder, Features, batches
from pst_ds.inference.serve.app import Service, no_model
from pst_ds.inference.serve.jobs import Worker, busy, closing
from pst_ds.inference.serve.prompt_size import ReaderTokenizers
from pst_ds.inference.serve.protocol import JsonTable, PredictionRequest, ProtocolError, read_json, validated
from pst_ds.inference.serve.replies import usage

Job = tuple[Features, "Future[np.ndarray]"]
"""The tokens of a text, and its outputs once they are computed."""
_LOG = logging.getLogger(__name__)


class Batcher(Worker[Job]):
    """Computes waiting texts, those of similar length together, as soon as the last batch is done."""

    def __init__(self, encoder: Encoder, most_waiting: int):
        super().__init__(most_waiting)
        self._encoder, self._batch = encoder, list[Job]()

    @property
    def running(self) -> int:
        return len(self._batch)

    def submit(self, texts: Sequence[Features]) -> list[Future[np.ndarray]]:
        """Queue texts. Raises ProtocolError if too many wait."""
        jobs: list[Job] = [(text, Future()) for text in texts]
        with self._changed:
            if len(self._waiting) >= self.most_waiting:
                raise busy()
            self._waiting += jobs
            self._changed.notify()
        return [future for _, future in jobs]

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            if jobs:
                self._compute(jobs)
            self._batch = []

    def _next(self) -> list[Job] | None:
        """Return the batch with the oldest text, when there is one, without texts that nobody waits for; None at the
        end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                for _, future in self._waiting:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(closing())
                return None
            lengths = [len(text["input_ids"]) for text, _ in self._waiting]
            chosen = next(set(batch) for batch in batches(lengths, self._encoder.batch) if 0 in batch)
            jobs = [job for index in chosen if (job := self._waiting[index])[1].set_running_or_notify_cancel()]
            self._waiting = [job for index, job in enumerate(self._waiting) if index not in chosen]
            self._batch = jobs
            return jobs

    def _compute(self, jobs: Sequence[Job]) -> None:
        try:
            rows = self._encoder.compute([text for text, _ in jobs])
        except Exception as error:
            if len(jobs) > 1:  # one text must not fail the others
                for job in jobs:
                    self._compute([job])
                return
            _LOG.exception("a text failed")
            jobs[0][1].set_exception(error)
            return
        for (_, future), row in zip(jobs, rows, strict=True):
            future.set_result(row)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderService(Service):
    """A classifier, a regressor or an embedding model."""

    encoder: Encoder
    worker: Batcher
    tokenizers: ReaderTokenizers

    def add_routes(self, app: FastAPI) -> None:
        @app.post("/v1/embeddings" if self.encoder.kind == EMBEDDER else "/v1/classify")
        async def predict(request: Request) -> Response:
            asked, texts = await self.readers.read(await request.body(), self.read, self.worker.waiting)
            rows = await asyncio.gather(*map(asyncio.wrap_future, self.worker.submit(texts)))
            tokens = sum(len(text["input_ids"]) for text in texts)
            self.metrics.tokens.labels("prompt").inc(tokens)
            request.scope["pst_ds_facts"] |= {"texts": len(texts), "prompt_tokens": tokens}
            return JSONResponse(self.reply(asked, np.stack(rows), tokens))

    def read(self, body: bytes, is_long: bool = False) -> tuple[PredictionRequest, Sequence[Features]]:
        """Return a request and the tokens of its texts. Raises ProtocolError."""
        asked, most = validated(PredictionRequest, read_json(body)), self.encoder.max_length
        if asked.model != self.name:
            raise no_model(asked.model)
        limit = asked.truncate_prompt_tokens
        if limit is not None and limit > most:
            why = f"truncate_prompt_tokens = {limit} is more than the maximum context length, {most}"
            raise ProtocolError(400, why, param="truncate_prompt_tokens")
        try:
            texts = self.encoder.tokenized(asked.texts, most if limit == -1 else limit, self.tokenizers.of(is_long))
        except ValueError as error:
            raise ProtocolError(400, str(error), param="input") from None
        longest = max(len(text["input_ids"]) for text in texts)
        if longest > most:
            why = (
                f"This model's maximum context length is {most} tokens, and an input has {longest}. Shorten it, or "
                "set truncate_prompt_tokens to -1"
            )
            raise ProtocolError(400, why, param="input", code="context_length_exceeded")
        return asked, texts

    def reply(self, asked: PredictionRequest, outputs: np.ndarray, tokens: int) -> JsonTable:
        """Return the answer to a request. Raises ProtocolError for ``dimensions`` that the model does not have."""
        if asked.dimensions not in (None, outputs.shape[1]):
            why = f"dimensions = {asked.dimensions}: this model has {outputs.shape[1]}. Omit it"
            raise ProtocolError(400, why, param="dimensions")
        table: JsonTable = {"object": "list", "model": asked.model, "usage": usage(tokens, 0)}
        if self.encoder.kind == EMBEDDER:
            coded = [base64.b64encode(row).decode() for row in outputs.astype("<f4")]
            rows: Sequence[object] = coded if asked.encoding_format == "base64" else self.encoder.plain(outputs)
            return table | {
                "data": [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(rows)]
            }
        labels = [self.encoder.labels[best] for best in outputs.argmax(-1)] if self.encoder.labels else None
        data = [
            {"index": at, "label": labels[at] if labels else None, "probs": row, "num_classes": len(row)}
            for at, row in enumerate(self.encoder.plain(outputs))
        ]
        return table | {"id": f"classify-{uuid.uuid4().hex}", "created": int(time.time()), "data": data}
