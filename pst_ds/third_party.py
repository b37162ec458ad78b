"""Every change to code of other packages is made here, after a check that what it changes exists."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType
from typing import Any

from pst_ds.errors import InputError

Code = Callable[..., object]
_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*)")


class ThirdPartyError(InputError):
    """An installed package does not have the code that pst-ds has to change."""


def require(owner: object, name: str) -> Any:
    """Return the attribute ``name`` of a module, class or object of another package.

    Raises ThirdPartyError, naming the installed and the supported versions, if there is none.
    """
    if not hasattr(owner, name):
        home = owner if isinstance(owner, ModuleType | type) else type(owner)
        path = home.__name__ if isinstance(home, ModuleType) else f"{home.__module__}.{home.__qualname__}"
        package = path.partition(".")[0]
        raise ThirdPartyError(
            f"{path}.{name}: {package} {_installed(package)} does not have it, and pst-ds has to change it. Install a "
            f"supported version: pip install '{package}{supported(package)}'"
        )
    return getattr(owner, name)


def patch(owner: object, name: str, make: Callable[[Code], Code]) -> None:
    """Replace ``owner.name`` by what ``make`` returns for it, for good. Raises ThirdPartyError."""
    setattr(owner, name, make(require(owner, name)))


@contextmanager
def patched(owner: object, name: str, make: Callable[[Code], Code]) -> Iterator[None]:
    """Replace ``owner.name`` by what ``make`` returns for it, inside the context. Raises ThirdPartyError."""
    before = require(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def supported(package: str) -> str:
    """Return the versions of ``package`` that pst-ds requires, such as ">=5.6,<6"; "" if it is not installed itself."""
    try:
        wanted = (_REQUIREMENT.match(line) for line in requires("pst-ds") or ())
    except PackageNotFoundError:
        return ""
    return next((match[2].strip() for match in wanted if match and match[1] == package), "")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
