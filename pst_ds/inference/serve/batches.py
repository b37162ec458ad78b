"""Generate answers with a transformers model, in batches; each request receives its tokens at once."""

import inspect
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pst_ds.checkpoint.user_store import State
from pst_ds.inference.serve.jobs import Answering, Job
from pst_ds.inference.serve.queue import BatchWorker


class Batches(BatchWorker[Job], Answering):
    """Decodes waiting jobs of the base model in batches. A batch runs until its last sequence ends, and others wait."""

    def __init__(
        self, model: PreTrainedModel, *, pad: int, ends: Collection[int], most_in_batch: int = 8, most_waiting: int = 64
    ):
        """``model``: a transformers causal model in eval mode. ``ends``: tokens that end a sequence."""
        super().__init__(most_waiting)
        self._ends = frozenset(ends)
        self._model = model
        self._pad = pad
        self._most = most_in_batch
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_last = "logits_to_keep" in parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5

    @torch.inference_mode()
    def warm_up(self, prompt: Sequence[int], states: Sequence[State | None]) -> None:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        mask = torch.ones_like(ids)
        _, cache = self._step(ids, mask, None)
        self._step(ids[:, -1:], torch.cat([mask, mask[:, :1]], 1), cache)

    def _select(self, waiting: Sequence[Job]) -> list[Job]:
        return list(waiting[: self._most])

    @torch.inference_mode()
    def _compute(self, jobs: list[Job]) -> None:
        """Decode a batch until its last job is finished. Jobs of a batch that failed continue."""
        # the tokens that were delivered before the batch failed are part of the prompt now
        prompts = [job.prompt + job.written for job in jobs]
        length = max(map(len, prompts))
        padded: list[list[int]] = []
        visible: list[list[int]] = []
        for prompt in prompts:
            padding = length - len(prompt)
            # on the left, so that the next token of every sequence is in the last column
            padded.append([self._pad] * padding + prompt)
            visible.append([0] * padding + [1] * len(prompt))
        ids = torch.tensor(padded, device=self._model.device)
        mask = torch.tensor(visible, device=self._model.device)
        cache = None
        while not all(job.is_finished for job in jobs):
            logits, cache = self._step(ids, mask, cache)
            chosen: list[int] = []
            for job, row in zip(jobs, logits.split(1), strict=True):
                token = job.take(row, self._ends)
                if token is None:
                    # finished sequences stay in the batch, whose cache has a row for each
                    token = self._pad
                chosen.append(token)
            ids = torch.tensor(chosen, device=self._model.device)[:, None]  # (jobs, 1)
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
