"""``every_pair`` chooses few cases that have every pair of values, and marks those that `make test` leaves."""

from __future__ import annotations

import itertools

import pytest

from tests.pairs import covering, every_pair


def cases_of(test):
    """Return (id, values, whether thorough) of each case."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    names, entries = mark.args
    assert all(len(entry.values) == len(names) for entry in entries)
    return [(entry.id, entry.values, "thorough" in {mark.name for mark in entry.marks}) for entry in entries]


def sample(*decorators):
    """Return a decorated function; the last decorator stands lowest."""

    def test():
        pass

    for decorator in reversed(decorators):
        test = decorator(test)
    return test


PRODUCT = [
    pytest.mark.parametrize("dtype", [float, int]),
    pytest.mark.parametrize(("rows", "cols"), [(1, 2), (3, 4), (5, 6)]),
    pytest.mark.parametrize("word", ["a", "b", "c"], ids=str.upper),
]


@pytest.mark.parametrize("number", [1, 2])
def test_every_combination_is_covered_by_fewer_cases(number):
    product = list(itertools.product(range(2), range(3), range(3)))
    chosen = covering(product, number)
    for positions in itertools.combinations(range(3), number):
        combinations = {tuple(case[i] for i in positions) for case in product}
        assert {tuple(case[i] for i in positions) for case in chosen} == combinations
    assert len(chosen) < len(product)
    assert len(set(chosen)) == len(chosen)


def test_cases_have_every_pair_and_the_quick_ones_every_value():
    cases = cases_of(sample(every_pair, *PRODUCT))
    assert len(cases) < 18
    for chosen, number in ((cases, 2), ([case for case in cases if not case[2]], 1)):
        split = [(values[0], values[1:3], values[3]) for _, values, _ in chosen]
        for positions in itertools.combinations(range(3), number):
            words = [("a", "b", "c"), ((1, 2), (3, 4), (5, 6)), (float, int)]
            expected = set(itertools.product(*(words[i] for i in positions)))
            assert {tuple(values[i] for i in positions) for values in split} == expected


def test_cases_have_the_names_that_pytest_gives_to_the_product():
    names = [name for name, _, _ in cases_of(sample(every_pair, *PRODUCT))]
    assert set(names) <= {
        f"{word}-{shape}-{dtype}" for word in "ABC" for shape in ("1-2", "3-4", "5-6") for dtype in ("float", "int")
    }


def test_a_product_of_two_runs_whole():
    cases = cases_of(sample(every_pair, *PRODUCT[1:]))
    assert len(cases) == 9
    assert sum(is_thorough for _, _, is_thorough in cases) == 6


def test_few_chooses_the_quick_cases_by_itself():
    cases = cases_of(sample(every_pair, pytest.mark.few(2), *PRODUCT))
    assert not any(is_thorough for _, _, is_thorough in cases)
    assert len(cases) < 18


def test_one_parametrization_has_no_pairs():
    with pytest.raises(AssertionError, match="needs two parametrize decorators"):
        sample(every_pair, PRODUCT[0])
