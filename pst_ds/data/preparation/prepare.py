"""Tokenise sources into a store in several processes. An interrupted preparation resumes to the same bytes."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING

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
from pst_ds.data.preparation.pieces import Piece, Reading, Span, find_pieces
from pst_ds.data.preparation.readers import texts_of, tokenize_texts
from pst_ds.data.tokens.store import (
    BYTES,
    LEARNED,
    MANIFEST,
    Manifest,
    ShardRecord,
    ShardWriter,
    clean_up,
    finish_store,
    finished_shard,
    read_manifest,
)
from pst_ds.data.tokens.tokenize import TokenizerIdentity, bytes_of_texts, identity_of
from pst_ds.errors import InputError
from pst_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE_BYTES = 64 << 20
"""Bytes of text per shard."""
PLAN = "plan"
Task = Callable[[int, Callable[[int], None]], None]
"""Does the task of a number, and reports how much of it was done since its last report."""
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_STOPPED = -1
"""Value of the progress counter that makes all workers stop at their next report."""
_worker: tuple[Task, Synchronized[int]]
"""Task and progress counter of this process, if it is a worker."""


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
        files: dict[str, None] = {}  # each once, in order
        for span in self._spans:
            if span.kind == "text" and not span.compression and "://" not in span.path:
                files[span.path] = None
        return [Path(path) for path in files]

    @property
    def _spans(self) -> Iterator[Span]:
        """The parts of files of all pieces, in order."""
        for piece in self.pieces:
            yield from piece

    @property
    def num_bytes(self) -> int:
        """Approximate bytes to read."""
        return sum(span.num_bytes for span in self._spans)

    @property
    def key(self) -> str:
        """Hash of everything that determines the store. File times and sizes represent the contents."""
        paths = dict.fromkeys(span.path for span in self._spans)
        # a URL or a dataset on the hub has no time
        times: list[int] = []
        for path in map(Path, paths):
            if path.exists():
                times.append(path.stat().st_mtime_ns)
        pieces: list[list[dict[str, object]]] = []
        for piece in self.pieces:
            pieces.append([asdict(span) for span in piece])
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
    """Write the store of ``plan`` to the folder ``out`` atomically. Resumes an unfinished preparation of the same plan;
    ``force`` starts over, and replaces an existing store. Raises InputError."""
    require_writable(out, f"out = {str(out)!r}")
    unfinished = out.with_name(out.name + PARTIAL)
    with only_writer(out.with_name(f".{out.name}{LOCK}"), f"prepare {out}"):
        restore_replaced(out)
        if out.is_dir() and any(out.iterdir()):
            if not (out / MANIFEST).is_file():
                raise InputError(f"out = {str(out)!r} is a folder with other files. Name a new one")
            if not force:
                raise InputError(
                    f"out = {str(out)!r} is a finished store. Replace it with force = true, or name another"
                )
        _take_over(unfinished, plan.key, force=force)
        # with a manifest, only publishing was interrupted
        if not (unfinished / MANIFEST).is_file():
            try:
                write_pieces(plan, tokenizer, unfinished, num_workers)
            except InputError:
                # without a finished shard there is nothing to continue from
                if not _has_finished_shard(plan, unfinished):
                    shutil.rmtree(unfinished)
                raise
        manifest = read_manifest(unfinished)
        clean_up(unfinished, manifest)
        if not manifest.counts["tokens"]:
            shutil.rmtree(unfinished)
            raise InputError(f"{', '.join(plan.sources)}: there is only white space. Name files with text")
        publish(unfinished, out)
    return manifest


def _has_finished_shard(plan: Preparation, folder: Path) -> bool:
    return any(finished_shard(folder, number, plan.tokenizer.dtype) for number in range(len(plan.pieces)))


def write_pieces(plan: Preparation, tokenizer: Tokenizer, folder: Path, num_workers: int = 1) -> None:
    """Write the missing shards, then the manifest. Raises InputError."""
    dtype = plan.tokenizer.dtype
    missing: list[int] = []
    num_done_bytes = 0
    for number, piece in enumerate(plan.pieces):
        if finished_shard(folder, number, dtype) is None:
            missing.append(number)
        else:
            num_done_bytes += sum(span.num_bytes for span in piece)
    with Progress("tokenize", plan.num_bytes, "bytes", done=num_done_bytes) as progress:
        run_tasks(partial(_tokenize_piece, plan, tokenizer, folder), missing, num_workers, progress.add)
    records: list[ShardRecord] = []
    for number in range(len(plan.pieces)):
        record = finished_shard(folder, number, dtype)
        if record is not None:
            records.append(record)
    finish_store(folder, plan.tokenizer, records, {"sources": list(plan.sources), **asdict(plan.reading)})


def _take_over(folder: Path, key: str, *, force: bool) -> None:
    """Create the folder of an unfinished preparation, or keep one with the same ``key``."""
    path = folder / PLAN
    if folder.is_dir() and not force and path.is_file():
        if path.read_text() != key:
            raise InputError(
                f"{folder} is an unfinished store of other sources, settings or tokenizer. Start over with "
                "force = true, or name another folder"
            )
        return
    # a finished store has no plan; only publishing it was interrupted
    if folder.is_dir() and (folder / MANIFEST).is_file() and not force:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text_atomic(path, key)
    sync(folder)


def _tokenize_piece(
    plan: Preparation, tokenizer: Tokenizer, folder: Path, number: int, report: Callable[[int], None]
) -> None:
    """Write the shard of a piece. ``report`` gets the bytes done since its last call."""
    reading = plan.reading
    kinds: set[str] = set()
    if plan.count_bytes:
        kinds = {BYTES}
    elif reading.kind == "chat":
        kinds = {LEARNED}
    with ShardWriter(folder, number, plan.tokenizer, frozenset(kinds)) as shard:
        for span in plan.pieces[number]:
            remaining = span.num_bytes
            for texts in texts_of(span, reading):
                num_bytes = bytes_of_texts(texts)
                documents = tokenize_texts(texts, reading, tokenizer, where=span.path, count=plan.count_bytes)
                shard.add(documents, num_bytes)
                # a span of a compressed file has more bytes of text than the file, which the progress counts
                done = min(num_bytes, remaining)
                remaining -= done
                report(done)
            report(remaining)
        shard.finish()


def run_tasks(task: Task, numbers: Sequence[int], num_workers: int, report: Callable[[int], None]) -> None:
    """Run ``task`` for all ``numbers``, in this process, or in up to ``num_workers`` forks if more than 1. Raises the
    InputError of a task, and RuntimeError if a worker fails otherwise or is killed."""
    num_workers = min(num_workers, len(numbers))
    if num_workers <= 1:
        for number in numbers:
            task(number, report)
        return
    # forks share the tokenizer and the plan without copying them
    context = multiprocessing.get_context("fork")
    done: Synchronized[int] = context.Value("q", 0)
    with ProcessPoolExecutor(num_workers, context, _become_worker, (task, done)) as pool:
        reported = 0
        waiting = {pool.submit(_run, number) for number in numbers}
        try:
            while waiting:
                finished, waiting = wait(waiting, _POLL_SECONDS, return_when=FIRST_EXCEPTION)
                now = done.value
                report(now - reported)
                reported = now
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker was killed. If memory ran out, use fewer workers; the same command resumes where it stopped"
            ) from None
        except InputError:
            raise
        except Exception as error:
            raise RuntimeError(f"a worker failed: {error!r}") from error
        finally:
            done.value = _STOPPED
            pool.shutdown(cancel_futures=True)


def _become_worker(task: Task, done: Synchronized[int]) -> None:
    """Set up a forked process, which gets its task and the progress counter once, not with each number."""
    global _worker
    # a garbage collection would touch, and so copy, all memory shared with the first process
    gc.freeze()
    # if the first process is killed, a worker would wait for tasks forever
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the first process receives Ctrl-C too, and stops the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = task, done


def _run(number: int) -> None:
    """Do the task of a number in a worker. Raises InterruptedError if another one failed."""
    task, done = _worker

    def report(count: int) -> None:
        with done.get_lock():
            # a pool cannot stop a task that has started: this ends it at its next report
            if done.value == _STOPPED:
                raise InterruptedError("another worker failed")
            done.value += count

    task(number, report)
