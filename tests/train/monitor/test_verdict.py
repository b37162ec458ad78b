"""The verdict on losses: curves made of a shape and noise, and what a shape that is fine must never be called."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pst_ds.train.fit_verdict import Losses, judge, sentence
from pst_ds.train.monitor.curves import batch_losses
from pst_ds.train.monitor.metrics import MetricsWriter

STEPS, CONSTANT = 400, math.log(2)
EVALUATIONS = range(40, STEPS + 1, 40)


def _training(shape, seed=0, spread=0.08, steps=STEPS):
    """The losses of batches about ``shape``, (share of the steps) -> loss, with noise in proportion to them."""
    rng = np.random.default_rng(seed)
    return [(s, shape(s / steps) * (1 + spread * rng.standard_normal())) for s in range(1, steps + 1)]


def _validation(shape, seed=0, spread=0.01, at=EVALUATIONS):
    rng = np.random.default_rng(seed + 10_000)
    return [(s, shape(s / STEPS) * (1 + spread * rng.standard_normal())) for s in at]


def _losses(training, validation=None, seed=0, spread=0.08, **more):
    facts = {"num_steps": STEPS, "masks_final": 0, "epochs": 3.0, "is_same_loss": True, "constant": CONSTANT}
    points = _validation(validation, seed) if validation else []
    return Losses(training=_training(training, seed, spread), validation=points, **{**facts, **more})


def _kind(losses):
    found = judge(losses)
    return found and found.kind


def _settled(share):
    """Falls early, and no longer."""
    return 0.3 + 0.4 * math.exp(-12 * share)


def _falling(share):
    """Is still falling at the end."""
    return 0.7 - 0.25 * share


def _turning(share):
    """Is lowest at 0.4."""
    return 0.4 + 0.5 * (share - 0.4) ** 2


def _ramped(share):
    """Falls, rises while the sparsity does, up to 0.7, and recovers."""
    dense = 0.25 + 0.4 * math.exp(-10 * share)
    return dense + 0.25 * min(1, share / 0.7) ** 3 - (0.05 * (1 - math.exp(-15 * (share - 0.7))) if share > 0.7 else 0)


@pytest.mark.parametrize("seed", range(30))
def test_a_healthy_run_is_never_blamed(seed):
    above = lambda share: _settled(share) + 0.04  # noqa: E731
    assert judge(_losses(_settled, above, seed)) is None
    assert judge(_losses(_settled, None, seed)) is None
    assert judge(_losses(_ramped, lambda share: _ramped(share) + 0.05, seed, masks_final=280)) is None


@pytest.mark.parametrize("seed", range(30))
def test_a_run_that_is_still_falling_underfits(seed):
    found = judge(_losses(_falling, _falling, seed))
    assert found.kind == "underfits"
    assert not found.is_slow
    assert "still falls, by " in found.reason


@pytest.mark.parametrize("seed", range(30))
def test_a_validation_loss_that_turned_overfits(seed):
    """And the step at which it was lowest is found to a tenth of the run."""
    found = judge(_losses(lambda share: 0.5 * math.exp(-3 * share), _turning, seed))
    assert found.kind == "overfits"
    assert abs(found.best_step - 0.4 * STEPS) <= 0.1 * STEPS


def test_a_rise_along_the_ramp_is_not_overfitting():
    """The same rise counts once the masks are final."""
    rise = lambda share: 0.4 + 0.3 * min(share, 0.7)  # noqa: E731
    falls = lambda share: 0.5 - 0.3 * share  # noqa: E731
    assert judge(_losses(falls, rise, masks_final=280)) is None
    assert _kind(_losses(falls, rise, masks_final=0)) == "overfits"


def test_a_validation_loss_that_rises_with_the_training_loss_is_not_overfitting():
    worse = lambda share: 0.3 + 0.2 * share  # noqa: E731
    assert judge(_losses(worse, worse)) is None


def test_a_single_high_value_is_not_overfitting():
    falls = _losses(lambda share: 0.4 - 0.2 * share)
    values = [0.5, 0.62, 0.49, 0.6, 0.47, 0.61, 0.5, 0.6, 0.48, 0.6]
    assert judge(replace(falls, validation=list(zip(EVALUATIONS, values, strict=True)))) is None
    assert _kind(replace(falls, validation=[(s, 0.47 + 0.13 * i / 9) for i, s in enumerate(EVALUATIONS)])) == "overfits"


def test_a_metric_that_gained_outweighs_the_loss():
    """Of classes the loss may rise with the model's confidence while more answers are right."""
    losses = _losses(lambda share: 0.5 * math.exp(-3 * share), _turning)
    gained = [(s, 0.8 + s / 10_000) for s in EVALUATIONS]
    assert judge(replace(losses, metric=gained)) is None
    assert _kind(replace(losses, metric=[(s, 0.8) for s in EVALUATIONS])) == "overfits"


def test_a_run_that_learned_nothing_is_slow():
    found = judge(_losses(lambda share: 0.68))
    assert found.kind == "underfits"
    assert found.is_slow
    assert judge(_losses(lambda share: 0.68, constant=None)) is None
    assert judge(_losses(lambda share: 0.5 if 0.3 < share < 0.6 else 0.68)) is None  # learned, and lost again


def test_training_that_falls_by_heart_is_not_underfitting():
    """What it falls by is not found on other text, unless each text is read once."""
    flat = lambda share: 0.62  # noqa: E731
    assert judge(_losses(_falling, flat)) is None
    end_only = replace(_losses(_falling), validation=[(STEPS, 0.62)])
    assert judge(end_only) is None
    assert _kind(replace(end_only, epochs=1.0)) == "underfits"


def test_a_distance_from_a_teacher_says_nothing_by_itself():
    """Its scale is its own: it falls, and is far from anything that the labels have."""
    distance = lambda share: 2.0 * math.exp(-2 * share)  # noqa: E731
    for validation in (lambda share: 0.4, None, _falling):
        assert judge(_losses(distance, validation, is_same_loss=False)) is None
    assert _kind(_losses(distance, _turning, is_same_loss=False)) == "overfits"


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_a_few_steps_say_nothing(count):
    losses = replace(_losses(_falling), training=_training(_falling, steps=count) if count else [], num_steps=count)
    assert judge(losses) is None


def test_a_sentence_names_the_changes():
    fit = {"verdict": "overfits", "reason": "it does", "fixes": [{"a": 1}, {"b": 2.0, "c": 3}]}
    assert sentence(fit) == "The run overfits: it does. Fix: a = 1; or b = 2.0, c = 3. More training data helps too."
    assert sentence({"verdict": None}) == sentence({}) == ""


def test_skipped_steps_have_a_loss_too(tmp_path):
    """Four batches took two steps, and one loss is not finite. Lines of older runs only have means."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "event": "step", "loss": 0.9},
        {"step": 3, "event": "step", "loss": 2.7, "losses": [1.0, None, 3.0, 4.0]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4, "event": "evaluation"}]))
    assert batch_losses(path) == [(1, 0.9), (1, 1.0), (3, 3.0), (3, 4.0)]
    assert batch_losses(path, 2) == [(1, 0.9)]


def test_a_verdict_is_shown_and_in_tensorboard(tmp_path, capsys):
    metrics = MetricsWriter(tmp_path, num_steps=8, is_main=True)
    metrics.evaluation(6, {"accuracy": 0.5, "loss": 0.9})
    metrics.verdict(6, "The run underfits: so it does.")
    metrics.close()
    shown = capsys.readouterr().err
    assert "step 6: accuracy 0.5, loss 0.9\n" in shown
    assert shown.count("The run underfits: so it does.") == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = [event.tensor_proto.string_val for event in board.Tensors("fit/text_summary")]
    assert texts == [[b"The run underfits: so it does."]]
