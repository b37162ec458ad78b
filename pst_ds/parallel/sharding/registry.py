"""Which sharding a parameter has: those that other packages add are asked first, and then those of pst-ds."""

from torch import Tensor

from pst_ds.parallel.sharding.base import Sharding
from pst_ds.plugins import Registry

_BUILTIN = {
    "in-flat": "pst_ds.parallel.sharding.in_flat:InFlat",
    "fsdp2": "pst_ds.parallel.sharding.fsdp2:FSDP2",
    "zero3": "pst_ds.parallel.sharding.zero3:ZeRO3",
    # owns every parameter that the others do not
    "whole": "pst_ds.parallel.sharding.whole:Whole",
}
SHARDINGS: Registry[type[Sharding]] = Registry("pst_ds.shardings", "sharding", _BUILTIN)

_asked: list[Sharding] = []
"""One object of every sharding, in the order in which they are asked; empty until the first is needed."""


def shardings() -> list[Sharding]:
    """Return one object of every sharding, in the order in which they are asked. Raises InputError as Registry does."""
    # functools.cache would do the same, but torch.compile, which traces this in a layer's forward pass, ignores caches
    if not _asked:
        added = [name for name in SHARDINGS.names if name not in _BUILTIN]
        _asked.extend(SHARDINGS.get(name)() for name in [*added, *_BUILTIN])
    return _asked


def sharding_of(param: Tensor) -> Sharding:
    """Return the sharding of ``param``.

    Callers ask once for each use, and the answer is not stored: a parameter changes its sharding when ``zero.Init`` or
    ``deepspeed.initialize`` partitions it, and a module under FSDP2 has other parameters while it runs.
    """
    for sharding in shardings():
        if sharding.owns(param):
            return sharding
    raise AssertionError("Whole owns every parameter")
