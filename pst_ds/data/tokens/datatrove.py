"""Read the token files of datatrove's DocumentTokenizer, NAME.ds with NAME.ds.index, which nanotron trains on.

    NAME.ds              tokens: uint16, or uint32 for a vocabulary above 65,536
    NAME.ds.index        end of each document in tokens: uint64
    NAME.ds.loss         mask of trained tokens, one byte each; on request only
    NAME.ds.metadata     text: tokenizer, "|" and bytes of a token (not in older ones); then the number of tokens

All numbers are little-endian. The metadata does not identify a tokenizer: its name may be a path of another machine.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.store import mapped
from pst_ds.data.tokens.token_files import TokenFile, TokenFormat, fingerprint, starts_of_lengths
from pst_ds.data.tokens.tokenize import TokenizerIdentity

_ITEMS: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""Types of tokens by their bytes."""
_END_BYTES = 8
_METADATA = re.compile(r"[^\n]*?(?:\|(?P<item>\d))?\n(?P<count>\d+)(?:\n|$)")


class Datatrove(TokenFormat):
    """Files of datatrove."""

    name = "datatrove"
    ending = ".ds"
    index_ending = ".ds.index"
    more_endings = (".ds.loss", ".ds.metadata")

    def open(self, path: Path, tokenizer: TokenizerIdentity) -> TokenFile:
        index = self.index_of(path)
        ends = _ends(index)
        count = int(ends[-1])
        num_bytes = path.stat().st_size
        # computed: the metadata that states it is missing in older files
        item = num_bytes // max(count, 1)
        if item not in _ITEMS or item * count != num_bytes:
            raise ConfigError(
                f"{str(path)!r} has {num_bytes} bytes, but {index.name} says {count} tokens of 2 or 4 bytes. One of "
                "the two files is truncated, or belongs to another. Copy or write both again"
            )
        _require_same_metadata(path, item=item, count=count)
        files = [path, index]
        learned = None
        loss = path.with_name(f"{path.name}.loss")
        if loss.is_file():
            if loss.stat().st_size != count:
                raise ConfigError(
                    f"{str(loss)!r} has {loss.stat().st_size} bytes, but {path.name} has {count} tokens. Copy or write "
                    "both again"
                )
            learned = mapped(loss, np.dtype("u1"))
            files.append(loss)
        return TokenFile(mapped(path, _ITEMS[item]), partial(_starts, index, ends), fingerprint(*files), learned)


DATATROVE = Datatrove()


def _ends(index: Path) -> np.ndarray:
    """Map the document ends. Raises ConfigError."""
    size = index.stat().st_size
    if not size or size % _END_BYTES:
        raise ConfigError(
            f"{str(index)!r} has {size} bytes, not a multiple of {_END_BYTES}. It is truncated. Copy or write it again"
        )
    return mapped(index, np.dtype("<u8"))


def _require_same_metadata(path: Path, *, item: int, count: int) -> None:
    """Raise ConfigError if the metadata, where there is some, has another size."""
    metadata = path.with_name(f"{path.name}.metadata")
    if not metadata.is_file():
        return
    # the name of a tokenizer may be a path in any encoding
    match = _METADATA.match(metadata.read_text(encoding="utf-8", errors="replace"))
    # another version may write another text, which is not an error of the tokens
    if match is None:
        return
    stated = int(match["count"])
    stated_item = int(match["item"] or item)
    if (stated, stated_item) != (count, item):
        raise ConfigError(
            f"{str(path)!r} has {count} tokens of {item} bytes, but {metadata.name} says {stated} of {stated_item}. "
            "The files do not belong together. Copy or write them again"
        )


def _starts(index: Path, ends: np.ndarray) -> np.ndarray:
    """Return the document starts. Raises ConfigError for ends that do not ascend."""
    if (ends[1:] < ends[:-1]).any():
        raise ConfigError(f"{str(index)!r} is damaged: its document ends do not ascend. Write it again")
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return starts_of_lengths(starts, int(ends[-1]))
