"""Token files of other programs: the interface of a format, the registry, and files as one stream.

A format is one class, found by its name: those of pst-ds next to this module, those of other packages by an entry point
in the group ``pst_ds.token_formats``. Files are mapped where they lie. Document starts are checked and written to the
cache once per host.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.arrays import joined
from pst_ds.data.tokens.store import TokenStream, mapped
from pst_ds.data.tokens.tokenize import TokenizerIdentity
from pst_ds.plugins import Registry

_WINDOW_BYTES = 1 << 16
_WINDOWS = 64
"""Windows of a file that determine its fingerprint, at even distances: 4 MiB of any size."""
_WINDOWS_OF_TOKENS = 8
"""Windows whose tokens are compared with the tokenizer's vocabulary."""
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True, eq=False)
class TokenFile:
    """The tokens of one file, as :class:`~pst_ds.data.tokens.store.TokenStream` has them."""

    tokens: np.ndarray
    """(tokens,), of an integer type."""
    starts: Callable[[], np.ndarray]
    """Reads and checks the document starts, (documents,) int64 in ascending order. Raises ConfigError."""
    digest: str
    """Fingerprint of the file and its index."""
    learned: np.ndarray | None = None
    """Mask of the tokens that are trained on: (tokens,), 0 is False. None for all."""


class TokenFormat:
    """How another program stores tokens. One object without state serves all files.

    The files have no hash of a tokenizer, so the run file has to name one.
    """

    name: str
    """Name of the program, for messages."""
    ending: str
    """Ending of the files with tokens."""
    index_ending: str
    """Ending of the file with document borders, next to each."""
    more_endings: tuple[str, ...] = ()
    """Endings of further files."""

    def index_of(self, path: Path) -> Path:
        """Return the file with the document borders of ``path``."""
        return path.with_name(path.name.removesuffix(self.ending) + self.index_ending)

    def open(self, path: Path, tokenizer: TokenizerIdentity) -> TokenFile:
        """Map a file of tokens that exists. Raises ConfigError for a damaged one."""
        raise NotImplementedError


TOKEN_FORMATS: Registry[TokenFormat] = Registry(
    "pst_ds.token_formats",
    "format of token files",
    {"megatron": "pst_ds.data.tokens.megatron:MEGATRON", "datatrove": "pst_ds.data.tokens.datatrove:DATATROVE"},
)


def all_endings() -> tuple[str, ...]:
    """Return the endings of all files of all formats."""
    endings: list[str] = []
    for name in TOKEN_FORMATS.names:
        token_format = TOKEN_FORMATS.get(name)
        endings += [token_format.ending, token_format.index_ending, *token_format.more_endings]
    return tuple(endings)


def token_files(where: str) -> list[tuple[TokenFormat, Path]]:
    """Return the files of tokens at ``where``, by name: a file, its prefix, a folder, or a pattern of them.

    A folder needs at least one index, since other files may have the same ending.
    """
    format_of: dict[Path, TokenFormat] = {}
    for name in TOKEN_FORMATS.names:
        token_format = TOKEN_FORMATS.get(name)
        paths = list(_paths(where, token_format))
        if any(token_format.index_of(path).is_file() for path in paths):
            format_of |= dict.fromkeys(paths, token_format)
    # by name over all formats, so that the order of documents does not depend on the registry
    return [(format_of[path], path) for path in sorted(format_of)]


def _paths(where: str, token_format: TokenFormat) -> Iterator[Path]:
    """Yield the files at ``where`` that have the ending of a format."""
    if Path(where).is_dir():
        for path in Path(where).iterdir():
            if path.name.endswith(token_format.ending):
                yield path
        return
    # Megatron names a file by its prefix, without the ending
    for name in (where, where + token_format.ending):
        matches = [name]
        # a file may have brackets in its name
        if _GLOB_CHARACTERS & set(name) and not Path(name).exists():
            matches = glob.glob(name)
        for match in matches:
            if match.endswith(token_format.ending) and Path(match).is_file():
                yield Path(match)


def open_token_files(
    files: Sequence[tuple[TokenFormat, Path]],
    tokenizer: TokenizerIdentity,
    where: str,
    cached: Callable[[str, str, Callable[[Path], None]], Path],
) -> TokenStream:
    """Map files of tokens as one stream. Raises ConfigError.

    ``cached`` returns the path of a cached file by its name, what it is of, and the function that writes it.
    """
    opened: list[TokenFile] = []
    type_names: set[str] = set()
    for token_format, path in files:
        file = _open_file(token_format, path, tokenizer)
        opened.append(file)
        type_names.add(file.tokens.dtype.name)
    types = sorted(type_names)
    # one stream has one type: converting would copy the files into memory
    if len(types) > 1:
        raise ConfigError(
            f"{where!r} has files with tokens of the types {' and '.join(types)}. Name each type in its own "
            "entry of data.sources"
        )
    digest = hashlib.sha256(" ".join(file.digest for file in opened).encode()).hexdigest()

    def write_starts(partial: Path) -> None:
        first = 0
        with partial.open("wb") as out:
            for file in opened:
                out.write((file.starts() + first).astype("<i8").tobytes())
                first += len(file.tokens)

    starts = cached(f"starts-{digest[:32]}.bin", where, write_starts)
    learned = None
    if any(file.learned is not None for file in opened):
        learned = joined([_learned_of(file) for file in opened])
    return TokenStream(
        tokens=joined([file.tokens for file in opened]),
        borders=mapped(starts, np.dtype("<i8")),
        digest=digest,
        learned=learned,
    )


def _open_file(token_format: TokenFormat, path: Path, tokenizer: TokenizerIdentity) -> TokenFile:
    """Map a file of tokens. Raises ConfigError without its index, and for tokens of another tokenizer."""
    if not token_format.index_of(path).is_file():
        raise ConfigError(
            f"{str(path)!r} has no {token_format.index_of(path).name} next to it, which has the document borders. "
            "Copy both files"
        )
    # an empty file cannot be mapped
    if not path.stat().st_size:
        raise ConfigError(f"{str(path)!r} is empty. Write it again, or name the other files")
    file = token_format.open(path, tokenizer)
    _require_of_tokenizer(path, file.tokens, tokenizer)
    return file


def _learned_of(file: TokenFile) -> np.ndarray:
    """Return the mask of trained tokens of a file; all ones for a file without a mask."""
    if file.learned is not None:
        return file.learned
    # a view of one byte, of any length
    return np.broadcast_to(np.uint8(1), len(file.tokens))


def starts_of_lengths(starts: np.ndarray, num_tokens: int) -> np.ndarray:
    """Return the document starts, int64 in ascending order, without those of empty documents."""
    ends = np.append(starts[1:], num_tokens)
    return np.asarray(starts[ends > starts], dtype=np.int64)


def fingerprint(*paths: Path) -> str:
    """Return a SHA-256 of the sizes of files and of up to 4 MiB of each, since whole corpora take hours to hash."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for place in _places(size, _WINDOWS):
                digest.update(os.pread(file.fileno(), _WINDOW_BYTES, place))
    return digest.hexdigest()


def _places(size: int, most: int) -> list[int]:
    """Return the first bytes of at most ``most`` windows, at even distances."""
    count = min(most, -(-size // _WINDOW_BYTES))
    last = max(0, size - _WINDOW_BYTES)
    if count <= 1:
        return [0]
    return [last * number // (count - 1) for number in range(count)]


def _require_of_tokenizer(path: Path, tokens: np.ndarray, tokenizer: TokenizerIdentity) -> None:
    """Raise ConfigError if some tokens show that ``tokenizer`` did not make the file."""
    item = tokens.dtype.itemsize
    for place in _places(len(tokens) * item, _WINDOWS_OF_TOKENS):
        window = tokens[place // item : (place + _WINDOW_BYTES) // item]
        # signed types of Megatron have negative numbers where bytes are read in another type
        wrong = window[(window < 0) | (window >= tokenizer.vocabulary)]
        if len(wrong):
            raise ConfigError(
                f"{str(path)!r} holds the token {wrong[0]}, but the run's tokenizer has {tokenizer.vocabulary}. Name "
                "the tokenizer of the file with model.tokenizer"
            )
