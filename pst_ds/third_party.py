"""Every change to code of other packages is made here, after a check that what it changes exists."""

import re
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Code = Callable[..., object]
_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*)")
"""Name and versions of a requirement, without its marker."""


class ThirdPartyError(InputError):
    """An installed package does not have the code that pst-ds has to change."""


def require(owner: object, name: str) -> Any:
    """Return the attribute ``name`` of a module, class or object of another package.

    Raises ThirdPartyError, naming the installed and the supported versions, if there is none.
    """
    if not hasattr(owner, name):
        path = _import_path(owner)
        package = path.partition(".")[0]
        raise ThirdPartyError(
            f"{path}.{name}: {package} {_installed(package)} does not have it, and pst-ds has to change it. Install a "
            f"supported version: pip install '{package}{supported(package)}'"
        )
    return getattr(owner, name)


def _import_path(owner: object) -> str:
    """Return the dotted name of a module or class, or of an object's class."""
    if isinstance(owner, ModuleType):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def patched(owner: object, name: str, make: Callable[[Code], Code]) -> Iterator[None]:
    """Replace ``owner.name`` by what ``make`` returns for it, inside the context. Raises ThirdPartyError."""
    current = require(owner, name)
    # What getattr returns is bound to the owner, such as a class method. Restoring it would store the bound method, so
    # the entry itself is kept; an object may have the attribute from its class only, and then has no entry.
    is_inherited = name not in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, make(current))
    try:
        yield
    finally:
        if is_inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def appended(items: list[Any], item: object) -> Iterator[None]:
    """Append ``item`` to a list of another package inside the context."""
    items.append(item)
    try:
        yield
    finally:
        items.remove(item)


class PatchHolder:
    """An object during whose life other code is changed. The first of a subclass makes the change, the last undoes it.

    An object of ours that needs the change has a holder as an attribute. A copy of it, also by pickle, has another.
    """

    _count: ClassVar[int] = 0
    """Living holders of the subclass."""
    _made: ClassVar[ExitStack]
    """The change, while there are holders."""
    # Reentrant, because a garbage collection inside it can end the life of another holder.
    _lock: ClassVar[RLock] = RLock()

    def __init__(self) -> None:
        kind = type(self)
        with self._lock:
            if kind._count == 0:
                made = ExitStack()
                made.enter_context(self.change())
                kind._made = made
            kind._count += 1
        self._end = weakref.finalize(self, kind._let_go)
        # At exit, modules of the other package may be gone already, and nothing needs the original code any more.
        self._end.atexit = False

    @classmethod
    def change(cls) -> AbstractContextManager[object]:
        """Return the change, as a context. Raises ThirdPartyError."""
        raise NotImplementedError

    def close(self) -> None:
        """Need the change no longer."""
        self._end()

    @classmethod
    def _let_go(cls) -> None:
        with cls._lock:
            cls._count -= 1
            if cls._count == 0:
                cls._made.close()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


@contextmanager
def patched_entry(registry: MutableMapping[str, Any], key: str, make: Callable[[Any], Code]) -> Iterator[None]:
    """Replace ``registry[key]`` by what ``make`` returns for it, inside the context. Raises ThirdPartyError.

    ``registry``: a dict, or a registry of functions by name as in transformers, which has a layer of overrides.
    """
    before = registry.get(key)
    if before is None:
        raise ThirdPartyError(
            f"{type(registry).__name__}[{key!r}]: the installed package does not register it, and pst-ds has to change "
            "it. Install the versions that pst-ds requires"
        )
    registry[key] = make(before)
    try:
        yield
    finally:
        # Deleting an override of transformers' registries uncovers the original entry; a dict has no layers.
        del registry[key]
        if registry.get(key) is not before:
            registry[key] = before


def while_computing(model: "nn.Module", scope: Callable[["nn.Module"], AbstractContextManager[object]]) -> None:
    """Enter ``scope(module)`` whenever ``model``, or a part of it by itself, computes.

    The second happens in backward passes, if gradient checkpointing recomputes a block. ``scope`` is not entered again
    for parts of a module that is inside it already.
    """
    hooks = _ScopeOfModel(scope)
    for module in model.modules():
        # Attention is called by a module that has projections, so leaves need no hooks. Those of blocks are not called
        # when transformers recomputes them, so the modules inside have them too.
        if module is model or next(module.children(), None) is not None:
            module.register_forward_pre_hook(hooks.enter)
            # Prepended, so that several scopes of a model are left in the reverse order.
            module.register_forward_hook(hooks.leave, prepend=True, always_call=True)


class _ScopeOfModel:
    """Hooks that enter a context at the outermost call of a model's modules and leave it after that call."""

    def __init__(self, scope: Callable[["nn.Module"], AbstractContextManager[object]]):
        self._scope = scope
        self._depth = 0
        self._entered = ExitStack()

    def enter(self, module: "nn.Module", args: object) -> None:
        if self._depth == 0:
            self._entered.enter_context(self._scope(module))
        self._depth += 1

    def leave(self, module: "nn.Module", args: object, output: object) -> None:
        self._depth = max(0, self._depth - 1)  # not entered if another hook raised before
        if self._depth == 0:
            self._entered.close()


def supported(package: str) -> str:
    """Return the versions of ``package`` that pst-ds requires, such as ">=5.6,<6"; "" if it is not installed itself."""
    try:
        requirements = requires("pst-ds") or []
    except PackageNotFoundError:  # a checkout that is on the path only
        return ""
    for line in requirements:
        match = _REQUIREMENT.match(line)
        if match and match[1] == package:
            return match[2].strip()
    return ""


def _installed(package: str) -> str:
    """Return the installed version of ``package``, for messages."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
