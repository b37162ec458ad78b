"""Slots of the native decoder: each answer equals the one that its request gets alone, and no request waits long."""

from __future__ import annotations

import queue
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.inference.decoder import Decoder, Sampling
from pst_ds.inference.serve.jobs import DONE_LENGTH, DONE_STOP, Job, Token
from pst_ds.inference.serve.protocol import ProtocolError
from pst_ds.inference.serve.slots import LEAST_PROMPT, PROMPT_PER_ANSWER, Slots
from pst_ds.nn.personal_updates import LEFT, RIGHT

SLOTS, CONTEXT = 3, 96
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip


class Passes(Decoder):
    """A decoder that notes the tokens of each pass, by sequence."""

    made: list
    fails_at = -1

    def extend(self, added, wanted):
        self.made.append({sequence: len(tokens) for sequence, tokens in added.items()})
        if len(self.made) == self.fails_at:
            raise MemoryError("not enough memory for a pass")
        return super().extend(added, wanted)


def _model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def shared():
    return Passes.from_model(_model(), CONTEXT, sequences=SLOTS, threads=1, verify=False)


@pytest.fixture
def decoder(shared):
    shared.made, shared.fails_at = [], -1
    for number in range(SLOTS):
        shared.reset(0, number)
    return shared


@pytest.fixture(scope="module")
def alone():
    """``alone(...)``: the tokens of a job that has the decoder to itself."""
    decoder = Decoder.from_model(_model(), CONTEXT, threads=1, verify=False)

    def written(prompt, most, temperature=0.0, seed=0, user=0, ends=()):
        decoder.assign(STATES[user])
        sampling = Sampling(temperature, top_k=20 if temperature else 0)
        return [t for t in decoder.stream(prompt, most, sampling=sampling, end=ends, seed=seed) if t not in ends]

    return written


def _prompt(length, seed=0):
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _state(seed):
    rng = torch.Generator().manual_seed(seed)
    layers = {name: m for name, m in _model().named_modules() if name.endswith("_proj")}
    state = {f"{name}.{LEFT}": torch.randn(m.out_features, 3, generator=rng) for name, m in layers.items()}
    return state | {f"{name}.{RIGHT}": torch.randn(3, m.in_features, generator=rng) / 9 for name, m in layers.items()}


STATES = [None, _state(1), _state(2)]


def _job(prompt, most, temperature=0.0, seed=0, user=0, put=None):
    arrived = queue.Queue()
    put = put or (lambda item: arrived.put(item.number if isinstance(item, Token) else item))
    return Job(prompt, most, Sampling(temperature, top_k=20 if temperature else 0), seed, put, STATES[user]), arrived


def _answered(decoder, jobs, *, ends=(), fails_at=-1):
    """Submit jobs before the thread starts; return what each got, and the passes."""
    decoder.made, decoder.fails_at = [], fails_at
    for number in range(SLOTS):
        decoder.reset(0, number)
    slots = Slots(decoder, ends=ends, most_waiting=100)
    for job, _ in jobs:
        slots.submit(job)
    slots.start()
    found = []
    for _, arrived in jobs:
        items = [arrived.get(timeout=60)]
        while isinstance(items[-1], int):
            items.append(arrived.get(timeout=60))
        found.append((items[:-1], items[-1]))
    slots.close()
    assert not slots.is_alive
    return found, decoder.made


REQUEST = st.tuples(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
)


def test_prompts_longer_than_a_pass(decoder, alone, monkeypatch):
    monkeypatch.setattr(decoder, "most", 7)
    jobs = [_job(_prompt(30, n), 5) for n in range(4)]
    found, passes = _answered(decoder, jobs)
    assert [tokens for tokens, _ in found] == [alone(_prompt(30, n), 5) for n in range(4)]
    assert max(sum(one.values()) for one in passes) == 7


@given(st.lists(REQUEST, min_size=1, max_size=9), st.sets(st.integers(3, 59), max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_written_alone_and_no_answer_waits(decoder, alone, requests, ends):
    system = _prompt(40, seed=9)
    asked = []
    for length, most, temperature, seed, user, begins_alike in requests:
        prompt = (system[: 2 * length] if begins_alike else []) + _prompt(length, seed)
        asked.append((prompt, min(most, CONTEXT - len(prompt)), temperature, seed, user))
    found, passes = _answered(decoder, [_job(*one) for one in asked], ends=ends)
    for one, (tokens, why) in zip(asked, found, strict=True):
        assert tokens == alone(*one, ends)
        assert why == (DONE_LENGTH if len(tokens) == one[1] else DONE_STOP)
    for one in passes:
        if any(number == 1 for number in one.values()):
            assert sum(number for number in one.values() if number > 1) <= max(LEAST_PROMPT, PROMPT_PER_ANSWER * SLOTS)
        assert sum(one.values()) <= decoder.most


def test_a_free_slot_is_taken_at_once(decoder):
    jobs = [_job(_prompt(5, n), 4 + n % 7) for n in range(30)]
    _, passes = _answered(decoder, jobs)
    busy = [len(one) for one in passes]
    assert min(busy[: -max(4 + n % 7 for n in range(30))]) == SLOTS


def test_a_long_prompt_lets_running_answers_go_on(decoder):
    slots, long = Slots(decoder, ends=()), _job(_prompt(90, 3), 2)
    running = [_job(_prompt(4, n), 40) for n in (1, 2)]
    put = running[0][0].put

    def submit_the_long_one(item):
        if len(running[0][0].written) == 2:
            slots.submit(long[0])
        put(item)

    running[0][0].put = submit_the_long_one
    for job, _ in running:
        slots.submit(job)
    slots.start()
    assert isinstance(long[1].get(timeout=60), int)
    pieces = [one for one in decoder.made if len(one) == SLOTS]
    slots.close()
    assert len(pieces) >= 90 // LEAST_PROMPT
    assert all(not isinstance(item, Exception) for item in long[1].queue)
    assert all(sorted(one.values())[:2] == [1, 1] for one in pieces)


def test_a_shared_beginning_is_computed_once_for_each_user(decoder, alone):
    """Also by requests that arrive together, such as several answers to one prompt."""
    system, most = _prompt(60, 5), 6
    asked = [(system + _prompt(4, 10 + n // 2), most, 0.9, n, user) for n in range(6) for user in range(3)]
    found, passes = _answered(decoder, [_job(*one) for one in asked])
    assert [tokens for tokens, _ in found] == [alone(*one) for one in asked]
    computed = sum(sum(one.values()) for one in passes) - len(asked) * (most - 1)
    assert computed <= 3 * 64 + (len(asked) - 3) * 4
    together = [_job(_prompt(40, 7), most, 0.9, n) for n in range(SLOTS)]
    found, passes = _answered(decoder, together)
    assert [tokens for tokens, _ in found] == [alone(_prompt(40, 7), most, 0.9, n) for n in range(SLOTS)]
    assert [sum(one.values()) for one in passes[:2]] == [40, 1 + SLOTS - 1]


def test_a_cancelled_job_frees_its_slot_at_the_next_token(decoder):
    jobs = []

    def leave(item):
        jobs[0][0].cancelled = True

    jobs.append(_job(_prompt(4), 80, put=leave))
    jobs[0][1].put(DONE_LENGTH)
    jobs += [_job(_prompt(4, n), 80) for n in range(1, SLOTS)] + [_job(_prompt(4, 9), 3)]
    _, passes = _answered(decoder, jobs)
    assert len(passes) < 90
    assert len(jobs[0][0].written) == 1


def test_a_pass_that_fails_ends_its_jobs_and_no_others(decoder, alone):
    jobs = [_job(_prompt(4, n), 6) for n in range(2 * SLOTS)]
    found, _ = _answered(decoder, jobs, fails_at=3)
    assert [type(why) for _, why in found[:SLOTS]] == [MemoryError] * SLOTS
    assert [tokens for tokens, _ in found[SLOTS:]] == [alone(_prompt(4, n), 6) for n in range(SLOTS, 2 * SLOTS)]


def test_a_pass_that_fails_after_a_job_was_cancelled(decoder, alone):
    """The thread goes on: a slot that was freed in the same pass has no job to end."""
    jobs = [_job(_prompt(4, n), 6) for n in range(SLOTS + 1)]
    put = jobs[1][0].put

    def cancel_the_first(item):
        if not jobs[0][0].cancelled:
            jobs[0][0].cancelled, decoder.fails_at = True, len(decoder.made) + 1
        put(item)

    jobs[1][0].put = cancel_the_first
    found, _ = _answered(decoder, jobs)
    assert found[0][1] == DONE_LENGTH
    assert isinstance(found[1][1], MemoryError)
    assert found[SLOTS] == (alone(_prompt(4, SLOTS), 6), DONE_LENGTH)


def test_jobs_that_wait_at_the_end_are_told_and_others_are_answered(decoder):
    ready, held = threading.Event(), threading.Event()
    running, _ = _job(_prompt(4), 30)
    running.put = lambda item: (ready.set(), held.wait(60))
    waiting = [_job(_prompt(4, n), 30) for n in range(1, 2 * SLOTS)]
    slots = Slots(decoder, ends=())
    for job, _ in [(running, None), *waiting]:
        slots.submit(job)
    slots.start()
    assert ready.wait(60)
    with slots._changed:
        slots._closing = True
    held.set()
    slots.close()
    last = []
    for _, found in waiting:
        while isinstance(item := found.get(timeout=60), int):
            pass
        last.append(item)
    assert [item for item in last if item == DONE_LENGTH] == [DONE_LENGTH] * (SLOTS - 1)
    assert all(isinstance(item, ProtocolError) and item.status == 503 for item in last[SLOTS - 1 :])
    assert len(running.written) == 30
