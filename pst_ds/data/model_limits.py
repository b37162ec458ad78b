"""Limits of a model that a task must keep to: its vocabulary, its positions, and which tokens it sees."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pst_ds.config.run import ConfigError, DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer


def check_causal_model(
    data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None, task: str, *, pads: bool
) -> None:
    _refuse_encoder(config, task.partition(",")[0])
    if tokenizer is not None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer has no end-of-text token (eos_token) for task {task}; name the language model's own "
                "tokenizer with model.tokenizer"
            )
        require_vocabulary(config, tokenizer, pads=pads)
    require_positions(data, config)


def require_vocabulary(config: PreTrainedConfig, tokenizer: Tokenizer, *, pads: bool) -> None:
    vocabulary, end = getattr(config.get_text_config(), "vocab_size", None), tokenizer.eos_token_id
    if vocabulary is None:
        return
    if max(tokenizer.vocab_size, (end or 0) + 1) > vocabulary:
        also = f" and the end-of-text token {end}" if end is not None else ""
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens{also}, the model only {vocabulary} (vocab_size); name the "
            "model's own tokenizer with model.tokenizer"
        )
    if pads and (tokenizer.pad_token_id or 0) >= vocabulary:
        raise ConfigError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the model "
            f"only {vocabulary} tokens (vocab_size); name a tokenizer whose pad_token is one of them (model.tokenizer)"
        )


def require_positions(data: DataConfig, config: PreTrainedConfig) -> None:
    positions = positions_of(config)
    if 0 < positions < data.max_length:
        raise ConfigError(
            f"data.max_length = {data.max_length} is more than the {positions} positions of the model "
            f"(max_position_embeddings); set it to at most {positions}"
        )


def positions_of(config: PreTrainedConfig) -> int:
    """Return how many tokens of a text a model of transformers ``config`` has positions for; 0 where the config names
    no limit, or positions are only relative."""
    if getattr(config, "position_biased_input", True) is False:  # DeBERTa
        return 0
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return positions - (config.pad_token_id or 0) - 1 if positions and _counts_from_padding(config) else positions


def _counts_from_padding(config: PreTrainedConfig) -> bool:
    """Return whether the first token has the position after the padding token's id, as in RoBERTa and all that took its
    embeddings over: their code has a function of its own for it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_class = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):
        return False
    code = sys.modules[model_class.__module__]
    return any(hasattr(thing, "create_position_ids_from_input_ids") for thing in (code, *vars(code).values()))


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a language model for ``config`` that sees no token it is to predict."""
    from transformers.models.auto import modeling_auto as known

    return config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _sees_both_ways(config)


def _sees_both_ways(config: PreTrainedConfig) -> bool:
    """BERT and its like have a causal class in transformers, which looks both ways unless the config says otherwise."""
    from transformers.models.auto import modeling_auto as known

    both_ways = config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return both_ways and not getattr(config, "is_decoder", True)


def _refuse_encoder(config: PreTrainedConfig, task: str) -> None:
    if _sees_both_ways(config):
        raise ConfigError(
            f"the model is a {config.model_type} whose config says is_decoder = false: it sees the tokens that task "
            f"{task} has it predict. Name a causal language model (GPT-2, Llama, Qwen, ...)"
        )
