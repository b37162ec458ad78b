"""Default learning rates: as measured at one width and length, lower for wider models and longer runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.model import ModelConfig
from pst_ds.config.run import DataConfig, RunConfig
from pst_ds.config.train import TrainConfig
from pst_ds.core.schedule import FEW_LABELS, USUAL_STEPS, LearningRates, default_learning_rates


def test_where_they_were_measured_they_are_as_measured():
    assert default_learning_rates(width=384, num_steps=600) == LearningRates()


def test_of_tokens_u_and_v_learn_faster_and_scores_slower():
    labels, tokens = (
        default_learning_rates(width=576, num_steps=100, predicts_tokens=tokens) for tokens in (False, True)
    )
    assert tokens == replace(labels, scores=labels.scores / 10, updates=pytest.approx(2.5 * labels.updates))
    assert tokens.updates == pytest.approx(4.2e-3, rel=0.01)


def test_eight_times_the_steps_halve_every_rate_and_twice_the_width_all_but_the_scores():
    longer = default_learning_rates(width=384, num_steps=4800)
    wider = default_learning_rates(width=768, num_steps=600)
    for name in ("scores", "updates", "embeddings", "head", "everything"):
        usual = getattr(LearningRates(), name)
        assert getattr(longer, name) == pytest.approx(usual / 2)
        assert getattr(wider, name) == pytest.approx(usual if name == "scores" else usual / 2)


def test_short_runs_have_the_rates_of_half_the_usual_length():
    half = default_learning_rates(width=384, num_steps=USUAL_STEPS // 2)
    assert half.head == pytest.approx(LearningRates().head * 2 ** (1 / 3))
    assert half == default_learning_rates(width=384, num_steps=200) == default_learning_rates(width=384, num_steps=1)


@given(st.integers(1, 20_000), st.integers(1, 10**9), st.integers(1, 20_000), st.integers(1, 10**9))
def test_neither_width_nor_steps_ever_raise_a_rate(width, steps, more_width, more_steps):
    rates = default_learning_rates(width=width, num_steps=steps)
    lower = default_learning_rates(width=width + more_width, num_steps=steps + more_steps)
    for name in ("scores", "updates", "embeddings", "head", "everything"):
        assert 0.0 < getattr(lower, name) <= getattr(rates, name)


@pytest.mark.parametrize("predicted", [{"num_labels": 2}, {"num_labels": FEW_LABELS}, {"predicts_tokens": True}])
def test_passes_over_the_data_after_the_first_slow_the_embeddings_alone(predicted):
    once, part, twice, often = (
        default_learning_rates(width=384, num_steps=600, epochs=e, **predicted) for e in (1.0, 0.2, 2.0, 30.0)
    )
    assert once == part
    assert once.embeddings == LearningRates().embeddings
    assert twice == replace(once, embeddings=pytest.approx(once.embeddings / 8))
    assert often == replace(once, embeddings=pytest.approx(once.embeddings / 10))


@pytest.mark.parametrize("num_labels", [0, FEW_LABELS + 1, 52])
def test_labels_of_many_values_slow_the_embeddings_after_the_second_pass(num_labels):
    once, twice, thrice, often = (
        default_learning_rates(width=384, num_steps=600, epochs=e, num_labels=num_labels) for e in (1.0, 2.0, 3.0, 30.0)
    )
    assert once == twice == LearningRates()
    assert thrice == replace(once, embeddings=pytest.approx(once.embeddings / 1.5**3))
    assert often == replace(once, embeddings=pytest.approx(once.embeddings / 10))


@pytest.mark.parametrize(("num_labels", "times_lower"), [(2, 8), (20, 1)])
def test_a_run_has_the_rates_of_its_labels(num_labels, times_lower):
    run = RunConfig(
        output_dir="o", model=ModelConfig(path="m"), data=DataConfig(train="t"), train=TrainConfig(num_steps=600)
    )
    examples = 300 * run.train.batch_size
    chosen = run.with_rates(width=384, num_steps=600, num_examples=examples, num_labels=num_labels).train
    assert chosen.embedding_learning_rate == pytest.approx(LearningRates().embeddings / times_lower)
    assert chosen.update_learning_rate == LearningRates().updates


@pytest.mark.parametrize("task", ["causal-lm", "chat", "data-to-text", "regression", "classification"])
def test_a_run_has_the_rates_of_its_task(task):
    run = RunConfig(
        output_dir="o",
        task=task,
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        train=TrainConfig(num_steps=9),
    )
    tokens = task not in ("regression", "classification")
    expected = default_learning_rates(width=384, num_steps=9, predicts_tokens=tokens)
    chosen = run.with_rates(width=384, num_steps=9, num_examples=10**6, num_labels=2).train
    assert (chosen.score_learning_rate, chosen.update_learning_rate) == (expected.scores, expected.updates)


def test_a_run_keeps_the_rates_that_it_names():
    train = TrainConfig(num_steps=600, head_learning_rate=0.0)
    run = RunConfig(output_dir="o", model=ModelConfig(path="m"), data=DataConfig(train="t"), train=train)
    chosen = run.with_rates(width=384, num_steps=600, num_examples=10**6, num_labels=2).train
    assert (chosen.head_learning_rate, chosen.update_learning_rate) == (0.0, LearningRates().updates)


def test_a_method_that_trains_every_weight_has_a_rate_of_its_own():
    of_run = {"model": ModelConfig(path="m"), "data": DataConfig(train="t"), "train": TrainConfig(num_steps=600)}
    run = RunConfig(output_dir="o", method="magnitude", **of_run)
    chosen = run.with_rates(width=384, num_steps=600, num_examples=10**6, num_labels=2).train
    assert chosen.head_learning_rate == pytest.approx(LearningRates().everything)
