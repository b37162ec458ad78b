"""Criteria by name: those of pst-ds, and those that other packages add (entry points "pst_ds.criteria")."""

from typing import TYPE_CHECKING

from pst_ds.errors import InputError
from pst_ds.plugins import Registry

if TYPE_CHECKING:  # run files are read without torch
    from pst_ds.core.criteria.criterion import Criterion

CRITERIA: Registry[object] = Registry(
    "pst_ds.criteria",
    "criterion",
    {
        "magnitude": "pst_ds.core.criteria.magnitude:Magnitude",
        "activation": "pst_ds.core.criteria.activation:Activation",
        "learned": "pst_ds.core.criteria.learned:Learned",
        "learned-activation": "pst_ds.core.criteria.learned_activation:LearnedActivation",
    },
)
"""Subclasses of Criterion, objects of such a class, or functions of a slice."""


def implied_criterion(magnitude: str, *, has_scores: bool) -> str:
    """Return the name of the criterion that ``[pst]`` implies if it names none."""
    if magnitude == "activation":
        implied = "activation"
        with_scores = "learned-activation"
    else:
        implied = "magnitude"
        with_scores = "learned"
    return with_scores if has_scores else implied


def criterion_called(name: str) -> "Criterion":
    """Return the criterion called ``name``. Raises InputError for an unknown name, or what is not a criterion."""
    return as_criterion(CRITERIA.get(name), f"criterion = {name!r}")


def as_criterion(value: object, setting: str) -> "Criterion":
    """Return ``value`` as a criterion: a subclass of Criterion, an object of one, or a function of a slice.

    Raises InputError, which starts with ``setting``, for anything else.
    """
    from pst_ds.core.criteria.criterion import NEEDS, Criterion, FunctionCriterion

    # Classes are callable too, so another class than a criterion's must not pass for a function.
    if isinstance(value, type) and issubclass(value, Criterion):
        value = value()
    elif not isinstance(value, Criterion) and callable(value) and not isinstance(value, type):
        value = FunctionCriterion(value)
    if not isinstance(value, Criterion):
        raise InputError(
            f"{setting}: {value!r} is not a criterion. Give a subclass of pst_ds.Criterion, or a function of a slice "
            "that returns its scores"
        )
    unknown = sorted(set(value.needs) - NEEDS)
    if unknown:
        raise InputError(
            f"{setting}: {type(value).__name__} needs {', '.join(unknown)}, which pst-ds does not have. It has "
            f"{', '.join(sorted(NEEDS))}"
        )
    return value
