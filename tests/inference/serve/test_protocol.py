"""What a request may say, and text from tokens; no server and no model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.serve.protocol import (
    MOST_BODY_VALUES,
    ChatRequest,
    CompletionRequest,
    PredictionRequest,
    ProtocolError,
    chat_request,
    read_json,
    validated,
)
from pst_ds.inference.serve.text_stream import TextStream
from pst_ds.inference.serve.tools import ToolCalls
from tests.pairs import every_pair

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


def _containers(schema, place=()):
    """Yield the place and the core schema of every list, tuple, set and dictionary of a model."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple", "set", "frozenset", "dict", "generator"):
            yield place, schema
        for name, value in schema.items():
            if name != "metadata":
                yield from _containers(value, (*place, name))
    elif isinstance(schema, list | tuple):
        for index, value in enumerate(schema):
            yield from _containers(value, (*place, index))


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, PredictionRequest])
def test_every_container_of_a_request_is_bounded(model):
    found = list(_containers(model.__pydantic_core_schema__))
    assert found
    assert [place for place, schema in found if "max_length" not in schema] == []


WIDE = {f"k{n}": 0 for n in range(95_000)}


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (ChatRequest, {"tool_choice": {"type": "function", "function": WIDE}}),
        (ChatRequest, {"logit_bias": WIDE}),
        (ChatRequest, {"stream_options": WIDE}),
        (ChatRequest, {"messages": [HELLO["messages"][0]] * 3000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 3000}]}),
        (ChatRequest, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [0] * 20_000}}}}),
        (ChatRequest, {"tools": [{"type": "function", "function": {"name": "f", "parameters": WIDE}}]}),
        (ChatRequest, WIDE),
        (CompletionRequest, {"prompt": ["a"] * 200_000}),
        (CompletionRequest, {"prompt": ["a", 1] * 100_000}),
        (PredictionRequest, {"input": ["a"] * 3000}),
    ],
)
def test_a_wide_request_costs_few_errors(model, change):
    """pydantic keeps a kilobyte per error and takes microseconds for each value; sizes are checked before values."""
    plain = {ChatRequest: HELLO, CompletionRequest: {"model": "m", "prompt": "x"}}.get(model, {"model": "m"})
    with pytest.raises(ValidationError) as caught:
        model.model_validate(plain | change)
    assert caught.value.error_count() < 10
    with pytest.raises(ProtocolError) as refused:
        validated(model, plain | change)
    assert refused.value.status == 400
    assert len(refused.value.message) < 300


def test_a_deep_schema_is_refused_by_its_levels():
    deep = {}
    for _ in range(900):
        deep = {"items": deep}
    kind = {"type": "json_schema", "json_schema": {"schema": deep}}
    with pytest.raises(ProtocolError, match="more than 100 levels"):
        chat_request(HELLO | {"response_format": kind})
    call = {"function": {"name": "f", "arguments": json.dumps(deep)}}
    with pytest.raises(ProtocolError, match="100 levels"):
        _ = chat_request(HELLO | {"messages": [{"role": "assistant", "tool_calls": [call]}]}).chat


@pytest.mark.parametrize("element", [b"[]", b"{}", b'{"a":0}'])
def test_a_body_of_many_values_is_refused_before_it_is_parsed(element, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ProtocolError, match="lists, objects and names"):
        read_json(b'{"a":[' + b",".join([element] * (MOST_BODY_VALUES + 1)) + b"]}")


@pytest.mark.parametrize("letter", ["[", "{", ":", '\\"', "\\\\", '\\\\\\"[', "é"])
def test_marks_in_strings_are_no_values(letter):
    text = letter * (MOST_BODY_VALUES + 1)
    assert read_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), JSON_VALUES), st.booleans())
def test_any_json_object_is_read(table, is_ascii):
    assert read_json(json.dumps(table, ensure_ascii=is_ascii).encode()) == table


def _with_surrogates():
    """Yield requests with an unpaired surrogate in every kind of string, keys included."""
    bad = "a\ud800"
    message = {"role": "user", "content": bad}
    call = {"id": bad, "function": {"name": "f"}}
    tool = {"type": "function", "function": {"name": bad}}
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": bad}}}
    yield from (
        HELLO | {"model": bad},
        HELLO | {"messages": [message]},
        HELLO | {"messages": [{"role": "user", "content": [{"type": "text", "text": bad}]}]},
        HELLO | {"messages": [{"role": "assistant", "tool_calls": [call]}]},
        HELLO | {"stop": [bad]},
        HELLO | {"user": bad},
        HELLO | {"metadata": {bad: "x"}},
        HELLO | {bad: 1},
        HELLO | {"tools": [tool]},
        HELLO | {"response_format": schema},
        HELLO | {"logit_bias": {bad: 1}},
        {"model": "m", "prompt": bad},
        {"model": "m", "prompt": [bad]},
        {"model": "m", "input": [["x", bad]]},
    )


@every_pair
@pytest.mark.parametrize("table", list(_with_surrogates()), ids=range(14))
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "utf-16", "utf-32"])
def test_unpaired_surrogates_are_refused_in_every_string(table, encoding):
    """As escapes, and as the bytes that Python's json accepts."""
    body = json.dumps(table, ensure_ascii=encoding == "ascii").encode(encoding, "surrogatepass")
    with pytest.raises(ProtocolError, match="JSON") as caught:
        read_json(body)
    assert caught.value.status == 400
    caught.value.body()["error"]["message"].encode()


def test_pairs_of_surrogates_are_characters():
    assert read_json(b'{"a": "\\ud83d\\ude42", "b": "\\\\ud800"}') == {"a": "\U0001f642", "b": "\\ud800"}


def test_arguments_of_a_call_have_no_unpaired_surrogate():
    """Neither those of a request, nor those that a model writes."""
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    with pytest.raises(ProtocolError, match="arguments of a tool call"):
        _ = chat_request(HELLO | {"messages": [{"role": "assistant", "tool_calls": [call]}]}).chat
    calls, written = ToolCalls(["f"]), '{"name": "f", "arguments": {"a": "\\ud800"}}'
    assert calls.add(written) == ""
    assert calls.end() == (written, [])


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(number):
    with pytest.raises(ProtocolError, match="NaN, an infinity"):
        read_json(b'{"a": [' + number + b"]}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a":' * 5000 + b"0" + b"}" * 5000, "too many levels"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b'{"a": 1', "not JSON in UTF-8"),
        (b'{"a": "\xff"}', "not JSON in UTF-8"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_by_its_cause(body, message):
    with pytest.raises(ProtocolError, match=message):
        read_json(body)


CALL = {"type": "function", "function": {}}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (CompletionRequest, {"prompt": ["a"] * 200}, "prompt: List should have at most 128 items"),
        (CompletionRequest, {"prompt": ["a", ["b"]]}, "prompt: Input should be a valid integer"),
        (CompletionRequest, {"prompt": []}, "prompt: List should have at least 1 item"),
        (CompletionRequest, {"prompt": [[]]}, "prompt: List should have at least 1 item"),
        (CompletionRequest, {"prompt": [-1]}, "prompt: Input should be greater than or equal to 0"),
        (CompletionRequest, {"prompt": 5}, "prompt: Input should be a valid string"),
        (ChatRequest, HELLO | {"tool_choice": CALL}, "tool_choice: Field required"),
        (ChatRequest, HELLO | {"tool_choice": "all"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        (ChatRequest, HELLO | {"stop": ["a"] * 9}, "stop: Tuple should have at most 4 items"),
        (PredictionRequest, {"input": [["a"]]}, "input: List should have at least 2 items"),
    ],
)
def test_a_field_with_several_types_is_refused_by_the_one_that_was_meant(kind, wrong, message):
    with pytest.raises(ProtocolError) as caught:
        validated(kind, {"model": "m"} | wrong)
    assert caught.value.message.startswith(message)


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
