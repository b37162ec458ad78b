"""PSTPrompt: soft prompts, vectors before every sequence, initialised from a text (arXiv 2410.08598).

The prompt is part of the base model, between its embeddings and its blocks: hooks insert it into the inputs of the
body and remove its positions from the outputs. So a head, pooler or classifier on top of the body only sees the
positions of the text, and losses, labels and predictions refer to the text.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pst_ds.config.model import Adapter
from pst_ds.core.coded_weight import table_rows
from pst_ds.core.prompts import adapted, with_prompt, without_prompt
from pst_ds.errors import InputError
from pst_ds.nn.layer import seeded_normal
from pst_ds.nn.tables.coded import CodedEmbedding
from pst_ds.parallel import zero3

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

Arguments = dict[str, Any]
"""Argument names of a forward pass."""

NAME = "pst_prompt"
"""Attribute of the body that holds the prompt."""
_CACHES = ("cache", "past_key_values")
"""Names in transformers for the cached keys and values of earlier tokens."""


class PSTPrompt(nn.Module):
    """m vectors of width d: trained directly, or states of a text with a small trained adapter.

    Parameters: pst_P (m, d) without an adapter; else pst_U, initially 0, (d, d), or (d, r) with pst_V (r, d) of a
    low-rank one, on constant states H (m, d), a non-persistent buffer.
    """

    pst_P: nn.Parameter | None
    pst_U: nn.Parameter | None
    pst_V: nn.Parameter | None
    states: Tensor | None

    def __init__(self, states: Tensor, adapter: Adapter = "none", *, after: int = 0, rank: int = 0, seed: int = 0):
        """Initialise from ``states`` (m, d), at position ``after``. ``rank``, ``seed``: of a "low-rank" adapter's V."""
        super().__init__()
        self.size, width = states.shape
        self.after, self.bypassed = after, False
        self._inside = False
        left = right = None
        if adapter != "none":
            left = nn.Parameter(states.new_zeros(width, rank if adapter == "low-rank" else width))
        if adapter == "low-rank":
            right = nn.Parameter(seeded_normal((rank, width), width**-0.5, f"{seed}/{NAME}/V").to(states))
        self.register_parameter("pst_P", None if left is not None else nn.Parameter(states.clone()))
        self.register_parameter("pst_U", left)
        self.register_parameter("pst_V", right)
        self.register_buffer("states", None if left is None else states, persistent=False)

    def forward(self) -> Tensor:
        """Return the current prompt, (m, d)."""
        if self.pst_P is not None:
            return self.pst_P
        assert self.states is not None
        return adapted(self.states, self.pst_U, self.pst_V)

    def extra_repr(self) -> str:
        return f"size={self.size}, after={self.after}"


def attach_prompt(model: nn.Module, prompt: PSTPrompt) -> None:
    """Insert ``prompt`` into every sequence of ``model``'s base model, of transformers. Raises InputError."""
    body = body_of(model)
    body.add_module(NAME, prompt)
    body.register_forward_pre_hook(_put_in, with_kwargs=True)
    body.register_forward_hook(_take_out)


def prompt_of(model: nn.Module) -> PSTPrompt | None:
    """Return the prompt of ``model``; None without one."""
    return next((module for module in model.modules() if isinstance(module, PSTPrompt)), None)


def body_of(model: nn.Module) -> Any:
    """Return the base model, which accepts embeddings. Raises InputError for one that does not."""
    body: Any = getattr(model, "base_model", model)
    embeddings = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    if embeddings is None or "inputs_embeds" not in inspect.signature(body.forward).parameters:
        raise InputError(
            f"{type(model).__name__} reads no embeddings (inputs_embeds) to insert a prompt into. Remove prompt.text"
        )
    return body


@torch.no_grad()
def embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the embeddings of the tokens ``ids`` (m,): (m, d). Collective under ZeRO-3."""
    embeddings = body_of(model).get_input_embeddings()
    with zero3.gathered(embeddings.parameters()):
        if isinstance(embeddings, CodedEmbedding):
            table = embeddings.table()
            return table_rows(table, ids.to(table.device))
        weight = embeddings.weight
        return weight.detach()[ids.to(weight.device)].clone()


@torch.no_grad()
def read(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the last hidden states of the body for the tokens ``ids`` (m,): (m, d).

    Collective under ZeRO-3, where it gathers the full model on every rank.
    """
    body, was_training = body_of(model), model.training
    model.eval()
    with zero3.gathered(model.parameters()):
        found: Tensor = body(input_ids=ids.unsqueeze(0).to(next(model.parameters()).device)).last_hidden_state[0]
    model.train(was_training)
    return found.clone()


def random_like(states: Tensor, seed: int) -> Tensor:
    """Return normal values that depend only on the seed, scaled to the root mean square of ``states`` (m, d)."""
    size = float(states.float().square().mean().sqrt())
    return seeded_normal(tuple(states.shape), size, f"{seed}/{NAME}/P").to(states)


def _put_in(body: PreTrainedModel, args: tuple[object, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments] | None:
    prompt: PSTPrompt = getattr(body, NAME)
    if prompt.bypassed:
        return None
    names = iter(inspect.signature(body.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, positions, kinds = (given.get(name) for name in ("attention_mask", "position_ids", "token_type_ids"))
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise InputError("attention_mask: a model with a prompt needs shape (sequences, tokens). Pass such a mask")
    cache = next((found for name in _CACHES if (found := given.get(name)) is not None), None)
    prompt._inside = cache is None or cache.get_seq_length() == 0
    after = prompt.after if prompt._inside else 0
    if mask is not None:
        given["attention_mask"] = with_prompt(mask, mask.new_ones(prompt.size), after)
    if positions is not None and not prompt._inside:
        given["position_ids"] = positions + prompt.size
    elif positions is not None:
        own = torch.arange(prompt.size, device=positions.device) + after
        moved = torch.cat([positions[:, :after], positions[:, after:] + prompt.size], 1)
        given["position_ids"] = with_prompt(moved, own, after)
    if prompt._inside:
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            embeddings = body.get_input_embeddings()(given.pop("input_ids"))
        given["inputs_embeds"] = with_prompt(embeddings, prompt(), after)
        if kinds is not None:
            given["token_type_ids"] = with_prompt(kinds, kinds.new_zeros(prompt.size), after)
    return (), given


def _take_out(body: PreTrainedModel, args: object, output: ModelOutput) -> ModelOutput:
    prompt: PSTPrompt = getattr(body, NAME)
    if prompt.bypassed or not prompt._inside:
        return output
    prompt._inside = False
    for name in ("last_hidden_state", "hidden_states"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            output[name] = without_prompt(value, prompt.size, prompt.after)
        elif value is not None:
            output[name] = tuple(without_prompt(one, prompt.size, prompt.after) for one in value)
    return output
