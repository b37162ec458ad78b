"""Every value of a public settings class is checked when it is made, and the message names the field."""

from __future__ import annotations

import dataclasses

import pytest

import pst_ds
from pst_ds.config.run import RunConfig

PUBLIC = {
    "PSTConfig": {},
    "PruneConfig": {"method": "wanda"},
    "ExportSettings": {},
    "CubicSchedule": {"num_steps": 10},
    "OneShotSchedule": {"final_sparsity": 0.5},
    "RoundingSchedule": {"start": 1, "interval": 2, "num_steps": 9},
    "Grid": {"bits": 8},
}
"""Public classes of settings, and arguments with which each can be made."""
WRONG = {"a thing": object(), "not a number": float("nan"), "less than anything": -(10**9)}
ANY_NUMBER = {"seed"}
"""Fields that may have any whole number."""


def _sections():
    run = {field.name: field for field in dataclasses.fields(RunConfig)}
    kinds = {name: field.default_factory for name, field in run.items()}
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


CASES = [(getattr(pst_ds, name), good, field.name) for name, good in PUBLIC.items()
         for field in dataclasses.fields(getattr(pst_ds, name))]  # fmt: skip
CASES += [(kind, {}, field.name) for kind in _sections().values() for field in dataclasses.fields(kind)]


def test_every_public_dataclass_of_settings_is_here():
    found = {name for name in pst_ds.__all__ if dataclasses.is_dataclass(getattr(pst_ds, name))}
    assert found == set(PUBLIC)


@pytest.mark.parametrize(("kind", "good", "name"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_value_is_refused_when_it_is_made(kind, good, name):
    kind(**good)
    for what, value in WRONG.items():
        if what == "less than anything" and name in ANY_NUMBER:
            continue
        if (
            what == "less than anything"
            and isinstance(good.get(name, _default(kind, name)), float)
            and _unbounded(name)
        ):
            continue
        with pytest.raises(ValueError, match=r"(?s).") as caught:
            kind(**{**good, name: value})
        assert name in str(caught.value) or kind is pst_ds.Grid


def _default(kind, name):
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _unbounded(name):
    """Whether a number may be any: a weight of a formula, or the power of a length."""
    return name in ("alpha1", "alpha2", "beta", "score_init_scale", "update_init_scale", "length_penalty")


@pytest.mark.parametrize(("value", "hint"), [(90, 0.9), (12.5, 0.125), (1.2, None), (-3, None)])
def test_a_percentage_gets_the_fraction(value, hint):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)") as caught:
        pst_ds.PruneConfig(method="wanda", sparsity=value)
    assert (f"Did you mean {hint}?" in str(caught.value)) == (hint is not None)
    with pytest.raises(ValueError, match="final_sparsity") as caught:
        pst_ds.OneShotSchedule(value)
    assert ("Did you mean" in str(caught.value)) == (hint is not None)
