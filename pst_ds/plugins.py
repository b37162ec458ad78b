"""Extension points: named objects of pst-ds, and those that other packages add through entry points.

A package adds an object by an entry point in its pyproject.toml, and pst-ds finds it once the package is installed::

    [project.entry-points."pst_ds.update_forms"]
    spp = "my_package.spp:SPP"
"""

import difflib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from pst_ds.errors import InputError

Extension = TypeVar("Extension")


class Registry(Generic[Extension]):
    """The objects of one extension point by name. Each is imported when it is first asked for."""

    def __init__(self, group: str, what: str, builtin: Mapping[str, str]):
        """``group``: the entry points' group. ``what``: an object's kind in messages, such as "update form".

        ``builtin``: the objects of pst-ds, as "module:attribute" by name.
        """
        self._group = group
        self._what = what
        self._builtin = builtin

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        entries: dict[str, EntryPoint] = {}
        for name, value in self._builtin.items():
            entries[name] = EntryPoint(name=name, value=value, group=self._group)
        for entry in entry_points(group=self._group):
            # A package must not change what the documented names mean.
            if entry.name in self._builtin:
                raise InputError(
                    f"{entry.value} is installed as the {self._what} {entry.name!r}, which pst-ds has itself. "
                    "Rename its entry point"
                )
            entries[entry.name] = entry
        return entries

    @property
    def names(self) -> list[str]:
        """Every name: those of pst-ds first, then those that other packages add. Raises InputError for a taken name."""
        return list(self._entries)

    def get(self, name: str) -> Extension:
        """Return the object called ``name``. Raises InputError if there is none, or it cannot be imported."""
        entry = self._entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"There are: {', '.join(self.names)}."
            if near:
                hint = f"Did you mean {near[0]!r}?"
            raise InputError(f"{name!r} is not the name of a known {self._what}. {hint}")
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"the {self._what} {name!r} ({entry.value}) cannot be imported: {error}. Repair or remove its package"
            ) from error
