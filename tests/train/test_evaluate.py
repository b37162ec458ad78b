"""Predictions on several ranks: every example once, in order, and no rank left waiting."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pst_ds.config.toml import load_run
from pst_ds.data.tasks.classification import classification_metrics
from pst_ds.errors import InputError
from pst_ds.export.reference import kl_from_folder
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.evaluate import _num_differing, compare, kl_divergence, predict
from pst_ds.train.run import build, prepare


def _predict(count, batch_size, overrides):
    run = load_run("tests/data/world_size.toml", [*overrides, f"eval.batch_size={batch_size}"])
    prepared = prepare(run, launch_environment())
    examples = prepared.load("validation").first(count)
    engine = build(prepared)
    engine.eval()
    return predict(engine, prepared, examples)


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize(
    ("world_size", "count", "batch_size"),
    [(2, 61, 8), (3, 61, 8), (3, 5, 8)],  # 8 batches, the last of 5; fewer batches than ranks
)
def test_uneven_batches_neither_hang_nor_count_twice(run_ranks, world_size, count, batch_size):
    whole = _predict(count, batch_size, ["deepspeed_config="])
    for logits in run_ranks(_predict, world_size, count, batch_size, []):
        assert logits.shape == (count, 2)
        np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_metrics_are_those_of_their_definitions():
    logits = np.array([[2.0, 0, 0], [0, 1, 0], [0, 3, 1], [0, 0, 1], [1, 0, 0]])  # predicts 0, 1, 1, 2, 0
    found = classification_metrics(logits, [0, 1, 2, 2, 1])
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    chosen = [np.exp(2) / (np.exp(2) + 2), np.exp(1) / (np.exp(1) + 2), np.exp(1) / (1 + np.exp(3) + np.exp(1))]
    chosen += [np.exp(1) / (np.exp(1) + 2), 1 / (np.exp(1) + 2)]
    assert found["loss"] == pytest.approx(-np.mean(np.log(chosen)))
    # correct * all - sum(true * predicted), over the root of the two spreads (Gorodkin 2004)
    assert found["matthews_correlation"] == pytest.approx((3 * 5 - (1 * 2 + 2 * 2 + 2 * 1)) / 16)


def test_a_number_differs_beyond_its_rounding():
    """Of a single output there is no largest one to compare."""
    ours = torch.tensor([[1.0], [200.0], [0.0], [float("nan")]])
    assert _num_differing(ours, ours) == 1  # a NaN is not the same
    assert _num_differing(ours[:3], ours[:3] * 1.01) == 2
    assert _num_differing(ours[:3], ours[:3] * (1 + 2**-22)) == 0
    assert _num_differing(ours[:3].bfloat16(), (ours[:3] * (1 + 2**-7)).bfloat16()) == 0
    assert _num_differing(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.5]])) == 1


def test_padding_has_no_predictions_to_compare():
    """What a model computes there depends on its attention: a window can leave a padded position nothing to look at."""
    batch = {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    task = SimpleNamespace(
        pads=True,
        collate=lambda examples, indices, tokenizer: batch,
        outcomes=lambda logits, batch: logits.sum((1, 2))[:, None].numpy(),
        metrics=lambda outcomes, examples: {},
    )
    logits = torch.arange(24.0).view(2, 3, 4)

    class Two:
        lengths = (2, 3)

        def __len__(self):
            return 2

    def differences(other):
        models = (lambda **_: SimpleNamespace(logits=logits), lambda **_: SimpleNamespace(logits=other))
        context = SimpleNamespace(task=task, run=SimpleNamespace(eval_batch_size=2), tokenizer=None, device="cpu")
        return compare(*models, context, Two())[:2]

    other = logits.clone()
    other[0, 2] = -other[0, 2]
    assert differences(other) == (0, 0.0)
    other[0, 1] = -other[0, 1]
    assert differences(other) == (1, 14.0)


@pytest.mark.parametrize("labels", [[[-100, -100, 3, -100, 4, 1]], [2, 0]], ids=["tokens", "classes"])
def test_the_divergence_is_that_of_counted_predictions(labels):
    """A token's label is predicted by the logits before it; without a label they may be anything."""
    labels = torch.tensor(labels)
    places = (torch.tensor([0, 0, 0]), torch.tensor([1, 3, 4])) if labels.dim() == 2 else (torch.arange(2),)
    logits = [torch.randn(*labels.shape, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    task = SimpleNamespace(pads=True, collate=lambda *_: {"input_ids": labels, "labels": labels})
    run = SimpleNamespace(eval_batch_size=8)
    context = SimpleNamespace(task=task, run=run, tokenizer=None, device="cpu")
    models = [lambda input_ids, of=of: SimpleNamespace(logits=of) for of in logits]
    p, q = (torch.distributions.Categorical(logits=of[places].double()) for of in logits)
    found = kl_divergence(*models, context, SimpleNamespace(lengths=[6]))
    assert found["kl_mean"] == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-6)


def test_a_number_has_no_distribution():
    prepared = prepare(load_run("tests/data/world_size.toml", ["task=regression"]), launch_environment())
    with pytest.raises(InputError, match="predicts a number, not a distribution"):
        kl_from_folder("tests/data/tiny-bert", None, prepared, None)
