"""Add a run's trained prompt to its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.model_limits import is_causal, positions_of
from pst_ds.nn.inject import bypassed
from pst_ds.nn.prompt import PSTPrompt, attach_prompt, body_of, embedded, random_like, read

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def add_prompt(module: nn.Module, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prepend the run's ``[prompt]`` to every input of its model; do nothing without one.

    Also works on the meta device. Raises InputError for a prompt without tokens, for one that leaves too few positions,
    and for a model that reads no embeddings. Collective under ``zero.Init``.
    """
    if not run.prompt.text:
        return
    config: PreTrainedConfig = module.config  # type: ignore[assignment]
    causal = is_causal(config)  # like PEFT, which adds special tokens to the prompts of causal models
    ids = tokenizer(run.prompt.text, add_special_tokens=causal)["input_ids"] if run.prompt.text.strip() else []
    _require_room(run, config, len(ids))
    embeddings = body_of(module).get_input_embeddings()
    tokens = torch.tensor(ids, device="cpu")
    states = embedded(module, tokens)
    if run.prompt.source == "hidden":
        width = config.get_text_config().hidden_size
        if width != embeddings.embedding_dim:
            raise ConfigError(
                f'prompt.source = "hidden" starts from states of {width} numbers, and the model\'s embeddings have '
                f'{embeddings.embedding_dim}; set prompt.source = "embeddings"'
            )
        if not states.is_meta:
            with bypassed(module):
                states = read(module, tokens)
    elif run.prompt.source == "random" and not states.is_meta:
        states = random_like(states, run.seed)
    # inputs of an encoder may start with a token that represents the whole input, such as [CLS]
    has_cls = tokenizer.cls_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    after = int(has_cls and not causal)
    adapter = run.prompt.adapter
    attach_prompt(module, PSTPrompt(states, adapter, after=after, rank=run.prompt.rank, seed=run.seed))


def _require_room(run: RunConfig, config: PreTrainedConfig, size: int) -> None:
    if size == 0:
        raise ConfigError(f"prompt.text = {run.prompt.text!r} has no tokens. Give it words, or remove it.")
    positions, longest = positions_of(config), run.data.max_length
    if 0 < positions < size + longest:
        raise ConfigError(
            f"prompt.text has {size} tokens, and with data.max_length = {longest} that is more than the {positions} "
            f"positions of the model (max_position_embeddings); set data.max_length to at most {positions - size}"
        )
