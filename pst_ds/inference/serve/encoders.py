"""Routes of classifiers, regressors and embedding models, whose waiting texts are computed in batches."""

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from pst_ds.inference.encoder.encoder import EMBEDDER, Encoder, Features, batches
from pst_ds.inference.serve.app import Service, no_model
from pst_ds.inference.serve.prompt_size import ReaderTokenizers
from pst_ds.inference.serve.protocol import JsonTable, PredictionRequest, ProtocolError, read_json, validated
from pst_ds.inference.serve.queue import BatchWorker
from pst_ds.inference.serve.replies import usage


@dataclass(slots=True, eq=False)
class Text:
    """A text to compute, and its outputs once they are computed."""

    features: Features
    future: "Future[np.ndarray]" = field(default_factory=Future)

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    @property
    def is_finished(self) -> bool:
        return self.future.done()

    def begin(self) -> bool:
        """Return False if the future was cancelled; it cannot be cancelled afterwards."""
        return self.future.set_running_or_notify_cancel()

    def end(self, outcome: Exception) -> None:
        self.future.set_exception(outcome)


class Batcher(BatchWorker[Text]):
    """Computes waiting texts, those of similar length together, as soon as the last batch is done."""

    def __init__(self, encoder: Encoder, most_waiting: int):
        super().__init__(most_waiting)
        self._encoder = encoder

    def outputs(self, texts: Sequence[Features]) -> "list[Future[np.ndarray]]":
        """Queue texts and return their outputs. Raises ProtocolError if too many wait."""
        jobs = [Text(features) for features in texts]
        self.submit(*jobs)
        return [job.future for job in jobs]

    def _has_room(self, number: int) -> bool:
        # a request may have more texts than may wait; it is refused only if others fill the queue
        return len(self._waiting) < self.most_waiting

    def _select(self, waiting: Sequence[Text]) -> list[Text]:
        """Return the batch of texts of similar length that contains the oldest text."""
        lengths = _lengths([text.features for text in waiting])
        oldest = 0  # waiting texts are in the order of arrival
        for batch in batches(lengths, self._encoder.batch):
            if oldest in batch:
                # batches() sorts by length; jobs start in the order of arrival
                return [waiting[index] for index in sorted(batch)]
        raise AssertionError("every text is in a batch")

    def _compute(self, jobs: list[Text]) -> None:
        rows = self._encoder.compute([job.features for job in jobs])
        for job, row in zip(jobs, rows, strict=True):
            job.future.set_result(row)


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
            # if this coroutine is cancelled, gather cancels the futures, and the queue drops their texts
            rows = await asyncio.gather(*map(asyncio.wrap_future, self.worker.outputs(texts)))
            tokens = sum(_lengths(texts))
            self.metrics.tokens.labels("prompt").inc(tokens)
            request.scope["pst_ds_facts"] |= {"texts": len(texts), "prompt_tokens": tokens}
            return JSONResponse(self.reply(asked, np.stack(rows), tokens))

    def read(self, body: bytes, is_long: bool = False) -> tuple[PredictionRequest, Sequence[Features]]:
        """Return a request and the tokens of its texts. Raises ProtocolError."""
        asked = validated(PredictionRequest, read_json(body))
        most = self.encoder.max_length
        if asked.model != self.name:
            raise no_model(asked.model)
        limit = asked.truncate_prompt_tokens
        if limit is not None and limit > most:
            why = f"truncate_prompt_tokens = {limit} is more than the maximum context length, {most}"
            raise ProtocolError(400, why, param="truncate_prompt_tokens")
        if limit == -1:  # the protocol's word for the model's maximum
            limit = most
        try:
            texts = self.encoder.tokenized(asked.texts, limit, self.tokenizers.of(is_long))
        except ValueError as error:
            raise ProtocolError(400, str(error), param="input") from None
        longest = max(_lengths(texts))
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
        data: list[JsonTable] = []
        if self.encoder.kind == EMBEDDER:
            rows: Sequence[object] = self.encoder.plain(outputs)
            if asked.encoding_format == "base64":
                # little-endian fp32, as the protocol's clients decode it on any machine
                rows = [base64.b64encode(row).decode() for row in outputs.astype("<f4")]
            for index, row in enumerate(rows):
                data.append({"object": "embedding", "index": index, "embedding": row})
            return table | {"data": data}
        for index, probs in enumerate(self.encoder.plain(outputs)):
            label = None
            if self.encoder.labels:
                label = self.encoder.labels[outputs[index].argmax()]
            data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
        return table | {"id": f"classify-{uuid.uuid4().hex}", "created": int(time.time()), "data": data}


def _lengths(texts: Sequence[Features]) -> list[int]:
    """Return the numbers of tokens of texts, special tokens included."""
    return [len(text["input_ids"]) for text in texts]
