"""Find the head of a causal language model, and how its family scales or caps the logits, by a probe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pst_ds.core.head_loss import Readout
from pst_ds.errors import first_line
from pst_ds.nn.tables.coded import CodedOutput

_TOKENS = 4
"""Tokens of the probe."""
_SMALL = 2.0**-10
"""A logit that a cap does not change."""
_LARGE = 2.0**20
"""A logit that a cap replaces by the cap."""


class UnknownHeadError(RuntimeError):
    """The loss of a model may be something else than the cross-entropy of its head's output, scaled or capped."""


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """The last linear layer of a model, whose logits are ``scale`` times its output, or capped by ``cap``."""

    module: nn.Linear | CodedOutput
    scale: float = 1.0
    cap: float = 0.0

    @property
    def readout(self) -> Readout:
        """The head with its current weight, which is gathered only in a call of ``read`` in :meth:`reading`."""
        weight = self.module.table() if isinstance(self.module, CodedOutput) else self.module.weight
        return Readout(weight, self.module.bias, self.scale, self.cap)

    @contextmanager
    def reading(self, read: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """Let forward passes of the model call ``read`` with the hidden states (batch, length, width) instead of
        multiplying them; yield the list of its results: any tensor, or a 0-d one if the head trains. ZeRO-3 gathers the
        weight for the call. The logits of the pass are meaningless.
        """
        results: list[Tensor] = []
        hidden_before_hooks: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden_before_hooks[:] = args[:1]

        def forward(hidden: Tensor) -> Tensor:
            if self._trains:
                return read(hidden).expand(*hidden.shape[:-1], 1)
            results.append(read(hidden_before_hooks.pop()))
            return hidden.detach()[..., :1]

        def after(module: nn.Module, args: object, output: Tensor) -> None:
            if self._trains:
                results.append(output[(0,) * output.dim()])  # every element is the result

        # ZeRO-3's hooks gather the weight in the backward pass if a gradient flows from the module's output to its
        # input. A head that trains needs that. The gradient of a frozen one bypasses them: it flows from the result
        # directly to the input from before the hooks.
        with self.module.register_forward_pre_hook(before, prepend=True), self.module.register_forward_hook(after):
            self.module.forward = forward  # type: ignore[method-assign, assignment]
            try:
                yield results
            finally:
                del self.module.forward

    @property
    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(param.requires_grad for param in self.module.parameters())


def language_head(model: nn.Module) -> LanguageHead:
    """Return the head of a causal language model of transformers. Raises UnknownHeadError, with the reason.

    The model's forward pass runs once with stand-ins for body and head, without using its weights. Known numbers as the
    head's output show how the model transforms them, and that the loss is the mean cross-entropy of each next token.
    Not collective.
    """
    head: Any = None
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        head = getter()
    if type(head) not in (nn.Linear, CodedOutput):
        kind = "no head" if head is None else f"a head of class {type(head).__name__}"
        raise UnknownHeadError(f"{type(model).__name__} has {kind}, not a plain linear layer")
    if "forward" in vars(head):
        raise UnknownHeadError(f"the head of {type(model).__name__} overrides the forward pass")
    config: Any = model.config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UnknownHeadError(f"the loss of {type(model).__name__} has a term of its routers (output_router_logits)")
    numbers = torch.linspace(-40.0, 40.0, _TOKENS * head.out_features).view(1, _TOKENS, head.out_features)
    numbers[0, 0, 0] = _SMALL
    numbers[0, 0, 1] = _LARGE
    labels = (torch.arange(_TOKENS).unsqueeze(0) * 7) % head.out_features  # (1, _TOKENS)
    try:
        with torch.no_grad(), _stand_ins(model, head, numbers) as calls:
            out: Any = model.forward(input_ids=torch.zeros_like(labels), labels=labels)  # without hooks of ZeRO-3
            logits = out.logits.float()
            loss = out.loss.float()
    except Exception as error:  # a family's code may fail in any way with stand-ins
        raise UnknownHeadError(f"{type(model).__name__} could not be probed: {first_line(error)}") from error
    scale = 0.0
    cap = 0.0
    if len(calls) == 1 and logits.shape == numbers.shape:  # scale * numbers, or cap * tanh(scale * numbers / cap)
        small, large = logits[0, 0, :2].tolist()
        scale = small / _SMALL
        if abs(scale - 1.0) < 1e-6:  # rounding in a cap changes the last bits
            scale = 1.0
        cap = large
        if large > 0.5 * scale * _LARGE:  # the logit was not replaced
            cap = 0.0
    probed_head = LanguageHead(head, scale=scale, cap=cap)
    if not scale or not _is_close(probed_head.readout.final(numbers), logits):
        raise UnknownHeadError(f"{type(model).__name__} does something unknown with its logits")
    if not _is_close(cross_entropy(logits[0, :-1], labels[0, 1:]), loss):
        raise UnknownHeadError(f"the loss of {type(model).__name__} is not the cross-entropy of each next token")
    return probed_head


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


class _BodyOutput:
    """Output of a body: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


class _Body(nn.Module):
    """Stand-in for a model's body, or for the decoder in it."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def __getattr__(self, name: str) -> Self:
        return self

    def forward(self, *args: object, **kwargs: object) -> _BodyOutput:
        return _BodyOutput(torch.zeros(1, _TOKENS, self.width))


class _Head(nn.Module):
    """Stand-in for a head, whose output is ``numbers``. It has the attributes that models read from theirs."""

    def __init__(self, like: nn.Linear | CodedOutput, numbers: Tensor):
        super().__init__()
        self.weight = getattr(like, "weight", None)
        self.bias = like.bias
        self.numbers = numbers
        self.in_features = like.in_features
        self.out_features = like.out_features
        self.calls: list[torch.Size] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(hidden.shape)
        return self.numbers.clone()  # a model may scale its logits in place


def _place_of(part: nn.Module, model: nn.Module) -> tuple[nn.Module, str]:
    """Return the first module of ``model`` that holds ``part``, and the name of its attribute."""
    for module in model.modules():
        for name, child in module._modules.items():
            if child is part:
                return module, name
    raise LookupError(f"the model does not contain this {type(part).__name__}")


@contextmanager
def _stand_ins(model: nn.Module, head: nn.Linear | CodedOutput, numbers: Tensor) -> Iterator[list[torch.Size]]:
    """Replace the head, and every part of the model that does not contain it; yield the shapes of the head's inputs."""
    head_owner, head_name = _place_of(head, model)
    stand_in = _Head(head, numbers)
    original_parts = dict(model._modules)
    for name, part in original_parts.items():
        if part is not None and all(inside is not head for inside in part.modules()):
            model._modules[name] = _Body(head.in_features)
    head_owner._modules[head_name] = stand_in
    try:
        yield stand_in.calls
    finally:
        head_owner._modules[head_name] = head
        model._modules.update(original_parts)
