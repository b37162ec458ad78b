"""What a store has to know of the tokenizer that made it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.config.run import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_FIRST_STABLE_KEY = '"added_tokens"'
"""In a tokenizer's JSON, truncation and padding stand before it: the last call's, and no part of the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerIdentity:
    """Tokenizers with equal identities give the same tokens for every text."""

    sha256: str
    vocabulary: int
    """One more than the largest token."""
    end: int
    """The end-of-text token."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest type of the two that hold its tokens."""
        return dtype_for(self.vocabulary)


def dtype_for(vocabulary: int) -> np.dtype:
    """Return little-endian uint16 for up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def identity_of(tokenizer: Tokenizer) -> TokenizerIdentity:
    """Return the identity of a tokenizer of transformers. Raises ConfigError for one without an end-of-text token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which goes between "
            "documents; name the language model's own tokenizer"
        )
    words = tokenizer.get_vocab()
    digest = hashlib.sha256(f"{end} {getattr(tokenizer, 'split_special_tokens', False)} ".encode())
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
        digest.update(text[max(0, text.find(_FIRST_STABLE_KEY)) :].encode())
    else:
        settings = {key: str(value) for key, value in sorted(tokenizer.init_kwargs.items()) if key != "name_or_path"}
        about = [type(tokenizer).__name__, sorted(words.items()), settings]
        digest.update(json.dumps(about).encode())
    return TokenizerIdentity(sha256=digest.hexdigest(), vocabulary=max(max(words.values()), end) + 1, end=end)
