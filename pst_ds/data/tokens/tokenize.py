"""Open and identify tokenizers, tokenise documents, and count the bytes that each token represents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.errors import InputError, first_line
from pst_ds.formats import hub

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
            longest = tokenizer.model_max_length
            if isinstance(longest, int | float) and longest > 0:
                return tokenizer
            problem = f"model_max_length = {str(longest)[:80]!r} in tokenizer_config.json is not a number of tokens"
    except Exception as error:  # strange values make transformers raise anything
        problem = first_line(error)
    where = ""
    if not Path(path).is_dir():
        where = f", as a folder (looked in {Path(path).absolute()}) or on the hub"
    if hub.is_hub_name(path):
        try:
            hub.require_file(str(path), "tokenizer_config.json")
        except hub.NotDownloadedError as error:
            raise hub.NotDownloadedError(f"{setting} has no tokenizer{where}: {error}") from error
        except InputError:
            pass  # some repositories have another file of a tokenizer
    raise ConfigError(f"{setting} has no tokenizer{where}: {problem}. {fix}")


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
        """Smallest little-endian type that holds its tokens: uint16 or uint32."""
        if self.vocabulary <= 1 << 16:
            return np.dtype("<u2")
        return np.dtype("<u4")


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


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Concatenated tokens of documents, each followed by the end-of-text token."""

    tokens: np.ndarray
    """(tokens,), of an integer type."""
    lengths: np.ndarray
    """Tokens of each document with the end-of-text token: (documents,) int64."""
    num_bytes: np.ndarray | None = None
    """Bytes of text that each token represents: (tokens,) uint32. None if not counted."""
    learned: np.ndarray | None = None
    """Mask of the tokens that are trained on: (tokens,) bool. None for all."""
    closed_by_us: bool = False
    """True if pst-ds, not the tokenizer, added the last end-of-text token."""


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, count: bool = False) -> Documents:
    """Return the tokens of documents and, with ``count``, the bytes that each token represents.

    The tokenizer adds its special tokens. The end-of-text token follows each document, unless the tokenizer added it.
    Documents without tokens, or with only white space, are omitted.

    Each UTF-8 byte counts for the first token that ends at or after it, by the tokenizer's offsets: white space between
    two tokens belongs to the second, special tokens have no bytes, and bytes after the last offset belong to the last
    token. The counts add up to the document's length. Without offsets, bytes are distributed evenly.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        return _no_documents(count=count)
    end = tokenizer.eos_token_id
    all_ids, places = _encoded(texts, tokenizer, with_places=count and tokenizer.is_fast)
    documents: list[list[int]] = []
    num_bytes: list[int] = []
    closed = False
    for index, ids in enumerate(all_ids):
        # a text of characters that the tokenizer's normalizer removes
        if not ids:
            continue
        closed = ids[-1] != end
        if count:
            # without offsets, bytes are distributed evenly
            ends = None
            if places:
                ends = [stop for _, stop in places[index]]
            num_bytes += _bytes_of_tokens(texts[index], len(ids), ends)
        if closed:
            ids = [*ids, end]
            if count:
                num_bytes.append(0)
        documents.append(ids)
    # from iterators of a known length: a list of all tokens would take eight times the memory of the arrays
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    tokens = np.fromiter(chain.from_iterable(documents), np.int64, int(lengths.sum()))
    counted = None
    if count:
        counted = np.array(num_bytes, dtype=np.uint32)
    return Documents(tokens, lengths, counted, closed_by_us=closed)


def _no_documents(*, count: bool) -> Documents:
    num_bytes = None
    if count:
        num_bytes = np.empty(0, np.uint32)
    return Documents(np.empty(0, np.int64), np.empty(0, np.int64), num_bytes)


def bytes_of_texts(texts: Iterable[str]) -> int:
    """Return the UTF-8 bytes of texts. Halves of surrogate pairs, which datasets on the hub may have, count three."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _encoded(
    texts: list[str], tokenizer: Tokenizer, *, with_places: bool
) -> tuple[list[list[int]], list[list[tuple[int, int]]] | None]:
    """Return the tokens of each document and, with ``with_places``, the offsets of each token."""
    if with_places or not _calls_only_its_backend(tokenizer):
        encoded = tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=with_places
        )
        # slow tokenizers have no offsets
        return encoded["input_ids"], encoded.get("offset_mapping")
    # 25 % faster than calling the tokenizer, which returns more than tokens
    backend = tokenizer.backend_tokenizer
    # its last call may have truncated or padded
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)], None


def _calls_only_its_backend(tokenizer: Tokenizer) -> bool:
    """Return whether calling ``tokenizer`` does nothing besides calling its backend."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    tokenizer_class = type(tokenizer)
    # a class may override either method, for example to add tokens of a language
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and tokenizer_class.__call__ is PreTrainedTokenizerBase.__call__
        and tokenizer_class._encode_plus is PreTrainedTokenizerFast._encode_plus
        and hasattr(tokenizer.backend_tokenizer, "encode_batch_fast")
    )


def _bytes_of_tokens(text: str, num_tokens: int, ends: Sequence[int] | None) -> list[int]:
    """Return the bytes of ``text`` that each token represents, given the character offsets of token ends."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    # UTF-8 has one byte per character, and one more above each of these code points
    widths = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(widths)])  # (characters + 1,): bytes before each character
    if ends is None:
        reached = upto[-1] * np.arange(1, num_tokens + 1) // num_tokens
    else:
        # ascending, since special tokens have the offset 0 wherever they are
        places = np.maximum.accumulate(np.clip(ends, 0, len(text)))
        places[-1] = len(text)  # bytes after the last offset belong to the last token
        reached = upto[places]
    return np.diff(reached, prepend=0).tolist()
