"""A request that fails in a batch fails alone; no server, and a model that counts."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.serve.batches import Batches
from pst_ds.inference.serve.jobs import DONE_LENGTH, DONE_STOP, Job, Token
from pst_ds.inference.serve.protocol import ProtocolError
from tests.pairs import every_pair

VOCABULARY, END, PAD = 40, 39, 0
NAN, INFINITE, NOTHING, LARGE = 33, 34, 35, 36
"""Tokens of a prompt that the model fails at: logits that are no numbers, and, of LARGE, an error at the third step."""


class Counting:
    """A causal model that writes the token after its last."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, past_key_values, use_cache):
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        if past_key_values is not None and past_key_values.shape[1] > 3 and (seen == LARGE).any():
            raise RuntimeError("not enough memory")
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits.scatter_(2, ((input_ids + 1) % VOCABULARY)[..., None], 50.0)
        for token, value in ((NAN, float("nan")), (INFINITE, float("inf")), (NOTHING, -float("inf"))):
            logits[(seen == token).any(1)] = value
        return CausalLMOutputWithPast(logits=logits, past_key_values=seen)

    __call__ = forward


class Arrived(queue.Queue):
    """What a job delivers, tokens as their numbers."""

    def put(self, item, *more):
        super().put(item.number if isinstance(item, Token) else item, *more)


def _job(*prompt, temperature=0.0, max_tokens=4):
    return {"prompt": list(prompt), "max_tokens": max_tokens, "sampling": Sampling(temperature)}


@contextmanager
def _held(**more):
    """Batches whose first batch, of another job, ends when the context does."""
    batches = Batches(Counting(), pad=PAD, ends=[END], **more)
    batches.start()
    begun, ends = threading.Event(), threading.Event()
    first = _job(1, max_tokens=1)
    batches.submit(Job(**first, seed=0, put=lambda item: begun.set() if isinstance(item, Token) else ends.wait(30)))
    assert begun.wait(30)
    yield batches
    ends.set()


def _outcome(arrived):
    items = [arrived.get(timeout=30)]
    while isinstance(items[-1], int):
        items.append(arrived.get(timeout=30))
    return items[:-1], items[-1]


def _written(*jobs):
    """Decode jobs in one batch; return for each its tokens and its outcome."""
    arrived = [Arrived() for _ in jobs]
    with _held() as batches:
        for job, to in zip(jobs, arrived, strict=True):
            batches.submit(Job(**job, seed=0, put=to.put))
    found = [_outcome(to) for to in arrived]
    batches.close()
    assert not batches.is_alive
    return found


RIGHT = [_job(1), _job(5, 6, temperature=0.5), _job(2, 6, max_tokens=6), _job(37, max_tokens=9)]
WRITTEN = [([2, 3, 4, 5], DONE_LENGTH), ([7, 8, 9, 10], DONE_LENGTH), ([*range(7, 13)], DONE_LENGTH), ([38], DONE_STOP)]


@every_pair
@pytest.mark.parametrize("token", [NAN, INFINITE, NOTHING])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_only_their_request(token, temperature):
    *right, wrong = _written(*RIGHT, _job(token, 1, temperature=temperature))
    assert right == WRITTEN
    assert wrong[0] == []
    assert "not finite" in str(wrong[1])


def test_a_batch_that_fails_midway_continues_one_by_one():
    *right, wrong = _written(*RIGHT, _job(LARGE, 1, max_tokens=8))
    assert right == WRITTEN  # each token once
    assert wrong[0][:2] == [2, 3]
    assert "memory" in str(wrong[1])


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
def test_the_smallest_temperatures_write_the_likeliest_tokens(temperature):
    jobs = [job | {"sampling": Sampling(temperature)} for job in RIGHT]
    assert _written(*jobs) == WRITTEN


def test_a_waiting_job_whose_client_has_gone_gives_up_its_place():
    jobs, arrived = [], Arrived()
    with _held(most_waiting=2) as batches:
        for _ in range(5):
            jobs.append(Job(**_job(1), seed=0, put=arrived.put))
            batches.submit(jobs[-1])
            jobs[-1].cancelled = len(jobs) < 4
        with pytest.raises(ProtocolError, match="too many requests"):
            batches.submit(Job(**_job(1), seed=0, put=arrived.put))
    for _ in range(10):  # four tokens and an outcome of each of two
        arrived.get(timeout=30)
    batches.close()
    assert [job.written for job in jobs] == [[], [], [], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_jobs_that_wait_at_the_end_are_told():
    arrived = Arrived()
    with _held() as batches:
        batches.submit(Job(**_job(1), seed=0, put=arrived.put))
        closing = threading.Thread(target=batches.close)
        closing.start()
        while not batches._closing:
            closing.join(0.01)
    assert _outcome(arrived)[1].status == 503
    closing.join(30)
    assert not batches.is_alive
