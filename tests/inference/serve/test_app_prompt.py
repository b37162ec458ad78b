"""Models with a trained prompt over HTTP: their answers are those of the model itself."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lazy_module import need_packages

need_packages("fastapi", "uvicorn")

import httpx2 as httpx  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

from pst_ds.additions.prompt import PromptSettings  # noqa: E402
from pst_ds.cli.main import build_parser, main  # noqa: E402
from pst_ds.cli.serve import service as serving  # noqa: E402
from pst_ds.hf.model_folder import open_model_folder  # noqa: E402
from pst_ds.inference.serve.app import make_app  # noqa: E402
from pst_ds.nn.addition import added_modules, attach_additions, saved_additions, write_additions  # noqa: E402
from tests.inference.serve.servers import start, stop  # noqa: E402

PROMPTS = ("a good", "the film is a dull", "plot")
"""Texts of different lengths, so that a batch of them is padded."""


def _prompted(folder, source, kind):
    """Write an export of the model in ``source`` with a prompt that changes its outputs."""
    torch.manual_seed(0)
    plain = kind.from_pretrained(source)
    plain.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / file, folder / file)
    attach_additions(
        plain, {"prompt": PromptSettings(text="a good plot")}, AutoTokenizer.from_pretrained(source), seed=0
    )
    ((place, prompt),) = added_modules(plain).items()
    values = {f"{place}.vectors": prompt.vectors.detach() * 20}
    write_additions(folder, saved_additions(plain, values, torch.float32))
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return _prompted(tmp_path_factory.mktemp("decoder"), "tests/data/tiny-llama", AutoModelForCausalLM)


@contextmanager
def _served(folder, *more):
    """Serve the model of ``folder``; yield the address of its API."""
    args = build_parser("serve").parse_args(["serve", str(folder), "--name", "tiny", *more])
    server, thread, url = start(make_app(serving.service_of(args, *serving.opened(args))))
    yield f"{url}/v1"
    stop(server, thread)


def test_completions_in_a_padded_batch_are_those_of_the_model(decoder, capsys):
    folder = open_model_folder(decoder)
    tokenizer = folder.tokenizer()
    expected = {}
    for model in (folder.load(), AutoModelForCausalLM.from_pretrained(decoder)):
        for text in PROMPTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            expected.setdefault(text, []).append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert any(with_prompt != without for with_prompt, without in expected.values())

    with _served(decoder) as url:

        def ask(text):
            body = {"model": "tiny", "prompt": text, "max_tokens": 6, "temperature": 0}
            return httpx.post(f"{url}/completions", json=body, timeout=60).json()["choices"][0]["text"].strip()

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, PROMPTS * 2))
    assert answers == [expected[text][0] for text in PROMPTS * 2]


def test_a_classifier_answers_with_its_prompt(tmp_path):
    folder = _prompted(tmp_path / "classifier", "tests/data/tiny-bert", AutoModelForSequenceClassification)
    model = open_model_folder(folder).load()
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = open_model_folder(folder).tokenizer()("a good film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits.softmax(-1)[0]
        assert not torch.allclose(plain(**ids).logits.softmax(-1)[0], expected, atol=1e-3)
    with _served(folder) as url:
        answer = httpx.post(f"{url}/classify", json={"model": "tiny", "input": "a good film"}, timeout=60).json()
    assert answer["data"][0]["probs"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_native_decoder_refuses_a_prompt(decoder, capsys):
    assert main(["serve", str(decoder), "--engine", "native"]) == 2
    assert "which the native decoder does not compute" in capsys.readouterr().err
