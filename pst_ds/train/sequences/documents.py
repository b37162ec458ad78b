"""Documents side by side in one sequence, kept apart by their positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.tasks import ExampleSet, task_of
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import raise_on_all_ranks

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_TOKENS = 8
"""Of either document of the check."""
_ROUNDINGS = 4
_PER_TOKEN = ("input_ids", "position_ids", "labels")
Inputs: TypeAlias = dict[str, Any]
"""Of a model, by name: tensors and settings."""


def flatten_for_flash_attention(model: nn.Module) -> None:
    """Let a model of transformers whose attention is a flash attention keep documents apart in batches of any size.

    Flash attention takes the borders of documents from ``position_ids`` only where the batch is one row: inputs
    (batch, length) whose positions begin anew become one row, and logits and hidden states (batch, length, ...) again.
    Models with another attention are left as they are.
    """
    implementation: str = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if "flash" in implementation:
        flatten_packed_rows(model)


def flatten_packed_rows(model: nn.Module) -> None:
    """:func:`flatten_for_flash_attention`, whatever the attention is."""
    shapes: list[torch.Size | None] = []

    def flatten(module: nn.Module, args: tuple[object, ...], kwargs: Inputs) -> tuple[tuple[object, ...], Inputs]:
        positions = kwargs.get("position_ids")
        if positions is None or kwargs.get("attention_mask") is not None or args:
            shapes.append(None)
            return args, kwargs
        shapes.append(positions.shape)
        return args, {name: v.reshape(1, -1) if name in _PER_TOKEN else v for name, v in kwargs.items()}

    def restore(module: nn.Module, args: tuple[object, ...], kwargs: Inputs, out: ModelOutput) -> ModelOutput:
        shape = shapes.pop()
        if shape is None:
            return out
        for name in ("logits", "last_hidden_state"):
            if out.get(name) is not None:
                out[name] = _in_rows(out[name], shape)
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(_in_rows(states, shape) for states in out["hidden_states"])
        return out

    model.register_forward_pre_hook(flatten, with_kwargs=True)
    model.register_forward_hook(restore, with_kwargs=True)


def _in_rows(values: Tensor, shape: torch.Size) -> Tensor:
    return values.reshape(*shape, *values.shape[2:])


@torch.no_grad()
def require_documents_apart(engine: Engine, run: RunConfig, examples: ExampleSet, device: str) -> None:
    """Raise ConfigError, on every rank, if the model sees a document before the one that it reads. Collective.

    Two pairs of documents differ in the first alone; the logits of the second must not. A model is taken as it is found
    to be, since transformers has no list of those that heed positions: most attention does, and recurrent layers,
    ALiBi and positions counted from a mask do not.
    """
    if not getattr(examples, "several_documents", False):
        return
    drawn, (some,) = raise_on_all_ranks(lambda: task_of(run).sample(examples, 1, run.seed))
    ids = torch.as_tensor(drawn[some][: 2 * _TOKENS].astype("int64"), device=device)  # type: ignore[index]
    first, second = ids.split([len(ids) // 2, len(ids) - len(ids) // 2])
    if len(first) == 0 or torch.equal(first, first.flip(0)):
        return
    positions = torch.cat([torch.arange(len(part), device=device) for part in (first, second)])[None]
    engine.eval()
    logits = [
        engine(input_ids=torch.cat([before, second])[None], position_ids=positions).logits[:, len(first) :].float()
        for before in (first, first.flip(0))
    ]
    engine.train()
    rounding = _ROUNDINGS * torch.finfo(torch.bfloat16 if run.train.precision == "bf16" else torch.float32).eps
    reads_on = bool((logits[0] - logits[1]).abs().max() > rounding * logits[0].abs().max())

    def refuse() -> None:
        if reads_on:
            kind: str = getattr(getattr(engine.module, "config", None), "model_type", "model")
            raise ConfigError(
                f"data.document_mask = true, but model.path = {run.model.path!r} ({kind}) reads on from one document "
                "to the next whatever their positions are. Fix: data.document_mask = false, which lets documents run on"
            )

    raise_on_all_ranks(refuse)  # a rounding on one rank alone must not leave the others waiting
