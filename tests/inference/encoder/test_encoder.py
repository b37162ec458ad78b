"""``pst_ds.load``: the outputs of transformers, for every batch and every form of the folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import pst_ds
from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.inference.decoder import Decoder
from tests.pairs import every_pair

from .conftest import DATA, LABELS, sentences, set_pooling

FORMS = {
    "dense": (),
    "packed": ("--format", "bitmask", "--values", "int8"),
    "onnx": ("--format", "onnx", "--values", "int8"),
}


def expected(folder, texts, pool=lambda hidden: hidden.mean(1)):
    """What transformers computes for each text by itself."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    kind = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    model, rows = kind.from_pretrained(folder).eval(), []
    for text in texts:
        pair = (text,) if isinstance(text, str) else text
        with torch.no_grad():
            found = model(**tokenizer(*pair, truncation=True, max_length=48, return_tensors="pt"))
        rows.append(found.logits if "logits" in found else pool(found.last_hidden_state))
    outputs = torch.cat(rows)
    if "logits" not in found:
        return torch.nn.functional.normalize(outputs).numpy()
    return (outputs.softmax(-1) if outputs.shape[1] > 1 else outputs).numpy()


@every_pair
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["classifier", "regressor", "embedder"])
def test_outputs_are_those_of_transformers_in_any_batch(name, form, encoders, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    folder, reference = encoders / name, encoders / name
    if FORMS[form]:
        folder, reference = tmp_path / form, tmp_path / "reference"
        assert main(["export", str(encoders / name), *FORMS[form], "--out", str(folder)]) == 0
        assert main(["export", str(encoders / name), "--values", "int8", "--out", str(reference)]) == 0
        assert (folder / "1_Pooling" / "config.json").is_file() == (name == "embedder")
    texts = [*sentences(20), *zip(sentences(5, 1), sentences(5, 2), strict=True)]
    wanted = expected(reference, texts)
    for batch, rows in ((1, range(20)), (3, range(19, -1, -1)), (16, range(20)), (4, range(20, 25))):
        model = pst_ds.load(folder, batch=batch)
        assert np.allclose(model.outputs([texts[row] for row in rows]), wanted[rows], atol=2e-3)


def test_predictions_have_names_and_plain_numbers(encoders):
    model = pst_ds.load(encoders / "classifier")
    (first,) = model.predict(["a fine film"])
    (wanted,) = expected(encoders / "classifier", ["a fine film"])
    assert first["label"] == LABELS[wanted.argmax()]
    assert list(first["probabilities"]) == list(LABELS.values())
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert json.loads(json.dumps(first)) == first
    assert model.predict([]) == []
    (score,) = pst_ds.load(encoders / "regressor").predict(["a fine film"])
    assert score["number"] == pytest.approx(expected(encoders / "regressor", ["a fine film"]).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "pool"),
    [
        ({"pooling_mode_cls_token": True}, lambda hidden: hidden[:, 0]),
        ({"pooling_mode": "lasttoken"}, lambda hidden: hidden[:, -1]),
        (
            {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            lambda hidden: torch.cat([hidden.amax(1), hidden.mean(1)], -1),
        ),
    ],
)
def test_embeddings_are_pooled_as_the_folder_says(settings, pool, encoders, tmp_path):
    folder = shutil.copytree(encoders / "embedder", tmp_path / "model")
    set_pooling(folder, settings)
    texts = sentences(5)
    assert np.allclose(pst_ds.load(folder).outputs(texts), expected(folder, texts, pool), atol=1e-5)


def test_texts_are_truncated_as_in_training(encoders, tmp_path):
    folder = shutil.copytree(encoders / "classifier", tmp_path / "model")
    (folder / "pst_manifest.json").write_text(json.dumps({"run": {"data": {"max_length": 5}}}))
    model = pst_ds.load(folder)
    assert model.max_length == 5
    assert model.predict(["a fine film and a plot"]) == model.predict(["a fine film was"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: set_pooling(folder, {"pooling_mode": "weighted"}), "'weighted'"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "Copy it from the original"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "modules.json cannot be read"),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace("BertModel", "BertForTokenClassification")
            ),
            "predicts neither",
        ),
    ],
)
def test_folders_that_are_not_supported_are_named(change, message, encoders, tmp_path):
    folder = shutil.copytree(encoders / "embedder", tmp_path / "model")
    change(folder)
    with pytest.raises(InputError, match=message):
        pst_ds.load(folder)


@pytest.mark.parametrize("texts", ["one text", [("a", "b", "c")], ["one", ("a", "b")], [1], [("a", None)]])
def test_wrong_texts_are_rejected(texts, encoders):
    with pytest.raises(InputError, match="list of strings"):
        pst_ds.load(encoders / "classifier").predict(texts)


def test_outputs_that_are_not_finite_are_an_error(encoders, tmp_path):
    folder = shutil.copytree(encoders / "regressor", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="not finite"):
        pst_ds.load(folder).predict(["a film"])


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_language_model_generates(engine):
    model = pst_ds.load(DATA / "tiny-llama", engine=engine)
    prompt = model.tokenizer("the film is")["input_ids"]
    decoder = Decoder.from_pretrained(DATA / "tiny-llama")
    assert model.generate("the film is", 8) == model.tokenizer.decode(list(decoder.stream(prompt, 8)))
    drawn = [model.generate("the film is", 8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_encoder_has_no_engine(encoders):
    with pytest.raises(InputError, match=r"engine = 'native': .*classifier is not a causal language model. Omit"):
        pst_ds.load(encoders / "classifier", engine="native")


def test_messages_need_a_template():
    model = pst_ds.load(DATA / "tiny-llama")
    messages = [{"role": "user", "content": "the film"}]
    with pytest.raises(InputError, match="chat template"):
        model.generate(messages)
    model.tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }} is"
    assert model.generate(messages, 8) == model.generate("the film is", 8)
