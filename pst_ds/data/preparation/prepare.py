"""Tokenise sources into a store in several processes. An interrupted preparation resumes to the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.atomic_files import (
    LOCK,
    PARTIAL,
    only_writer,
    publish,
    require_writable,
    restore_replaced,
    sync,
    write_text_atomic,
)
from pst_ds.data.conversations import require_template, template_hash
from pst_ds.data.preparation.pieces import Piece, Reading, find_pieces
from pst_ds.data.preparation.readers import texts_of, tokenize_texts
from pst_ds.data.preparation.workers import run_tasks
from pst_ds.data.tokens.store import BYTES, LEARNED, MANIFEST, Manifest, read_manifest
from pst_ds.data.tokens.tokenize import TokenizerIdentity, identity_of
from pst_ds.data.tokens.writer import ShardWriter, clean_up, finish_store, finished_shard
from pst_ds.errors import InputError
from pst_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE_BYTES = 64 << 20
"""Bytes of text per shard."""
PLAN = "plan"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Plan of a token store: its sources and how they are read."""

    sources: tuple[str, ...]
    reading: Reading
    pieces: tuple[Piece, ...]
    tokenizer: TokenizerIdentity
    count_bytes: bool

    @property
    def plain_files(self) -> list[Path]:
        """Local uncompressed text files."""
        spans = (span for piece in self.pieces for span in piece)
        plain = (of.path for of in spans if of.kind == "text" and not of.compression and "://" not in of.path)
        return [Path(path) for path in dict.fromkeys(plain)]

    @property
    def num_bytes(self) -> int:
        """Approximate bytes to read."""
        return sum(span.num_bytes for piece in self.pieces for span in piece)

    @property
    def key(self) -> str:
        """Hash of everything that determines the store. File times and sizes represent the contents."""
        paths = dict.fromkeys(span.path for piece in self.pieces for span in piece)
        times = [Path(path).stat().st_mtime_ns for path in paths if Path(path).exists()]
        pieces = [[asdict(span) for span in piece] for piece in self.pieces]
        about = [asdict(self.reading), pieces, times, asdict(self.tokenizer), self.count_bytes]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def plan_store(
    sources: Sequence[str], tokenizer: Tokenizer, reading: Reading, *, count_bytes: bool = False,
    piece_bytes: int = PIECE_BYTES,
) -> Preparation:  # fmt: skip
    """Find the sources, and cut them into pieces. Raises InputError."""
    if reading.kind == "chat":
        require_template(tokenizer, "chat")
        reading = replace(reading, chat_template_sha256=template_hash(tokenizer))
    pieces = find_pieces(sources, reading, piece_bytes)
    if not pieces:
        raise InputError(f"{', '.join(sources)}: there is nothing to read. Name files with text")
    return Preparation(
        sources=tuple(sources),
        reading=reading,
        pieces=tuple(pieces),
        tokenizer=identity_of(tokenizer),
        count_bytes=count_bytes,
    )


def prepare_store(
    plan: Preparation, tokenizer: Tokenizer, out: Path, *, num_workers: int = 1, force: bool = False
) -> Manifest:
    """Write the store of ``plan`` to the folder ``out`` atomically.

    Resumes an unfinished preparation of the same plan; ``force`` starts over, and replaces an existing store. Raises
    InputError.
    """
    require_writable(out, f"--out {out}")
    partial = out.with_name(out.name + PARTIAL)
    with only_writer(out.with_name(f".{out.name}{LOCK}"), f"prepare {out}"):
        restore_replaced(out)
        _require_free(out, force=force)
        _take_over(partial, plan.key, force=force)
        if not (partial / MANIFEST).is_file():
            try:
                write_pieces(plan, tokenizer, partial, num_workers)
            except InputError:
                _leave_nothing_of_nothing(partial, len(plan.pieces), plan.tokenizer.dtype)
                raise
        manifest = read_manifest(partial)
        clean_up(partial, manifest)
        if not manifest.counts["tokens"]:
            shutil.rmtree(partial)
            raise InputError(f"{', '.join(plan.sources)}: there is only white space. Name files with text")
        publish(partial, out)
    return manifest


def _leave_nothing_of_nothing(partial: Path, num_pieces: int, dtype: np.dtype) -> None:
    """Remove a folder without a finished shard."""
    if all(finished_shard(partial, i, dtype) is None for i in range(num_pieces)):
        shutil.rmtree(partial)


def write_pieces(plan: Preparation, tokenizer: Tokenizer, folder: Path, num_workers: int = 1) -> None:
    """Write the missing shards, then the manifest. Raises InputError."""
    _tokenize_pieces(plan, tokenizer, folder, num_workers)
    records = [finished_shard(folder, i, plan.tokenizer.dtype) for i in range(len(plan.pieces))]
    source = {"sources": list(plan.sources), **asdict(plan.reading)}
    finish_store(folder, plan.tokenizer, [record for record in records if record is not None], source)


def _require_free(out: Path, *, force: bool) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise InputError(f"--out {out} is a folder with other files. Name a new one")
        if not force:
            raise InputError(f"--out {out} is a finished store. Replace it with --force, or name another folder")


def _take_over(partial: Path, key: str, *, force: bool) -> None:
    """Create the folder of an unfinished preparation, or keep one with the same ``key``."""
    path = partial / PLAN
    if partial.is_dir() and not force and path.is_file():
        if path.read_text() != key:
            raise InputError(
                f"{partial} is an unfinished store of other sources, settings or tokenizer. Start over with --force, "
                "or name another --out"
            )
        return
    if partial.is_dir() and (partial / MANIFEST).is_file() and not force:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_text_atomic(path, key)
    sync(partial)


def _tokenize_pieces(plan: Preparation, tokenizer: Tokenizer, folder: Path, num_workers: int) -> None:
    dtype = plan.tokenizer.dtype
    missing = [i for i in range(len(plan.pieces)) if finished_shard(folder, i, dtype) is None]
    left = sum(span.num_bytes for i in missing for span in plan.pieces[i])

    def task(number: int, report: Callable[[int], None]) -> None:
        _tokenize_piece(plan, tokenizer, folder, number, report)

    with Progress("tokenize", plan.num_bytes, "bytes", done=plan.num_bytes - left) as progress:
        run_tasks(task, missing, num_workers, progress.add)


def _tokenize_piece(
    plan: Preparation, tokenizer: Tokenizer, folder: Path, number: int, report: Callable[[int], None]
) -> None:
    reading, count = plan.reading, plan.count_bytes
    kinds = {BYTES} if count else {LEARNED} if reading.kind == "chat" else set[str]()
    with ShardWriter(folder, number, plan.tokenizer, frozenset(kinds)) as shard:
        for span in plan.pieces[number]:
            left = span.num_bytes
            for texts in texts_of(span, reading):
                size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
                shard.add(tokenize_texts(texts, reading, tokenizer, span.path, count=count), size)
                done = min(size, left)
                left -= done
                report(done)
            report(left)
        shard.finish()
