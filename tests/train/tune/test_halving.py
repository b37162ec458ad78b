"""Successive halving: its budget, who is promoted, and when the run's own rates stay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.train import RATES, TrainConfig
from pst_ds.errors import InputError
from pst_ds.train.tune import halving
from pst_ds.train.tune.halving import CANDIDATES, DEVIATIONS, LEAST_STEPS, TRIAL_POWER, Candidate, Outcome

OUTCOMES = st.lists(
    st.tuples(st.one_of(st.floats(-10, 10), st.just(math.nan)), st.floats(0, 1)), min_size=3, max_size=9
).map(lambda pairs: [Outcome(i, value, error) for i, (value, error) in enumerate(pairs)])


@given(st.integers(1, 10**6), st.floats(0.01, 1.0), st.sampled_from([5, 9]))
def test_all_rungs_together_stay_within_the_budget_and_use_most_of_it(num_steps, share, most):
    try:
        rungs = halving.rungs(num_steps, share, most)
    except InputError:
        assert math.floor(share * num_steps) < 3 * LEAST_STEPS
        return
    spent, budget = sum(rung.trials * rung.steps for rung in rungs), math.floor(share * num_steps)
    assert 0.7 * budget < spent <= budget
    assert LEAST_STEPS <= rungs[0].steps < num_steps
    assert rungs[0].trials <= most
    sizes, steps = [rung.trials for rung in rungs], [rung.steps for rung in rungs]
    assert sizes == sorted(set(sizes), reverse=True)
    assert steps == sorted(set(steps))
    assert sizes[-1] in (2, 3)


@pytest.mark.parametrize(
    ("num_steps", "sizes", "steps"),
    [
        (600, [3], [40]),
        (900, [3], [60]),
        (2200, [5, 2], [40, 120]),
        (3600, [9, 3], [40, 120]),
        (18000, [9, 3], [200, 600]),
    ],
)
def test_more_budget_means_more_trials_until_all_are_tried_and_then_longer_ones(num_steps, sizes, steps):
    rungs = halving.rungs(num_steps, 0.2, 9)
    assert ([rung.trials for rung in rungs], [rung.steps for rung in rungs]) == (sizes, steps)


@pytest.mark.parametrize(
    ("num_steps", "parts"),
    [
        (400, ["--budget 0.2 of 400 optimizer steps is 80", "120 in all", "--budget 0.3"]),
        (50, ["50 steps is too short"]),
    ],
)
def test_too_few_steps_are_refused_with_what_would_be_enough(num_steps, parts):
    with pytest.raises(InputError) as caught:
        halving.rungs(num_steps, 0.2, 9)
    assert [part for part in parts if part not in str(caught.value)] == []
    if "--budget 0.3" in parts:
        assert halving.rungs(num_steps, 0.3, 9) == [halving.Rung(3, 40)]


@given(OUTCOMES, st.integers(2, 4), st.booleans())
def test_the_own_rates_and_the_best_others_are_promoted(outcomes, count, lower):
    names = halving.promoted(outcomes, count, lower_is_better=lower)
    assert 0 in names
    assert len(set(names)) == len(names) <= count
    others = [o for o in outcomes if o.candidate and not math.isnan(o.value)]
    assert len(names) == 1 + min(count - 1, len(others))
    sign = -1 if lower else 1
    kept = [sign * o.value for o in others if o.candidate in names]
    left = [sign * o.value for o in others if o.candidate not in names]
    assert not kept or not left or min(kept) >= max(left)


@given(OUTCOMES, st.booleans())
def test_other_rates_are_taken_only_if_they_are_best_and_better_by_more_than_the_error(outcomes, lower):
    values = [o.value for o in outcomes if not math.isnan(o.value)]
    if not values:
        with pytest.raises(InputError, match="every trial of the last rung diverged"):
            halving.chosen(outcomes, lower_is_better=lower)
        return
    chosen = outcomes[halving.chosen(outcomes, lower_is_better=lower)]
    best, own = (min(values) if lower else max(values)), outcomes[0]
    if math.isnan(own.value) or abs(best - own.value) > DEVIATIONS * own.standard_error:
        assert chosen.value == best
    else:
        assert chosen is own


def test_a_difference_within_the_error_keeps_the_own_rates():
    outcomes = [Outcome(0, 0.70, 0.02), Outcome(1, 0.71, 0.02), Outcome(2, 0.60, 0.02)]
    assert halving.chosen(outcomes, lower_is_better=False) == 0
    assert halving.chosen([outcomes[0], Outcome(1, 0.75, 0.02)], lower_is_better=False) == 1
    assert halving.chosen(outcomes, lower_is_better=True) == 2


def _train(**rates):
    own = dict(zip(RATES, (1e-2, 1e-3, 2e-4, 5e-4), strict=True))
    return TrainConfig(num_steps=10, **{**own, **rates})


def test_the_own_rates_come_first_and_stay_to_the_bit():
    assert CANDIDATES[0] == Candidate()
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    train = _train(head_learning_rate=1.23456e-4)
    assert CANDIDATES[0].rates(train) == {name: getattr(train, name) for name in RATES}


def test_factors_reach_all_rates_and_fewer_steps_raise_them():
    train = _train(embedding_learning_rate=0.0)
    rates = Candidate(3.0, 1 / 3).rates(train)
    assert rates == {
        "score_learning_rate": 0.03, "update_learning_rate": 0.003,
        "embedding_learning_rate": 0.0, "head_learning_rate": 0.0005,
    }  # fmt: skip
    longer = Candidate().rates(train, 100, 1600)
    assert longer["update_learning_rate"] == pytest.approx(1e-3 * 16**TRIAL_POWER, rel=1e-2)


def test_without_a_head_there_is_one_factor():
    assert all(c.head_factor == 1.0 for c in halving.candidates(has_head=False))
    assert len(halving.candidates(has_head=False)) == 5
    assert halving.candidates(has_head=True) == CANDIDATES
