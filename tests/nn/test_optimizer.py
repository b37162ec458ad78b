"""Groups of parameters for AdamW in a script."""

from __future__ import annotations

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pst_ds import PSTConfig, inject_pst, pst_parameter_groups
from pst_ds.core.schedule import default_learning_rates


@pytest.mark.parametrize(
    ("of_class", "folder", "tokens"),
    [
        (AutoModelForCausalLM, "tests/data/tiny-llama", True),
        (AutoModelForSequenceClassification, "tests/data/tiny-llama", False),
        (AutoModelForSequenceClassification, "tests/data/tiny-bert", False),
        (AutoModel, "tests/data/tiny-bert", False),
    ],
)
def test_a_script_has_the_rates_of_what_its_model_predicts(of_class, folder, tokens):
    model = inject_pst(of_class.from_pretrained(folder), PSTConfig(score_rank=2, update_rank=2))
    rates = {group["name"]: group["lr"] for group in pst_parameter_groups(model, num_steps=100)}
    expected = default_learning_rates(width=model.config.hidden_size, num_steps=100, predicts_tokens=tokens)
    assert (rates["scores"], rates["updates"]) == (expected.scores, expected.updates)


@pytest.mark.parametrize(("num_labels", "slower"), [(1, False), (2, True), (20, False)])
def test_a_script_has_the_rates_of_its_labels(num_labels, slower):
    model = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", num_labels=num_labels)
    model = inject_pst(model, PSTConfig(score_rank=2, update_rank=2, update_embeddings=("word_embeddings",)))
    once, twice = (
        next(group["lr"] for group in pst_parameter_groups(model, epochs=e) if group["name"] == "embeddings")
        for e in (1.0, 2.0)
    )
    assert (twice < once) == slower
