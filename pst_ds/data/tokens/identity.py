"""Loading a tokenizer, and the identity by which a token store knows it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_FIRST_STABLE_KEY = '"added_tokens"'
"""Key of a tokenizer's JSON after truncation and padding, which depend on the last call and not on the tokenizer."""


def open_tokenizer(path: str | Path, setting: str, fix: str) -> Tokenizer:
    """Load the tokenizer in a folder, or on the hub. Raises ConfigError, which starts with ``setting``."""
    from transformers import AutoTokenizer

    problem = "its files are missing"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # for a folder without tokenizer files, transformers makes a tokenizer that has only special tokens
        if len(tokenizer) > len(set(tokenizer.all_special_ids)):
            return tokenizer
    except (OSError, ValueError) as error:
        problem = first_line(error)
    raise ConfigError(
        f"{setting} has no tokenizer, as a folder (looked in {Path(path).absolute()}) or on the hub: {problem}. {fix}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerIdentity:
    """Identity of a tokenizer: equal identities tokenise every text equally."""

    sha256: str
    """Hash of its vocabulary, rules and settings."""
    vocabulary: int
    """Largest token id plus 1."""
    end: int
    """Id of the end-of-text token."""

    @property
    def dtype(self) -> np.dtype:
        """Smallest type that holds its tokens: uint16 or uint32."""
        return dtype_for(self.vocabulary)


def dtype_for(vocabulary: int) -> np.dtype:
    """Return little-endian uint16 for up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def identity_of(tokenizer: Tokenizer) -> TokenizerIdentity:
    """Return the identity of a tokenizer of transformers. Raises ConfigError for one without an end-of-text token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which separates "
            "documents. Name the language model's tokenizer"
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
