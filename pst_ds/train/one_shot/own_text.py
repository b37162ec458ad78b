"""Calibration on the dense model's own text: it continues prompts, and pruning sees the result (arXiv 2509.12464)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.conversations import ASSISTANT, TOOLS, Conversation, messages_of, prompt_tokens, tools_of
from pst_ds.data.dataset import read_local
from pst_ds.data.generation import end_tokens, generated
from pst_ds.data.model_limits import positions_of
from pst_ds.data.tasks.answers import padded
from pst_ds.nn.base_model import DTYPES
from pst_ds.parallel.launch import device_of, launch_environment
from pst_ds.parallel.ranks import all_gather_objects, raise_on_all_ranks, rank, world_size
from pst_ds.progress import Progress
from pst_ds.prune.blocks import Batch
from pst_ds.prune.model_files import ModelFiles
from pst_ds.train.model import attention_options, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

Job = tuple[list[int], int]
"""Prompt to continue, and the index of the continuation, which seeds it."""


def own_batches(run: RunConfig, path: str, samples: int, seed: int) -> list[Batch]:
    """Return batches of ``samples`` prompts with their continuations by the run's dense model, sorted by length.

    Continuations are sampled at temperature 1, up to the end of text or ``data.max_length`` tokens. The batches that
    are generated together and the random numbers of each continuation only depend on the prompts, ``samples`` and
    ``seed``, so the result does not depend on the number of ranks, which share the batches. Collective.

    Args:
        path: file of prompts; see :func:`read_prompts`. Prompts are repeated if there are fewer than ``samples``.

    Raises InputError, also for a model that is not a causal language model.
    """
    tokenizer, size = load_tokenizer(run), run.eval_batch_size

    def prepare() -> tuple[list[list[int]], PreTrainedModel]:
        prompts = read_prompts(path, tokenizer, run.data.max_length, as_messages=run.task == "chat")
        model = ModelFiles(run.model.path, None, 0, **attention_options(run)).whole()
        if not run.task_facts.predicts_tokens or not model.can_generate():
            raise ConfigError(
                f"own_text = {path!r}: {run.model.path} is not a causal language model for task {run.task!r}, so it "
                "cannot continue prompts. Remove own_text"
            )
        return prompts, model

    prompts, model = raise_on_all_ranks(prepare)
    ends = sorted({tokenizer.eos_token_id, *end_tokens(model.generation_config)})
    model.to(torch.device(device_of(launch_environment())), DTYPES[run.train.precision])  # type: ignore[arg-type]
    random.Random(seed).shuffle(prompts)
    jobs = [(prompts[i % len(prompts)], i) for i in range(samples)]
    jobs.sort(key=lambda job: len(job[0]))
    own: list[list[int]] = []
    with Progress("continue prompts", samples, "samples") as shown:
        for at in range(0, samples, size)[rank() :: world_size()]:
            own += _continued(model, jobs[at : at + size], run.data.max_length, seed, ends)
            shown.add(min(samples, size * world_size()))
    rows = sorted(row for of_rank in all_gather_objects(own) for row in of_rank)
    rows.sort(key=len)
    batches = [padded([(row, row) for row in rows[at : at + size]], tokenizer) for at in range(0, samples, size)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def read_prompts(path: str, tokenizer: Tokenizer, max_length: int, *, as_messages: bool) -> list[list[int]]:
    """Return the tokens of the prompts in a file that have fewer than ``max_length`` tokens.

    A prompt is a line of a .txt file, or the "messages", "prompt" or "text" of a row. Messages are rendered by the chat
    template, without a last answer. Text is continued, or becomes a user's message if ``as_messages``.

    Raises ConfigError for other rows, and if no prompt is left.
    """
    found = []
    for number, row in enumerate(read_local(path, "own_text", "line"), 1):
        where = f"own_text = {path!r}, row {number}"
        value = next((row[name] for name in ("messages", "prompt", "text") if row.get(name) is not None), None)
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, str) and not as_messages:
            found.append(list(tokenizer(value)["input_ids"]))
        elif not value:
            raise ConfigError(f'{where} has no "prompt" or "messages". Columns: {", ".join(row)}')
        else:
            given = [{"role": "user", "content": value}] if isinstance(value, str) else value
            messages = messages_of(given, where, answered=False)
            end = len(messages) - (messages[-1]["role"] == ASSISTANT)
            conversation = Conversation(messages[:end], tools_of(row.get(TOOLS), where))
            found.append(prompt_tokens(conversation, tokenizer, where))
    prompts = [ids for ids in found if 0 < len(ids) < max_length]
    if not prompts:
        raise ConfigError(
            f"own_text = {path!r} has no prompt of fewer than data.max_length = {max_length} tokens. Raise "
            "data.max_length, or name a file with shorter prompts"
        )
    return prompts


@torch.inference_mode()
def _continued(
    model: PreTrainedModel, jobs: Sequence[Job], max_length: int, seed: int, ends: Sequence[int]
) -> list[list[int]]:
    """Return the prompts of ``jobs`` with their continuations up to one of the tokens ``ends``, which is included."""
    from transformers import GenerationConfig

    longest, positions = max(len(ids) for ids, _ in jobs), positions_of(model.config)
    # a shorter prompt is padded on the left, and its positions must not run past the table of the longest
    steps = min(max_length - min(len(ids) for ids, _ in jobs), (positions or 2 * max_length) - longest)
    model.generation_config = GenerationConfig(
        max_new_tokens=steps, do_sample=False, use_cache=True, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    numbers = torch.stack([_random_numbers(f"{seed}/{index}", steps) for _, index in jobs]).to(model.device)
    new = generated(model, [ids for ids, _ in jobs], [_Sampled(numbers, longest)], str(model.device)).tolist()
    rows = []
    for (ids, _), tokens in zip(jobs, new, strict=True):
        end = next((place for place, token in enumerate(tokens) if token in ends), steps)
        rows.append([*ids, *tokens[: end + 1]][:max_length])
    return rows


def _random_numbers(key: str, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1), float64, that depend on ``key`` only."""
    return torch.rand(count, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())), dtype=torch.float64)


class _Sampled:
    """Sample the next token from the softmax of the scores, by one random number per row and step.

    ``generate`` draws for all rows from one generator instead, so a row would depend on the rows next to it.
    """

    def __init__(self, numbers: Tensor, length: int):
        """``numbers``: (rows, steps) in [0, 1). ``length``: tokens before the first step."""
        self._numbers, self._length = numbers, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums = scores.double().softmax(-1).cumsum(-1)
        wanted = self._numbers[:, input_ids.shape[1] - self._length, None] * sums[:, -1:]
        token = torch.searchsorted(sums, wanted, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
