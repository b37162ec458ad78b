"""What a request may say, and text from tokens; no server and no model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.serve.protocol import ChatRequest, ProtocolError, chat_request, read_json
from pst_ds.inference.serve.text_stream import TextStream

WHAT_CLIENTS_SEND = {
    "user": "a", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
    "tools": [], "tool_choice": "auto", "n": 1, "logit_bias": {}, "logprobs": False, "presence_penalty": 0.0,
    "frequency_penalty": 0, "response_format": {"type": "text"}, "modalities": ["text"],
    "stream_options": {"include_usage": True}, "top_logprobs": None, "reasoning_effort": None, "safety_identifier": "b",
    "prompt_cache_key": "c",
}  # fmt: skip
"""Fields that change no answer."""
DATA = Path(__file__).resolve().parents[2] / "data"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("wrong", [{"messages": [0] * 1000}, {**HELLO, "stop": [0] * 1000}])
def test_a_long_wrong_list_costs_one_error(wrong):
    """pydantic keeps a kilobyte per error, and a body has room for half a million."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "m", **wrong})
    assert caught.value.error_count() == 1


def test_what_a_request_leaves_out_has_the_protocols_defaults():
    asked = chat_request(HELLO)
    assert (asked.model, asked.max_tokens, asked.seed, asked.stop, asked.stream) == ("m", None, None, (), False)
    assert asked.sampling == Sampling(1.0)
    asked = chat_request(HELLO | {"temperature": 0, "max_completion_tokens": 5, "stop": "x", "stream": True})
    assert asked.sampling == Sampling(0.0)
    assert (asked.max_tokens, asked.stop, asked.stream) == (5, ("x",), True)


def test_fields_that_change_no_answer_are_accepted():
    dumped = dict.fromkeys(("refusal", "annotations", "audio", "tool_calls", "function_call"))
    answer = {"role": "assistant", "content": "x", **dumped}  # as the official client dumps one
    asked = chat_request(HELLO | WHAT_CLIENTS_SEND | {"messages": [answer, *HELLO["messages"]]})
    assert asked.chat == [{"role": "assistant", "content": "x"}, *HELLO["messages"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temprature": 0}, "unknown field 'temprature'. Did you mean 'temperature'?"),
        ({"max_tok": 5}, "unknown field 'max_tok'. Did you mean 'max_tokens'?"),
        ({"zeal": 1.1}, "unknown field 'zeal'. Omit it."),
        ({"audio": {"voice": "x"}}, "audio is not supported. Omit it."),
    ],
)
def test_an_unknown_field_is_named_with_the_near_miss(change, message):
    with pytest.raises(ProtocolError) as caught:
        chat_request(HELLO | change)
    assert caught.value.message == message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 99_999, b"9" * 99_999, b'{"model": "\xff"}', b'{"\\uD800": 1}', b"[]"]
)
def test_a_body_that_is_not_a_json_object(body):
    with pytest.raises(ProtocolError, match="JSON") as caught:
        read_json(body)
    assert caught.value.status == 400


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat_request({"model": "m", "messages": [{"role": "developer", "content": parts}]})
    assert asked.chat == [{"role": "system", "content": "ab"}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"model": ""}, "model"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameter": {}}}]}, "tools[0].function.parameter"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "must"}, "tool_choice"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"x" * 999: 1}, "x" * 64),
        ({"stream_options": 5}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages[0].contents"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]"),
        ({"response_format": {"type": "text", "schema": {}, "shape": 1}}, "response_format.schema"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}, "mode": "any"}}, "tool_choice.mode"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role"),
    ],
)
def test_what_is_wrong_is_named(change, param):
    with pytest.raises(ProtocolError) as caught:
        chat_request(HELLO | change)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["param"] == param


class _Letters:
    """A tokenizer whose tokens are letters, and 0 half of one."""

    def decode(self, ids, skip_special_tokens):
        text = "".join(chr(i) if i else "é" for i in ids)
        return text if ids[-1] else text[:-1] + "\ufffd"


def _given(text, stops=()):
    stream = TextStream(_Letters(), stops)
    pieces = []
    for letter in text:
        pieces.append(stream.add(ord(letter)))
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream


def test_an_unfinished_character_waits():
    stream = TextStream(_Letters())
    assert [stream.add(ord("a")), stream.add(0), stream.add(ord("b"))] == ["a", "", "éb"]


def test_a_stop_text_ends_it_and_is_not_given_out():
    pieces, stream = _given("one END two", ("END", "two"))
    assert "".join(pieces) == "one "
    assert stream.stopped


@pytest.mark.parametrize("stops", [(), ("x" * 256, "ab" * 100 + "c")])
def test_a_token_costs_the_same_work_in_a_long_text_as_in_a_short_one(stops):
    decoded = []

    class Counting(_Letters):
        def decode(self, ids, skip_special_tokens):
            decoded.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    stream = TextStream(Counting(), stops)
    for token in [*map(ord, "ab" * 2000), *[0] * 2000]:  # whole characters, then unfinished ones
        stream.add(token)
    assert max(decoded) < 200
    assert stream.count == 6000


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert"])
def test_pieces_are_the_text_decoded_at_once(name):
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(len(tokenizer)) for _ in range(50)]
        stream = TextStream(tokenizer, ("never written",))
        pieces = [*map(stream.add, ids), stream.end()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_text_is_found_wherever_pieces_are_cut(seed):
    """Text and stop texts of two letters overlap in every way; the expected cut is a search in the whole text."""
    draw = random.Random(seed)
    for _ in range(200):
        text = "".join(draw.choices("ab", k=30))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 9))) for _ in range(3)]
        pieces, stream = _given(text, stops)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]  # the first that is complete ends it
        done = [stop for stop in stops if stop in text[: min(ends, default=0)]]
        assert "".join(pieces) == text[: min((text.find(stop) for stop in done), default=len(text))]
        assert stream.stopped == bool(done)


def test_what_only_looked_like_a_stop_text_is_given_out():
    pieces, stream = _given("an ENDing EN", ("ENDED",))
    assert "".join(pieces) == "an ENDing EN"
    assert not stream.stopped
