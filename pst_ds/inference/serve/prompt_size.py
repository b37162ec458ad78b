"""How many characters a token has at most, which bounds the tokens of a prompt before it is tokenised."""

import copy
from dataclasses import dataclass
from functools import cached_property

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase as Tokenizer


def longest_token(tokenizer: Tokenizer) -> int:
    """Return the characters of the longest token; 0 if a token may stand for text of any length.

    The latter is so for tokenizers that replace whole words, or several unknown characters, by one unknown token.
    Byte-level tokens count a character per byte, of which a text has at least one per character.
    """
    # only fast tokenizers have a backend; for slow ones nothing is known
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, BPE):
        return 0
    if backend.model.unk_token is not None and backend.model.fuse_unk and not backend.model.byte_fallback:
        return 0
    # with added tokens, which may be the longest
    return max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)


@dataclass
class ReaderTokenizers:
    """A tokenizer for each thread that reads requests, because tokenizers are not thread-safe."""

    short: Tokenizer

    @cached_property
    def long(self) -> Tokenizer:
        """A copy for the thread that reads long requests, made when the first one arrives."""
        return copy.deepcopy(self.short)

    def of(self, is_long: bool) -> Tokenizer:
        if is_long:
            return self.long
        return self.short
