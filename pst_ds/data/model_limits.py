"""Check that a model can do a task: its vocabulary, its positions, and which tokens it attends to."""

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
    """Raise ConfigError if a model cannot predict the next token. ``task``: its name, and why it ends texts."""
    if _is_bidirectional(config):
        raise ConfigError(
            f"the model is an encoder ({config.model_type}, whose config says is_decoder = false): it reads whole "
            f"texts, and task {task.partition(',')[0]} needs one that writes them. Name a causal language model in "
            'model.path (GPT-2, Llama, Qwen, ...), or set task = "classification" for texts with labels'
        )
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer has no end-of-text token (eos_token) for task {task}. Name the language model's own "
            "tokenizer with model.tokenizer"
        )
    check_model(data, config, tokenizer, pads=pads)


def check_model(data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None, *, pads: bool) -> None:
    """Raise ConfigError if a model lacks tokens of ``tokenizer``, or positions for ``data.max_length`` tokens."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and vocabulary is not None:
        end = tokenizer.eos_token_id
        # Not len(tokenizer): it counts added tokens that no text has, such as padding, and models may lack them. The
        # end-of-text token may be an added one, but is used.
        if max(tokenizer.vocab_size, (end or 0) + 1) > vocabulary:
            also = ""
            if end is not None:
                also = f" and the end-of-text token {end}"
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens{also}, the model only {vocabulary} (vocab_size). Name the "
                "model's own tokenizer with model.tokenizer"
            )
        if pads and (tokenizer.pad_token_id or 0) >= vocabulary:
            raise ConfigError(
                f"the tokenizer's padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but the "
                f"model only {vocabulary} tokens (vocab_size). Name a tokenizer whose pad_token is one of them "
                "(model.tokenizer)"
            )
    positions = positions_of(config)
    if 0 < positions < data.max_length:
        raise ConfigError(
            f"data.max_length = {data.max_length} is more than the {positions} positions of the model "
            f"(max_position_embeddings). Set it to at most {positions}"
        )


def positions_of(config: PreTrainedConfig) -> int:
    """Return the number of positions of a model; 0 without a limit in the config, or with only relative positions."""
    # DeBERTa has max_position_embeddings also where it uses relative positions only
    if getattr(config, "position_biased_input", True) is False:
        return 0
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if positions and _counts_from_padding(config):
        # the first position is pad_token_id + 1; the embeddings before it are never used
        return positions - (config.pad_token_id or 0) - 1
    return positions


def _counts_from_padding(config: PreTrainedConfig) -> bool:
    """Return whether positions start after the padding token's id, as in RoBERTa and models with its embeddings. Their
    modules have a function for it; the config does not say."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_class = MODEL_MAPPING.get(type(config), None)
    # a few configs have several model classes, in a tuple, but none that counts from the padding
    if not isinstance(model_class, type):
        return False
    module = sys.modules[model_class.__module__]
    # a function of the module in older versions of transformers, a method of its embeddings in newer ones
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in (module, *vars(module).values()))


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a causal language model for ``config``."""
    from transformers.models.auto import modeling_auto as known

    return config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _is_bidirectional(config)


def _is_bidirectional(config: PreTrainedConfig) -> bool:
    """Return whether tokens attend to later ones. BERT and others have a causal class, but only with is_decoder."""
    from transformers.models.auto import modeling_auto as known

    # a config without is_decoder, as XLM's, is taken for one of a causal model
    return config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True)
