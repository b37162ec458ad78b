"""Classifiers, regressors and embedding models over HTTP: the formats, batches, and what is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.lazy_module import lazy_module, need_packages

need_packages("fastapi", "uvicorn", "openai")

import httpx2 as httpx  # noqa: E402
import numpy as np  # noqa: E402

from pst_ds.cli.main import build_parser, main  # noqa: E402
from pst_ds.cli.serve import service as serving  # noqa: E402
from pst_ds.inference.encoder.encoder import Encoder  # noqa: E402
from pst_ds.inference.serve.app import make_app  # noqa: E402
from pst_ds.inference.serve.encoders import Batcher  # noqa: E402
from pst_ds.inference.serve.protocol import ProtocolError  # noqa: E402
from tests.inference.encoder.conftest import DATA, LABELS, encoders, sentences  # noqa: E402, F401
from tests.inference.serve.servers import start, stop  # noqa: E402

openai = lazy_module("openai")


@pytest.fixture(scope="module")
def urls(encoders):  # noqa: F811
    """The address of a server of each encoder."""
    servers = {}
    for name in ("classifier", "regressor", "embedder"):
        args = build_parser("serve").parse_args(["serve", str(encoders / name), "--name", "tiny"])
        servers[name] = start(make_app(serving.service_of(args, *serving.opened(args))))
    yield {name: f"{url}/v1" for name, (_, _, url) in servers.items()}
    for server, thread, _ in servers.values():
        stop(server, thread)


def ask(url, given, route="classify", **fields):
    return httpx.post(f"{url}/{route}", json={"model": "tiny", "input": given, **fields}, timeout=60)


def test_a_classifier_answers_like_vllm(urls, encoders):  # noqa: F811
    texts = [*sentences(5), ("a fine film", "a dull plot")]
    wanted = [Encoder(encoders / "classifier").outputs([text])[0] for text in texts]
    answer = ask(urls["classifier"], texts[:5]).json()
    for at, (row, of) in enumerate(zip(answer["data"], wanted[:5], strict=True)):
        assert (row["index"], row["label"], row["num_classes"]) == (at, LABELS[of.argmax()], len(LABELS))
        assert np.allclose(row["probs"], of, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 5 * 3
    (single,) = ask(urls["classifier"], texts[0]).json()["data"]
    assert np.allclose(single["probs"], wanted[0], atol=1e-5)
    (pair,) = ask(urls["classifier"], texts[5:]).json()["data"]
    assert np.allclose(pair["probs"], wanted[5], atol=1e-5)


def test_a_regressor_answers_with_its_number(urls, encoders):  # noqa: F811
    (row,) = ask(urls["regressor"], "a fine film").json()["data"]
    assert row["label"] is None
    assert row["probs"] == pytest.approx([Encoder(encoders / "regressor").outputs(["a fine film"]).item()], abs=1e-5)


def test_the_official_client_reads_embeddings(urls, encoders):  # noqa: F811
    client, texts = openai.OpenAI(base_url=urls["embedder"], api_key="none", max_retries=0), sentences(5)
    wanted = Encoder(encoders / "embedder").outputs(texts)
    for options in ({}, {"encoding_format": "float"}, {"dimensions": wanted.shape[1]}):  # its default is base64
        answer = client.embeddings.create(model="tiny", input=texts, **options)
        assert np.allclose([row.embedding for row in answer.data], wanted, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="dimensions = 7"):
        client.embeddings.create(model="tiny", input=texts, dimensions=7)


def test_concurrent_requests_get_their_own_answers(urls, encoders):  # noqa: F811
    texts = sentences(60, seed=3)
    wanted = Encoder(encoders / "embedder").outputs(texts)
    parts = [range(first, min(first + 1 + first % 7, 60)) for first in range(0, 60, 3)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda part: ask(urls["embedder"], [texts[i] for i in part], "embeddings").json(), parts)
    for part, answer in zip(parts, answers, strict=True):
        assert np.allclose([row["embedding"] for row in answer["data"]], wanted[part], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"input": 7}, 400, "input:"),
        ({"input": []}, 400, "input:"),
        ({"input": [1, 2]}, 400, "input:"),
        ({"input": ["a", ["b", "c", "d"]]}, 400, "input:"),
        ({"input": ["a", ["b", "c"]]}, 400, "list of strings"),
        ({"input": ["a"] * 3000}, 400, "input:"),
        ({"input": "film " * 100}, 400, "maximum context length is 48 tokens, and an input has 102"),
        ({"truncate_prompt_tokens": 100}, 400, "is more than the maximum context length, 48"),
        ({"truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens:"),
        ({"encoding_format": "hex"}, 400, "encoding_format:"),
        ({"inputs": "a"}, 400, "Did you mean 'input'?"),
        ({"model": "large"}, 404, "does not exist"),
    ],
)
def test_wrong_requests_are_named(urls, fields, status, message):
    answer = httpx.post(f"{urls['classifier']}/classify", json={"model": "tiny", "input": "a film", **fields})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_long_texts_are_truncated_on_request(urls):
    long, cut = "film " * 100, "film " * 10
    wanted = ask(urls["classifier"], cut.strip()).json()["data"][0]["probs"]
    assert ask(urls["classifier"], long, truncate_prompt_tokens=12).json()["data"][0]["probs"] == wanted
    assert ask(urls["classifier"], long, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 48


@pytest.mark.parametrize(
    ("name", "route", "right"),
    [("classifier", "chat/completions", "/v1/classify"), ("embedder", "classify", "/v1/embeddings")],
)
def test_routes_of_other_models_name_the_right_one(urls, name, route, right):
    answer = ask(urls[name], "a film", route)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(f"This model answers POST {right}")


def test_what_is_for_text_is_refused(encoders, capsys):  # noqa: F811
    assert main(["serve", str(encoders / "classifier"), "--port", "0", "--max-new-tokens", "5"]) == 2
    assert "--max-new-tokens is for causal models" in capsys.readouterr().err


class Held(Encoder):
    """An encoder whose batches wait for :attr:`released`, and fail with tokens that no model has."""

    def __init__(self, path):
        super().__init__(path, batch=4)
        self.released, self.batches = threading.Event(), list[list[int]]()

    def compute(self, features):
        assert self.released.wait(60)
        self.batches.append([len(one["input_ids"]) for one in features])
        return super().compute(features)


def test_waiting_texts_are_batched_by_length_and_one_that_fails_is_alone(encoders):  # noqa: F811
    encoder = Held(encoders / "regressor")
    batcher = Batcher(encoder, most_waiting=8)
    batcher.start()
    texts = [encoder.tokenized(["film " * length], None)[0] for length in (9, 1, 30, 1, 30, 1, 30, 1, 30)]
    first = batcher.outputs(texts[:1])
    while batcher._waiting:
        pass  # until the thread holds the first batch
    gone, *rest = batcher.outputs([texts[1], *texts[1:], {"input_ids": [10**6] * 30}])
    assert gone.cancel()
    with pytest.raises(ProtocolError, match="too many requests"):
        batcher.outputs(texts[:1])
    encoder.released.set()
    plain = Encoder(encoders / "regressor")
    wanted = [plain.compute([text])[0] for text in texts]
    assert np.allclose([future.result(60) for future in (*first, *rest[:-1])], wanted, atol=1e-5)
    with pytest.raises(IndexError):
        rest[-1].result(60)
    # the oldest first, without long ones; the one that is gone gives up its place
    assert encoder.batches[:2] == [[11], [3, 3, 3, 3]]
    batcher.close()


def test_closing_refuses_what_waits(encoders):  # noqa: F811
    encoder = Held(encoders / "regressor")
    batcher, texts = Batcher(encoder, most_waiting=8), encoder.tokenized(sentences(2), None)
    batcher.start()
    (first,) = batcher.outputs(texts[:1])
    while batcher._waiting:
        pass
    (second,) = batcher.outputs(texts[1:])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._closing:
        pass
    encoder.released.set()
    closing.join(60)
    assert first.result(60).shape == (1,)
    with pytest.raises(ProtocolError, match="closing"):
        second.result(60)
