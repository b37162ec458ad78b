"""What chat clients expect of a server: log-probabilities, several answers, JSON schemas, tools, plain completions."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.lazy_module import lazy_module, need_packages

need_packages("fastapi", "uvicorn", "openai", "llguidance", "prometheus_client")

import httpx2 as httpx  # noqa: E402
import jsonschema  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

from pst_ds.cli.main import build_parser  # noqa: E402
from pst_ds.cli.serve import service as serving  # noqa: E402
from pst_ds.inference.serve import grammar, metrics  # noqa: E402
from pst_ds.inference.serve.app import make_app  # noqa: E402
from pst_ds.inference.serve.prompt_size import ReaderTokenizers  # noqa: E402
from pst_ds.inference.serve.text import TextService  # noqa: E402
from tests.inference.serve.byte_model import byte_model  # noqa: E402
from tests.inference.serve.servers import start, stop  # noqa: E402

openai = lazy_module("openai")

ASK = [{"role": "user", "content": "the film"}]
SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]


def _served(folder, *more):
    args = build_parser("serve").parse_args(["serve", str(folder), "--threads", "1", "--engine", "native", *more])
    service = serving.service_of(args, *serving.opened(args))
    return service, *start(make_app(service))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("bytes") / "tiny")


@pytest.fixture(scope="module")
def url(folder):
    _, server, thread, url = _served(folder)
    yield url
    stop(server, thread)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def _chat(client, **more):
    return client.chat.completions.create(model="tiny", **{"messages": ASK, "max_tokens": 12, "temperature": 0} | more)


def test_log_probabilities_are_the_models(client, folder):
    """In a whole answer, in a stream and in a plain completion; transformers computes them again."""
    options = {"logprobs": True, "top_logprobs": 3, "presence_penalty": 1.0, "seed": 1, "temperature": 1.0}
    content = _chat(client, **options).choices[0].logprobs.content
    data = bytes(byte for token in content for byte in token.bytes)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    of_byte = {bytes([byte]): ids for byte, ids in ((byte, _token_of(tokenizer, byte)) for byte in range(256))}
    written = [of_byte[bytes([byte])] for byte in data]
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs[torch.arange(len(written)), torch.tensor(written)]
    torch.testing.assert_close(torch.tensor([one.logprob for one in content]), expected, atol=0.02, rtol=0.02)
    best = torch.tensor([[other.logprob for other in one.top_logprobs] for one in content])
    torch.testing.assert_close(best, logprobs.topk(3).values, atol=0.02, rtol=0.02)
    chunks = [chunk.choices[0] for chunk in _chat(client, stream=True, **options)]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert streamed == content
    del options["top_logprobs"]
    plain = client.completions.create(model="tiny", prompt=[prompt], max_tokens=12, **options | {"logprobs": 3})
    assert plain.choices[0].logprobs.token_logprobs == [one.logprob for one in content]


def _token_of(tokenizer, byte):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte])


def test_several_answers_are_those_of_their_seeds(client):
    three = [choice.message.content for choice in _chat(client, n=3, seed=4, temperature=1.0).choices]
    alone = [_chat(client, seed=4 ^ n, temperature=1.0).choices[0].message.content for n in range(3)]
    assert three == alone
    assert len(set(three)) > 1
    streamed = ["", "", ""]
    for chunk in _chat(client, n=3, seed=4, temperature=1.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_matches_its_schema(client, seed):
    kind = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA, "strict": True}}
    choice = _chat(client, response_format=kind, temperature=1.0, seed=seed, max_tokens=60).choices[0]
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_and_its_answer_is_read(client, stream):
    choice = {"type": "function", "function": {"name": "weather"}}
    given = {"tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "seed": 3, "max_tokens": 80}
    if stream:
        chunks = [chunk.choices[0] for chunk in _chat(client, stream=True, **given)]
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert chunks[-1].finish_reason == "tool_calls"
        assert not any(chunk.delta.content for chunk in chunks)
    else:
        answer = _chat(client, **given).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    said = [
        *ASK,
        {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": call.function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert _chat(client, messages=said, tools=TOOLS).usage.prompt_tokens > len("weatheru:the film\nt:sunny\n")


def test_penalties_change_what_is_repeated(client):
    """With the largest penalty for each earlier token, a greedy answer writes none twice."""
    answer = _chat(client, max_tokens=40, frequency_penalty=2.0, logit_bias={"5": -100}, logprobs=True).choices[0]
    often = [bytes(token.bytes) for token in answer.logprobs.content]
    plain = [bytes(token.bytes) for token in _chat(client, max_tokens=40, logprobs=True).choices[0].logprobs.content]
    assert len(set(often)) > len(set(plain))


def test_completions_continue_texts_and_tokens(client, folder):
    prompts = ["the film", "a plot"]
    both = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=9, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in both.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    ids = AutoTokenizer.from_pretrained(folder)(prompts[1])["input_ids"]
    one = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=9)
    assert one.choices[0].text == texts[2]
    chunks = client.completions.create(model="tiny", prompt=prompts[0], temperature=0, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]
    assert both.usage.prompt_tokens == len("the film") + len("a plot")


def _nested(depth):
    return {"type": "array", "items": _nested(depth - 1)} if depth else {"type": "null"}


def _with_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.mark.parametrize(
    ("route", "change", "message"),
    [
        ("chat/completions", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "with tools"),
        ("chat/completions", {"tool_choice": "required"}, "there are no tools"),
        ("chat/completions", {"logit_bias": {"9999": 1}}, "tokens are below 257"),
        ("chat/completions", {"n": 100}, "at most 32 answers"),
        ("chat/completions", _with_schema({"type": "film"}), "JSON schema is not supported"),
        ("chat/completions", _with_schema({"type": "string", "pattern": "(("}), "unclosed group"),
        ("completions", {"prompt": []}, "prompt: "),
        ("completions", {"prompt": [9999]}, "tokens are below 257"),
        ("completions", {"prompt": "x" * 2000}, "1 to 1023 are supported"),
        ("completions", {"prompt": "x" * 1_000_000}, "1000000 characters; 1 to 5115 are supported"),
        ("completions", {"prompt": ["x"] * 33}, "at most 32 answers"),
        ("completions", {"prompt": "x", "echo": True}, "echo is not supported"),
    ],
)
def test_what_is_refused_is_named(url, route, change, message):
    given = {"model": "tiny", "max_tokens": 2} | ({"messages": ASK} if route != "completions" else {}) | change
    answer = httpx.post(f"{url}/v1/{route}", json=given)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


WIDE = {"type": "object", "properties": {f"a{n}": {"pattern": "(a|b)*" * 9, "type": "string"} for n in range(200)}}


@pytest.mark.parametrize("schema", [_nested(300), WIDE, {"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"}])
def test_a_hostile_schema_is_refused_or_followed(url, client, schema):
    kind = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    given = {"model": "tiny", "messages": ASK, "max_tokens": 2, "response_format": kind}
    assert httpx.post(f"{url}/v1/chat/completions", json=given).status_code in (200, 400)
    assert _chat(client).choices


CIRCLE = {"$ref": "#/$defs/a"}
CIRCLES = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": CIRCLE}}
ENDLESS = {"type": "object", "properties": {"secret": {"$ref": "#"}}, "required": ["secret"]}
"""A value of it holds another value of it, and llguidance gives up in mid-answer."""
CROWDED = [
    {"type": "object", "properties": {f"secret{n}": {"type": "null"}}, "required": [f"secret{n}"]} for n in range(150)
]
"""More alternatives than the parser's limit allows, once an answer reaches them."""


def _format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        CIRCLES | CIRCLE,
        CIRCLES | {"anyOf": [CIRCLE, {"const": 1}]},
        CIRCLES | {"type": "object", "properties": {"x": CIRCLE}, "required": ["x"]},
        {"enum": ["secret" * 30_000]},
        {"enum": []},
    ],
)
def test_a_schema_that_nothing_matches_is_refused_at_once(url, schema, caplog):
    with caplog.at_level(logging.DEBUG):
        given = {"model": "tiny", "messages": ASK, "response_format": _format(schema), "stream": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=given)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    assert "secret" not in caplog.text


def test_a_schema_may_refer_to_itself_where_values_can_end(client):
    tree = {"type": "object", "properties": {"l": {"$ref": "#"}}, "additionalProperties": False}
    choice = _chat(client, response_format=_format(tree), temperature=1.0, seed=1, max_tokens=400).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), tree)


BROKEN = {
    "endless": ENDLESS,
    "crowded": {
        "type": "object",
        "properties": {"x": {"type": "boolean"}, "y": {"anyOf": CROWDED}},
        "required": ["x", "y"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_grammar_that_fails_in_mid_answer_is_an_error(folder, client, name, caplog, monkeypatch):
    """In a whole answer and in a stream; the log has no part of the schema. The parser's limit is lowered for one."""
    monkeypatch.setattr(grammar, "LLParserLimits", partial(grammar.LLParserLimits, max_items_in_row=100))
    given = {"response_format": _format(BROKEN[name]), "temperature": 1.0, "seed": 1, "max_tokens": 300}
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(openai.BadRequestError, match="schema cannot be followed after") as caught:
            _chat(client, **given)
        chunks = []
        with pytest.raises(openai.APIError, match="schema cannot be followed after"):
            chunks.extend(chunk.choices[0].finish_reason for chunk in _chat(client, stream=True, **given))
    assert caught.value.param == "response_format"
    assert not any(chunks)
    assert "schema cannot be followed" in caplog.text
    assert "secret" not in caplog.text
    assert _chat(client).choices


def test_sizes_are_checked_before_anything_is_tokenised(folder, url, monkeypatch):
    """Whatever a request holds, tokenisers see no more characters than its prompts may have."""
    seen = []
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **more: (seen.append(len(text)), call(self, text, **more))[1],
    )

    def ask(route, **change):
        given = {"model": "tiny", "max_tokens": 2} | ({"messages": ASK} if route != "completions" else {}) | change
        seen.clear()
        return httpx.post(f"{url}/v1/{route}", json=given).status_code

    for prompt in (["a"] * 200_000, ["a"] * 33, "a" * 1_000_000, ["a", "b" * 5116], [[1] * 1024], [1] * 400_000):
        assert ask("completions", prompt=prompt) == 400
        assert seen == []
    assert ask("completions", prompt="a", max_tokens=9999) == 400
    assert ask("chat/completions", messages=[{"role": "user", "content": "a" * 900_000}]) == 400
    assert ask("chat/completions", n=33) == 400
    assert ask("chat/completions", logit_bias={"9999": 1}) == 400
    assert seen == []
    assert ask("completions", prompt=["a" * 1000, "b"]) == 200
    assert seen == [1000, 1]


def test_a_long_request_that_is_being_read_delays_no_short_one(folder, monkeypatch):
    _, server, thread, url = _served(folder, "--name", "tiny")
    held, reads = threading.Event(), []
    of = ReaderTokenizers.of
    monkeypatch.setattr(
        ReaderTokenizers,
        "of",
        lambda self, is_long: (reads.append(is_long), is_long and held.wait(60), of(self, is_long))[2],
    )
    prompts = ["b" * 1000] * 32
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client, ThreadPoolExecutor(1) as pool:
        alone = _chat(client).choices[0].message.content
        long = pool.submit(client.completions.create, model="tiny", prompt=prompts, max_tokens=1, temperature=0)
        while True not in reads:
            thread.join(0.01)
            assert thread.is_alive()
        assert _chat(client).choices[0].message.content == alone
        assert 'pst_ds_load{state="waiting"} 1.0' in httpx.get(f"{url}/metrics").text
        assert not long.done()
        held.set()
        assert len(long.result(60).choices) == 32
    stop(server, thread)


def test_a_client_that_goes_before_its_stream_starts_leaves_no_answer(folder, monkeypatch):
    service, server, thread, url = _served(folder, "--name", "tiny")
    submitted, submit = [], service.worker.submit
    held, begun = threading.Event(), threading.Event()
    read = TextService.read_chat
    monkeypatch.setattr(
        TextService, "read_chat", lambda self, *given: (begun.set(), held.wait(60), read(self, *given))[2]
    )
    monkeypatch.setattr(service.worker, "submit", lambda *jobs: (submitted.extend(jobs), submit(*jobs)))
    with httpx.Client(timeout=0.2) as impatient, pytest.raises(httpx.TimeoutException):
        impatient.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": ASK, "stream": True})
    assert begun.wait(60)
    while server.server_state.connections:  # until the server knows that the client has gone
        thread.join(0.01)
    held.set()
    while service.readers.waiting:
        thread.join(0.01)
    stop(server, thread)
    assert all(job.cancelled for job in submitted)
    assert not any(job.written for job in submitted)


def test_counters_and_the_log_hold_no_text(url, client, monkeypatch):
    def counted(line):
        return float(re.search(rf"^{re.escape(line)} ([0-9.e+]+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])

    lines, before = queue.Queue(), counted('pst_ds_tokens_total{kind="new"}')
    monkeypatch.setattr(metrics._LOG, "info", lambda form, line: lines.put(line))
    answer = _chat(client, user="Ann", temperature=1.0, seed=9)
    line = lines.get(timeout=30)
    assert counted('pst_ds_tokens_total{kind="new"}') == before + answer.usage.completion_tokens
    facts = json.loads(line)
    assert (facts["route"], facts["status"], facts["new_tokens"]) == ("/v1/chat/completions", 200, 12)
    assert not any(text in line for text in ("film", "Ann", answer.choices[0].message.content))
    assert counted('pst_ds_load{state="running"}') == 0


def test_counters_of_workers_are_added_and_the_load_of_dead_ones_is_not(tmp_path):
    code = (
        "from pst_ds.inference.serve.metrics import Metrics\n"
        "metrics = Metrics(); metrics.tokens.labels('new').inc(3); metrics.note_load({'running': 2})\n"
        "print(metrics.page().decode())"
    )
    environ = os.environ | {metrics.FOLDER: str(tmp_path)}
    for times in (1, 2):
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert f'pst_ds_tokens_total{{kind="new"}} {3 * times}.0' in done.stdout
        assert 'pst_ds_load{state="running"} 2.0' in done.stdout


def test_the_page_and_a_model_without_template(tmp_path, monkeypatch):
    monkeypatch.setenv(serving.KEYS, "secret")
    _, server, thread, url = _served(byte_model(tmp_path / "plain", None), "--name", "tiny")
    page = httpx.get(url)
    assert "v1/chat/completions" in page.text
    assert "script-src" in page.headers["content-security-policy"]
    assert httpx.get(f"{url}/metrics").status_code == 401
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            _chat(client)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices
    stop(server, thread)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_litellm_reads_the_answers(url):
    litellm = pytest.importorskip("litellm")
    given = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none", "messages": ASK, "temperature": 0}
    whole = litellm.completion(**given, max_tokens=12)
    chunks = litellm.completion(**given, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len(litellm.completion(**given, max_tokens=4, logprobs=True).choices[0].logprobs.content) == 4
    kind = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}
    review = litellm.completion(**given, max_tokens=60, response_format=kind).choices[0].message.content
    jsonschema.validate(json.loads(review), SCHEMA)
    called = litellm.completion(**given, max_tokens=80, tools=TOOLS, tool_choice="required").choices[0]
    assert called.message.tool_calls[0].function.name == "weather"
