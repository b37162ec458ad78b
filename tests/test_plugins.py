"""pst_ds/plugins.py: what other packages add is found by name."""

import math

import pytest

from pst_ds.errors import InputError
from pst_ds.plugins import Registry
from tests.plugins import install

GROUP = "pst_ds.tests"


def registry(**builtin: str) -> Registry:
    return Registry(GROUP, "number", builtin)


def test_objects_of_pst_ds_come_before_those_of_other_packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, GROUP, tau="math:tau"))
    numbers = registry(pi="math:pi")
    assert numbers.names == ["pi", "tau"]
    assert (numbers.get("pi"), numbers.get("tau")) == (math.pi, math.tau)


def test_an_unknown_name_is_refused_with_the_nearest_or_with_all():
    numbers = registry(pi="math:pi", infinity="math:inf")
    with pytest.raises(InputError, match=r"'infinite' is not the name of a known number. Did you mean 'infinity'\?"):
        numbers.get("infinite")
    with pytest.raises(InputError, match=r"There are: pi, infinity\."):
        numbers.get("x")


def test_a_taken_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, GROUP, pi="math:tau"))
    with pytest.raises(InputError, match=r"math:tau is installed as the number 'pi', which pst-ds has itself\. Rename"):
        assert registry(pi="math:pi").names


@pytest.mark.parametrize("value", ["no_such_module:x", "math:no_such_name"])
def test_what_cannot_be_imported_is_named(tmp_path, monkeypatch, value):
    monkeypatch.syspath_prepend(install(tmp_path, GROUP, broken=value))
    with pytest.raises(InputError, match=rf"the number 'broken' \({value}\) cannot be imported"):
        registry().get("broken")
