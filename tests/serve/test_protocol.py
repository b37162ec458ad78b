"""What a request may say, and text from tokens; no server and no model."""

from __future__ import annotations

import pytest

from pst_ds.decoder.sampling import Sampling
from pst_ds.serve.protocol import ProtocolError, chat_request
from pst_ds.serve.texts import TextStream

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_what_a_request_leaves_out_has_the_protocols_defaults():
    asked = chat_request(HELLO)
    assert (asked.model, asked.max_tokens, asked.seed, asked.stop, asked.stream) == ("m", None, None, (), False)
    assert asked.sampling == Sampling(1.0)
    asked = chat_request(HELLO | {"temperature": 0, "max_completion_tokens": 5, "stop": "x", "stream": True})
    assert asked.sampling == Sampling(0.0)
    assert (asked.max_tokens, asked.stop, asked.stream) == (5, ("x",), True)


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat_request({"model": "m", "messages": [{"role": "developer", "content": parts}]})
    assert asked.messages == [{"role": "system", "content": "ab"}]


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
        ({"n": 2}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
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


def test_what_only_looked_like_a_stop_text_is_given_out():
    pieces, stream = _given("an ENDing EN", ("ENDED",))
    assert "".join(pieces) == "an ENDing EN"
    assert not stream.stopped
