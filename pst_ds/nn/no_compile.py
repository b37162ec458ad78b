"""What torch.compile must not look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Tensor])


def no_compile(method: Method) -> Method:
    """``method`` itself, which a compiled model calls as it is: between graphs, and without new ones for new masks.

    ``torch.compiler.disable`` at once would import torch's compiler, which takes as long as torch.
    """

    @functools.wraps(method)
    def called(*args: object, **named: object) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **named)
        return method(*args, **named)

    return called  # type: ignore[return-value]
