"""Generate answers with a transformers model, in batches; each request receives its tokens at once."""

import inspect
import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pst_ds.checkpoint.user_store import State
from pst_ds.inference.serve.jobs import Answering, Job, closing

_LOG = logging.getLogger(__name__)


class Batches(Answering):
    """Decodes waiting jobs of the base model in batches. A batch runs until its last sequence ends, and others wait."""

    def __init__(
        self, model: PreTrainedModel, *, pad: int, ends: Collection[int], most_in_batch: int = 8, most_waiting: int = 64
    ):
        """``model``: a transformers causal model in eval mode. ``ends``: tokens that end a sequence."""
        super().__init__(ends, most_waiting)
        self._model, self._pad, self._most = model, pad, most_in_batch
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._takes_last = "logits_to_keep" in known
        self._batch: list[Job] = []
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5

    @torch.inference_mode()
    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        mask = torch.ones_like(ids)
        _, cache = self._step(ids, mask, None)
        self._step(ids[:, -1:], torch.cat([mask, mask[:, :1]], 1), cache)

    @property
    def running(self) -> int:
        return sum(not job.is_finished for job in self._batch)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    break
                waiting = [job for job in self._waiting if not job.cancelled]
                jobs, self._waiting = waiting[: self._most], waiting[self._most :]
            self._batch = jobs
            if jobs:
                self._write(jobs)
            self._batch = []
        for job in self._waiting:
            job.end(closing())

    def _write(self, jobs: list[Job]) -> None:
        """Decode a batch. If it fails, decode its jobs one by one: only those that fail alone get an error."""
        try:
            self._decode(jobs)
            return
        except Exception as error:  # of the model; the next batch may succeed
            _LOG.exception("a batch of %d requests failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].end(error)
        for job in jobs:  # after the except clause, whose traceback holds the memory of the batch
            if not job.is_finished:
                self._write([job])

    @torch.inference_mode()
    def _decode(self, jobs: list[Job]) -> None:
        device, prompts = self._model.device, [job.prompt + job.written for job in jobs]
        length = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        cache = None
        while not all(job.is_finished for job in jobs):
            logits, cache = self._step(ids, mask, cache)
            chosen = [job.take(row, self._ends) for job, row in zip(jobs, logits.split(1), strict=True)]
            ids = torch.tensor([self._pad if token is None else token for token in chosen], device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(jobs), 1)], 1)

    def _step(self, ids: Tensor, mask: Tensor, cache: object) -> tuple[Tensor, object]:
        """Return the logits of the next tokens, (jobs, vocabulary) fp32 on the CPU, and the cache."""
        more: dict[str, object] = {self._cache_name: cache}
        if self._takes_positions:  # they do not start at 0 after padding
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if self._takes_last:
            more["logits_to_keep"] = 1
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        return out.logits[:, -1].float().cpu(), out[self._cache_name]
