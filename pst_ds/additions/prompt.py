"""Trained prompts: vectors in every sequence that start as the words of a text (SK-Tuning, arXiv 2410.08598).

The prompt is inside the base model. Hooks insert it after the embeddings and remove its positions from the outputs, so
a head, pooler or classifier sees the positions of the text only, and losses, labels and predictions refer to the text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pst_ds.config.additions import AdditionSettings
from pst_ds.config.settings import NotNegative, Rate, Reported, settings
from pst_ds.data.model_limits import is_causal
from pst_ds.errors import InputError
from pst_ds.nn.addition import AddedModule, ModelAddition
from pst_ds.nn.layer import seeded_normal
from pst_ds.parallel import sharding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pst_ds.config.run import RunConfig

Inputs: TypeAlias = dict[str, Any]
"""Inputs of a forward pass, by name."""
_CACHES = ("cache", "past_key_values")
"""Names in transformers for the cached keys and values of earlier tokens."""


@settings
class PromptSettings(AdditionSettings):
    """A prompt that every sequence has, as trained vectors (docs/how-to/methods.md)."""

    learning_rate: Reported[Rate] = 5e-3
    """Peak learning rate of the vectors."""
    text: str
    """Initial prompt: a description of the task, such as "classify the review as positive or negative:". Decoders read
    it first, encoders after their first token ([CLS])."""
    length: NotNegative = 0
    """Number of vectors. The tokens of the text are repeated or truncated to it; 0 is one vector per token."""
    source: Literal["embeddings", "random"] = "embeddings"
    """Initial vectors: the "embeddings" of the text's tokens, or "random" ones of the same size, as a baseline."""

    def problems(self) -> Iterator[str]:
        if not self.text.strip():
            yield f"additions.prompt.text = {self.text!r} has no words. Describe the task"


class Prompt(ModelAddition):
    """The addition "prompt"."""

    settings_class = PromptSettings
    settings: PromptSettings

    def conflicts(self, run: RunConfig) -> Iterator[str]:
        """Yield a message where only some of the documents, or of the ranks, of a sequence would have the prompt."""
        if run.task_facts.packs_text and run.data.keeps_documents_apart:
            yield (
                f"additions.prompt with task = {run.task!r}, which separates the documents of a sequence: only the "
                "first would see the prompt. Set data.document_mask = false"
            )
        if run.train.sequence_parallel > 1:
            yield (
                f"additions.prompt with train.sequence_parallel = {run.train.sequence_parallel}: only one of the ranks "
                "that share a sequence would have the prompt. Set train.sequence_parallel = 1"
            )

    def attach(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptVectors:
        config = cast("PreTrainedModel", model).config
        causal = is_causal(config)
        # special tokens as PEFT has them in the prompt of a decoder; an encoder has its own around the whole input
        ids: list[int] = tokenizer(self.settings.text, add_special_tokens=causal)["input_ids"]
        length = self.settings.length or len(ids)
        repetitions = -(-length // len(ids))
        vectors = _embedded(model, (ids * repetitions)[:length])
        if self.settings.source == "random" and not vectors.is_meta:
            size = float(vectors.float().square().mean().sqrt())
            vectors = seeded_normal((length, vectors.shape[1]), size, f"{seed}/{self.module_name}").to(vectors)
        # inputs of an encoder may start with a token that represents the whole input, such as [CLS]
        first_token = tokenizer("a")["input_ids"][0]
        after = 1 if not causal and first_token == tokenizer.cls_token_id else 0
        return self._connect(model, PromptVectors(vectors, after))

    def restore(self, model: nn.Module, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> PromptVectors:
        vectors = tensors["vectors"]
        width = _body_of(model).get_input_embeddings().embedding_dim
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise ValueError(
                f"the prompt has shape {tuple(vectors.shape)}, and the model's embeddings have size {width}"
            )
        return self._connect(model, PromptVectors(vectors, int(str(facts["after"]))))

    def _connect(self, model: nn.Module, prompt: PromptVectors) -> PromptVectors:
        body = _body_of(model)
        body.add_module(self.module_name, prompt)
        body.register_forward_pre_hook(prompt.insert, with_kwargs=True)
        body.register_forward_hook(prompt.remove)
        return prompt


class PromptVectors(AddedModule):
    """The prompt's vectors, (length, hidden size), and the hooks of the base model around them."""

    def __init__(self, vectors: Tensor, after: int):
        """``after``: number of tokens of a sequence before the prompt, 0 or 1."""
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())
        self.extra_tokens = len(vectors)
        self.after = after
        self._is_in_sequence = False

    def facts(self) -> dict[str, object]:
        return {"after": self.after}

    def extra_repr(self) -> str:
        return f"length={self.extra_tokens}, after={self.after}"

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return ``embeddings`` (batch, tokens, hidden size) with the prompt inserted into every sequence."""
        # inside forward, since ZeRO-3 releases the vectors once this module has run
        return self._with(embeddings, self.vectors)

    def insert(self, body: nn.Module, args: tuple[object, ...], inputs: Inputs) -> tuple[tuple[()], Inputs] | None:
        """Change the inputs of the base model: its pre-hook."""
        self._is_in_sequence = False
        if self.bypassed:
            return None
        names = inspect.signature(body.forward).parameters
        changed = {**dict(zip(names, args, strict=False)), **inputs}
        caches = [changed[name] for name in _CACHES if changed.get(name) is not None]
        # after the first pass of a generation the prompt is in the cache, and only masks and positions count it
        self._is_in_sequence = not caches or caches[0].get_seq_length() == 0
        mask = changed.get("attention_mask")
        if mask is not None:
            changed["attention_mask"] = self.extended_mask(mask)
        positions = changed.get("position_ids")
        if positions is not None:
            changed["position_ids"] = self._shifted(positions)
        if not self._is_in_sequence:
            return (), changed
        embeddings = changed.get("inputs_embeds")
        if embeddings is None:
            embeddings = cast("PreTrainedModel", body).get_input_embeddings()(changed.pop("input_ids"))
        changed["inputs_embeds"] = self(embeddings)
        segments = changed.get("token_type_ids")
        if segments is not None:
            changed["token_type_ids"] = self._with(segments, segments.new_zeros(self.extra_tokens))
        return (), changed

    def remove(self, body: nn.Module, args: object, output: object) -> object:
        """Remove the prompt's positions from the outputs of the base model: its hook."""
        if not self._is_in_sequence:
            return output
        self._is_in_sequence = False
        if not isinstance(output, ModelOutput):
            raise InputError("return_dict = False: a model with a prompt returns a ModelOutput only. Omit return_dict")
        if isinstance(output.get("last_hidden_state"), Tensor):
            output["last_hidden_state"] = self._without(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(self._without(states) for states in output["hidden_states"])
        return output

    def extended_mask(self, mask: Tensor) -> Tensor:
        """Return the mask (batch, tokens) with ones for the prompt. Raises InputError for a mask of another shape."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError("attention_mask: a model with a prompt needs shape (sequences, tokens). Pass such a mask")
        # in later passes too, whose masks cover the cache
        return self._with(mask, mask.new_ones(self.extra_tokens))

    def _shifted(self, positions: Tensor) -> Tensor:
        """Move positions (batch, tokens) to make room for the prompt, which gets positions too."""
        if not self._is_in_sequence:
            return positions + self.extra_tokens
        prompt_positions = torch.arange(self.after, self.after + self.extra_tokens, device=positions.device)
        moved = torch.cat([positions[:, : self.after], positions[:, self.after :] + self.extra_tokens], 1)
        return self._with(moved, prompt_positions)

    def _with(self, values: Tensor, of_prompt: Tensor) -> Tensor:
        """Insert ``of_prompt`` (length, ...) into every row of ``values`` (batch, tokens, ...)."""
        repeated = of_prompt.to(values).expand(values.shape[0], *of_prompt.shape)
        return torch.cat([values[:, : self.after], repeated, values[:, self.after :]], 1)

    def _without(self, values: Tensor) -> Tensor:
        """Remove the prompt's positions from ``values`` (batch, length + tokens, ...)."""
        if self.after == 0:
            return values[:, self.extra_tokens :]
        return torch.cat([values[:, : self.after], values[:, self.after + self.extra_tokens :]], 1)


def _body_of(model: nn.Module) -> Any:
    """Return the base model, which accepts embeddings. Raises InputError for one that does not."""
    body: Any = getattr(model, "base_model", model)
    if not hasattr(body, "get_input_embeddings") or "inputs_embeds" not in inspect.signature(body.forward).parameters:
        raise InputError(
            f"{type(model).__name__} reads no embeddings (inputs_embeds) to insert a prompt into. Remove "
            "[additions.prompt]"
        )
    return body


@torch.no_grad()
def _embedded(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the embeddings of the tokens ``ids``, (tokens, hidden size). Collective under ``zero.Init``."""
    embeddings = _body_of(model).get_input_embeddings()
    # the module, not its weight: it may scale the rows, have an update, or hold them quantised
    with sharding.gathered(embeddings.parameters()):
        device = next(embeddings.parameters()).device
        rows: Tensor = embeddings(torch.tensor(ids, device=device))
        return rows.clone()
