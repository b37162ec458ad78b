"""A real server in a thread, asked by the official client."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pst_ds.cli.main import build_parser, main
from tests.lazy_module import lazy_module, need_packages

need_packages("fastapi", "uvicorn", "openai")

import httpx2 as httpx  # noqa: E402

from pst_ds.checkpoint.user_store import UserStore  # noqa: E402
from pst_ds.cli.serve import service as serving  # noqa: E402
from pst_ds.inference.decoder import Decoder  # noqa: E402
from pst_ds.inference.serve.app import make_app  # noqa: E402
from pst_ds.inference.serve.batches import Batches  # noqa: E402
from pst_ds.inference.serve.slots import Slots  # noqa: E402
from tests.inference.serve.servers import start, stop  # noqa: E402

openai = lazy_module("openai")

ASK = [{"role": "user", "content": "the film"}]
JSON = {"Content-Type": "application/json"}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def _settings(settings):
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[3])
        small = {"output_dir": str(top / "run"), "deepspeed_config": "", "train.num_steps": 4, "data.max_length": 16}
        assert main(["train", "tests/data/causal_lm.toml", "--quiet", *_settings(small)]) == 0
        assert main(["export", str(top / "run"), "--format", "bitmask", "--out", str(top / "tiny"), "--quiet"]) == 0
        words = ["users", "train", str(top / "run"), "--store", str(top / "users"), "--by", "label", "--quiet"]
        assert main([*words, "--form", "beside", "--epochs", "3", "--learning-rate", "0.05"]) == 0
    (top / "template.jinja").write_text(TEMPLATE)
    return top


def _words(folders, store=None):
    """``store``: of the users, None for theirs, False for no users."""
    words = ["serve", str(folders / "tiny"), "--max-new-tokens", "12"]
    words += [] if store is False else ["--store", str(store or folders / "users")]
    return [*words, "--chat-template", str(folders / "template.jinja"), "--max-body", "4000"]


def _start(folders, *more, store=None, **limits):
    args = build_parser("serve").parse_args([*_words(folders, store), *more])
    service = serving.service_of(args, *serving.opened(args))
    service = replace(service, limits=replace(service.limits, **limits))
    server, thread, url = start(make_app(service))
    return service, server, thread, f"{url}/v1"


def _client(url, **more):
    return openai.OpenAI(base_url=url, max_retries=0, **{"api_key": "none"} | more)


@pytest.fixture(scope="module")
def server(folders):
    _, running, thread, url = _start(folders)
    yield url
    stop(running, thread)


@pytest.fixture
def client(server):
    with _client(server) as made:
        yield made


def _asked(client, model="tiny", **more):
    given = {"temperature": 0, "max_tokens": 8} | more
    return client.chat.completions.create(model=model, messages=ASK, **given)


def test_an_answer_and_its_usage(client):
    answer = _asked(client)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert _asked(client).choices[0].message.content == answer.choices[0].message.content


def test_a_stream_is_the_same_text_in_pieces(client):
    whole = _asked(client)
    chunks = list(_asked(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_drawn_text_follows_its_seed(client):
    texts = [_asked(client, temperature=1.5, seed=seed, max_tokens=12).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_an_answer(client):
    whole = _asked(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = _asked(client, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_users_of_one_batch_get_what_each_gets_alone(folders):
    service, running, thread, url = _start(folders)
    assert isinstance(service.worker, Slots)
    with _client(url) as client:
        models = [model.id for model in client.models.list().data]
        assert models == ["tiny", "tiny:bad", "tiny:good"]
        alone = {model: _asked(client, model).choices[0].message.content for model in models}
        with ThreadPoolExecutor(9) as pool:
            together = list(pool.map(lambda model: _asked(client, model).choices[0].message.content, models * 3))
    assert together == [alone[model] for model in models * 3]
    assert len(set(together)) > 1
    stop(running, thread)


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "other"}, "NotFoundError", "model_not_found"),
        ({"model": "tiny:zoe"}, "NotFoundError", "model_not_found"),
        ({"model": "tiny:../bad"}, "NotFoundError", "model_not_found"),
        ({"max_tokens": 13}, "BadRequestError", None),
        ({"temperature": 9}, "BadRequestError", None),
        ({"messages": [{"role": "user", "content": "film " * 600}]}, "BadRequestError", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "film " * 900}]}, "APIStatusError", None),
    ],
)
def test_what_is_refused_has_the_protocols_error(client, change, error, code):
    given = {"model": "tiny", "messages": ASK, "max_tokens": 4} | change
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**given)
    assert caught.value.code == code
    assert caught.value.body["message"]
    assert _asked(client).choices  # and the server goes on


def test_a_body_that_is_not_json_or_too_long(server):
    def status(content):
        return httpx.post(f"{server}/chat/completions", content=content, headers=JSON).status_code

    assert status(b"{") == 400
    assert status(b"[" * 3000) == 400
    assert status(b" " * 5000) == 413
    assert status(iter([b" " * 3000, b" " * 3000])) == 413
    assert httpx.get(server.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_every_error_is_the_protocols(server, client):
    assert client.models.retrieve("tiny:good").id == "tiny:good"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tiny:../good")
    assert caught.value.code == "model_not_found"
    for found, status in ((httpx.get(f"{server}/chat/completions"), 405), (httpx.get(f"{server}/nowhere"), 404)):
        assert (found.status_code, found.json()["error"]["type"]) == (status, "invalid_request_error")


def test_a_body_that_does_not_end(folders):
    """A client that says of its body more than it sends is told so, and does not hold a connection for good."""
    _, running, thread, url = _start(folders, body_seconds=0.05)
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=30) as link:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        link.sendall(head + b"Content-Length: 90\r\n\r\n{")
        assert link.recv(1000).startswith(b"HTTP/1.1 408")
    stop(running, thread)


def test_a_client_that_goes_takes_its_request_along(folders, monkeypatch):
    service, running, thread, url = _start(folders, "--engine", "torch", store=False)
    held, decode, jobs = threading.Event(), service.worker._compute, []
    monkeypatch.setattr(service.worker, "_compute", lambda now: (jobs.extend(now), held.wait(30), decode(now)))
    with pytest.raises(openai.APITimeoutError), _client(url, timeout=0.3) as impatient:
        _asked(impatient)
    while not jobs[0].cancelled:
        thread.join(0.01)
        assert thread.is_alive()
    held.set()
    with _client(url) as client:
        assert _asked(client).choices
    stop(running, thread)


def test_quantised_weights_are_served_by_the_native_decoder(folders, tmp_path, capsys):
    """Its answers equal those of ``Decoder.stream`` under load."""
    words = ["export", str(folders / "run"), "--format", "bitmask", "--values", "int8", "--out", str(tmp_path / "int8")]
    assert main([*words, "--quiet"]) == 0
    template = ["--chat-template", str(folders / "template.jinja")]
    args = build_parser("serve").parse_args(["serve", str(tmp_path / "int8"), *template, "--memory", "0.001"])
    service = serving.service_of(args, *serving.opened(args))
    assert isinstance(service.worker, Slots)
    server, thread, url = start(make_app(service))
    with _client(f"{url}/v1") as client, ThreadPoolExecutor(6) as threads:
        asked = [{"seed": n, "temperature": n % 2, "max_tokens": 5 + n} for n in range(12)]
        answers = list(threads.map(lambda more: _asked(client, "int8", **more), asked))
        texts = [answer.choices[0].message.content for answer in answers]
        assert texts == [_asked(client, "int8", **more).choices[0].message.content for more in asked]
    stop(server, thread)
    decoder = Decoder.from_pretrained(tmp_path / "int8", threads=1)
    prompt = service.prompt_of(ASK)
    written = list(decoder.stream(prompt, asked[4]["max_tokens"], end=service.worker._ends))
    text = service.tokenizer.decode(written, skip_special_tokens=True)
    assert answers[4].usage.prompt_tokens == len(prompt)
    assert texts[4].strip() == text.strip()
    words, found = ["serve", str(tmp_path / "int8"), *template], []
    for more in (["--memory", "0.00008"], ["--memory", "0.00016", "--workers", "2"]):
        args = build_parser("serve").parse_args([*words, *more])
        small = serving.service_of(args, *serving.opened(args))
        small.worker.close()
        found.append((small.limits.positions, small.limits.new_tokens))
    assert found[0] == found[1]
    assert 24 <= found[0][0] < 48
    words += ["--memory", "0.000001"]
    assert main([*words, "--engine", "native"]) == 2
    assert "bytes hold 0 positions of each of 8 sequences" in capsys.readouterr().err
    assert main([*words, "--engine", "torch"]) == 2
    assert "--memory is for the native decoder" in capsys.readouterr().err


def test_users_that_come_and_go_while_it_serves(folders, tmp_path):
    """Another process adds a user, removes one, and spoils the file of a third: each is told what is so, and others
    are served."""
    shutil.copytree(folders / "users", tmp_path / "users")
    _, running, thread, url = _start(folders, store=tmp_path / "users")
    store = UserStore(tmp_path / "users")
    with _client(url) as client:
        bad = _asked(client, "tiny:bad").choices[0].message.content
        store.add("new", store.state("bad"))
        store.remove("bad")
        (store.folder / "states" / store.entry("good").file).write_bytes(b"")
        assert _asked(client, "tiny:new").choices[0].message.content == bad
        assert [model.id for model in client.models.list().data] == ["tiny", "tiny:good", "tiny:new"]
        with pytest.raises(openai.NotFoundError):
            _asked(client, "tiny:bad")
        with pytest.raises(openai.InternalServerError) as caught:
            _asked(client, "tiny:good")
        assert str(tmp_path) not in caught.value.message  # where files are is nobody's business
    stop(running, thread)


def test_a_user_is_looked_up_once_for_a_request(folders, monkeypatch):
    looked, state = [], UserStore.state
    _, running, thread, url = _start(folders)
    monkeypatch.setattr(UserStore, "state", lambda store, name: (looked.append(name), state(store, name))[1])
    with _client(url) as client:
        _asked(client, "tiny:good")
    assert looked == ["good"]
    stop(running, thread)


def test_keys_and_a_full_queue(folders, monkeypatch):
    monkeypatch.setenv(serving.KEYS, "one, two")
    service, running, thread, url = _start(
        folders, "--max-waiting", "1", "--max-batch", "1", "--engine", "torch", store=False
    )
    begun, held, decode = threading.Event(), threading.Event(), service.worker._compute
    monkeypatch.setattr(service.worker, "_compute", lambda jobs: (begun.set(), held.wait(30), decode(jobs)))
    with _client(url, api_key="three") as stranger:
        for ask in (lambda: _asked(stranger), stranger.models.list):
            with pytest.raises(openai.AuthenticationError):
                ask()
    with _client(url, api_key="two") as client, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(_asked, client)]
        assert begun.wait(30)
        answers += [pool.submit(_asked, client) for _ in range(3)]  # one is written, one waits
        refused = []
        while len(refused) < 2:
            refused = [a.exception() for a in answers if a.done()]
        assert all(isinstance(error, openai.RateLimitError) for error in refused)
        held.set()
        assert sum(a.exception() is None for a in answers) == 2
    stop(running, thread)


def test_a_folder_of_a_run_and_its_users(tmp_path, capsys):
    """Texts of one batch, of other lengths and users, are those of ``generate``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[3])
        small = {
            "output_dir": str(tmp_path / "run"),
            "deepspeed_config": "",
            "train.num_steps": 4,
            "data.max_length": 16,
        }
        assert main(["train", "tests/data/causal_lm.toml", "--quiet", *_settings(small)]) == 0
        words = [str(tmp_path / "run"), "--quiet"]
        assert main(["export", *words, "--format", "bitmask", "--out", str(tmp_path / "tiny")]) == 0
        more = ["--form", "beside", "--epochs", "3", "--learning-rate", "0.05"]
        assert main(["users", "train", *words, "--store", str(tmp_path / "users"), "--by", "label", *more]) == 0
    asked = [(text, user) for text in ("the film", "a very clever plot and the cast") for user in (None, "bad", "good")]
    alone = []
    for text, user in asked:
        words = ["generate", str(tmp_path / "tiny"), "--prompt", f"{text} ", "--max-new-tokens", "8", "--json"]
        capsys.readouterr()
        assert main([*words, *(["--store", str(tmp_path / "users"), "--user", user] if user else [])]) == 0
        alone.append(json.loads(capsys.readouterr().out.splitlines()[-1])["text"])
    assert len(set(alone)) > 3
    (tmp_path / "template.jinja").write_text("{{ bos_token }}" + TEMPLATE)  # a tokenizer adds it to a plain text itself
    service, running, thread, url = _start(tmp_path)
    positions = json.loads((tmp_path / "tiny" / "config.json").read_text())["max_position_embeddings"]
    assert service.limits.positions == positions

    def ask(one):
        messages = [{"role": "user", "content": one[0]}]
        model = f"tiny:{one[1]}" if one[1] else "tiny"
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
        return answer.choices[0].message.content

    with _client(url) as client, ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, asked * 2)) == alone * 2
    stop(running, thread)


def test_a_template_that_loops_fails_its_request_alone(folders, tmp_path):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "loops.jinja").write_text(TEMPLATE + "{% if 'loop' in messages[0].content %}" + loop + "{% endif %}")
    more = ("--chat-template", str(tmp_path / "loops.jinja"))
    _, running, thread, url = _start(folders, *more, template_seconds=0.05)
    with _client(url) as client, ThreadPoolExecutor(4) as pool:
        looping = pool.submit(
            client.chat.completions.create, model="tiny", messages=[{"role": "user", "content": "loop"}]
        )
        assert all(answer.choices for answer in pool.map(lambda _: _asked(client), range(3)))
        with pytest.raises(openai.BadRequestError, match=r"template .* ran for more than 0\.05 seconds"):
            looping.result()
    stop(running, thread)


def test_a_template_may_not_write_far_more_than_a_body(folders, tmp_path):
    (tmp_path / "writes.jinja").write_text(TEMPLATE + "{{ 20000 * ('film' in messages[0].content) * 'xyz' }}")
    _, running, thread, url = _start(folders, "--chat-template", str(tmp_path / "writes.jinja"))
    with _client(url) as client, pytest.raises(openai.BadRequestError, match="wrote 60009 characters"):
        _asked(client)
    stop(running, thread)


def test_a_server_is_warm_before_it_listens(folders, monkeypatch):
    """Of a prompt and of a next token, or of a user: what they need is compiled before /health."""
    steps, step = [], Batches._step
    users, assign = [], Decoder.assign
    monkeypatch.setattr(
        Batches, "_step", lambda batches, ids, *of: (steps.append(ids.shape), step(batches, ids, *of))[1]
    )
    monkeypatch.setattr(Decoder, "assign", lambda to, state: (users.append(state), assign(to, state))[1])
    for words in ([*_words(folders, store=False), "--engine", "torch"], _words(folders)):
        args = build_parser("serve").parse_args(words)
        serving.service_of(args, *serving.opened(args)).worker.close()
    (rows, tokens), *rest = steps
    assert (rows, rest) == (1, [(1, 1)])
    assert tokens > 1
    assert users[0] is users[-1] is None
    assert users[1].keys() == UserStore(folders / "users").common.shapes.keys()


def test_what_cannot_be_served_is_one_message(folders, tmp_path, capsys):
    shutil.copytree(folders / "users", tmp_path / "users")
    (tmp_path / "users" / "index.json").write_text("{")
    words = ["serve", str(folders / "tiny"), "--chat-template", str(folders / "template.jinja")]
    assert main([*words, "--store", str(tmp_path / "users")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main([*words, "--port", "70000"]) == 2
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('never') }}")
    assert main(["serve", str(folders / "tiny"), "--chat-template", str(tmp_path / "refuses.jinja")]) == 2
    assert "refuses.jinja: the chat template refuses these messages: never" in capsys.readouterr().err
