"""A trial leaves nothing large behind: DeepSpeed holds on to its models, and a search makes a dozen."""

from __future__ import annotations

from unittest import mock

import pytest

from pst_ds.config.toml import load_run
from pst_ds.parallel import zero3
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare
from pst_ds.train.tune import trials
from pst_ds.train.tune.halving import Rung


def _held(param):
    return param.numel() + zero3.shard_of(param).values.numel()


def _weights_and_moments_of_trials(folder):
    """Numbers in the weights and in the optimizer of each trial, at its end and after the search."""
    run = load_run("tests/data/world_size.toml", [f"output_dir={folder}", "train.num_steps=100"])
    engines, during, evaluate = [], [], trials.evaluate_with_error

    def evaluated(engine, *arguments):
        params, inner = list(engine.module.parameters()), engine.optimizer.optimizer
        engines.append((params, inner))
        during.append((sum(map(_held, params)), len(inner.state)))
        return evaluate(engine, *arguments)

    with mock.patch.multiple(trials, evaluate_with_error=evaluated, rungs=lambda *_: [Rung(3, 2)]):
        lines = trials.search(prepare(run, launch_environment()), 1.0)
    return during, [(sum(map(_held, params)), len(inner.state)) for params, inner in engines], len(lines)


@pytest.mark.zero3
@pytest.mark.thorough
def test_weights_and_moments_of_a_trial_are_freed(run_ranks, tmp_path):
    for during, after, lines in run_ranks(_weights_and_moments_of_trials, 2, str(tmp_path / "run")):
        assert lines == 1 + 3 + 1
        assert all(held > 10_000 and moments > 0 for held, moments in during)
        assert after == [(0, 0)] * 3
