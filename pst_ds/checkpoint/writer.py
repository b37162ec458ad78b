"""Writes portable checkpoints: every rank writes its part, in a thread, while training continues."""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.atomic_files import PARTIAL, publish, sync, write_new
from pst_ds.checkpoint.format import (
    MANIFEST,
    MASK,
    SCALES,
    SUMS,
    CheckpointState,
    Contents,
    manifest_bytes,
    most_bytes,
    shard_name,
    sums_text,
)
from pst_ds.checkpoint.restore import grid_numbers, scale_shapes, trainable
from pst_ds.core.bits import pack_shard, shard_bytes, shard_range, unpack_range
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import optimizer_state, zero3
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.optimizer_state import Fragment
from pst_ds.parallel.ranks import BackgroundGroup, rank, world_size


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The outcome of a save; the same on every rank."""

    name: str
    bytes: int
    """Size of all files."""
    blocked_seconds: float
    """Time that this rank's training thread had to wait."""
    error: str = ""
    """Why there is no checkpoint, or why ``when_written`` failed, with the rank; empty after success."""


@dataclass(frozen=True, slots=True)
class _Report:
    """A rank's report on its part."""

    error: str
    digest: str
    bytes: int
    cuts: list[tuple[int, int, int]]
    steps: dict[str, int]


class CheckpointWriter:
    """Saves checkpoints of one engine into ``folder``, one at a time.

    :meth:`save` copies this rank's part (12 bytes for each trainable value, and its mask bits) and returns; a thread
    writes it, exchanges reports with the other ranks, and names the folder once everything is on disk. The memory of
    the copy is kept for the next save; while the file is made it takes twice as much again. Making a writer, and
    :meth:`save`, are collective.
    """

    def __init__(self, folder: Path, engine: Engine):
        self._folder, self._engine = folder, engine
        self._named = trainable(engine.module)
        self._layers = pst_layers(engine.module)
        self._group = BackgroundGroup()
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: SaveResult | None = None

    def save(self, name: str, state: CheckpointState, *, when_written: Callable[[], None] = lambda: None) -> None:
        """Start to write ``folder/name``, after waiting for a save that is still being written.

        ``when_written`` is called on rank 0, in the thread, once the checkpoint is there.
        """
        began = time.perf_counter()
        self.wait()
        held = self._own_fragments()
        self._copy_values(held)
        self._copy_masks()
        self._copy_scales()
        steps = optimizer_state.adam_steps(self._engine, held)
        self._thread = threading.Thread(target=self._run, args=(name, state, held, steps, when_written), daemon=True)
        self._blocked = time.perf_counter() - began
        self._thread.start()

    def wait(self, timeout: float | None = None) -> SaveResult | None:
        """Wait until nothing is being written; return the result of the last save, once."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return None
            self._thread = None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _own_fragments(self) -> list[Fragment]:
        held = optimizer_state.local_fragments(self._engine, self._named)
        if not optimizer_state.is_replicated(param for _, param in self._named):
            return held
        return [fragment.cut(*_even_share(fragment.stop)) for fragment in held]

    def _copy_values(self, held: list[Fragment]) -> None:
        sizes = [fragment.stop - fragment.start for fragment in held]
        for kind in optimizer_state.KINDS:
            parts = self._buffer(kind, sum(sizes), torch.float32).split(sizes)
            if held:  # ZeRO-1 and 2 may leave a rank with none
                torch._foreach_copy_(list(parts), optimizer_state.values(self._engine, held, kind))

    def _copy_masks(self) -> None:
        sizes = [shard_bytes(layer.layout.numel, world_size()) for layer in self._layers.values()]
        parts = self._buffer(MASK, sum(sizes), torch.uint8).split(sizes)
        for part, layer in zip(parts, self._layers.values(), strict=True):
            part.copy_(_mask_share(layer))

    def _copy_scales(self) -> None:
        shares = [_scale_share(param) for layer in self._layers.values() if (param := layer.pst_scales) is not None]
        if shares:
            parts = self._buffer(SCALES, sum(share.numel() for share in shares), torch.uint8)
            parts.copy_(torch.cat(shares))

    def _buffer(self, key: str, count: int, dtype: torch.dtype) -> Tensor:
        if key not in self._buffers or self._buffers[key].numel() != count:
            self._buffers[key] = torch.empty(count, dtype=dtype)
        return self._buffers[key]

    def _run(
        self, name: str, state: CheckpointState, held: list[Fragment], steps: dict[str, int], done: Callable[[], None]
    ) -> None:
        partial = self._folder / (name + PARTIAL)
        problem, size, is_there = "", 0, False
        try:
            reports = self._group.all_gather(self._write_shard(partial, held, steps))
            problem = next((f"rank {i}: {report.error}" for i, report in enumerate(reports) if report.error), "")
            if rank() == 0:
                if not problem:
                    problem, size = self._finish(partial, name, state, reports, done)
                if problem:
                    shutil.rmtree(partial, ignore_errors=True)
                is_there = not problem
            problem, size = self._group.all_gather((problem, size))[0]
        except Exception as error:  # of the exchange: another rank is gone, and this one will hear of it in training
            problem = "" if is_there else _in_words(error)
        self._outcome = SaveResult(name, size, self._blocked, problem)

    def _write_shard(self, partial: Path, held: list[Fragment], steps: dict[str, int]) -> _Report:
        from safetensors.torch import save

        cuts: list[tuple[int, int, int]] = []
        if not optimizer_state.is_cut_evenly(param for _, param in self._named):
            index = {name: i for i, (name, _) in enumerate(self._named)}
            cuts = [(index[fragment.name], fragment.start, fragment.stop) for fragment in held]
        try:
            partial.mkdir(parents=True, exist_ok=True)
            data = save(dict(self._buffers))
            digest = write_new(partial / shard_name(rank(), world_size()), data)
        except Exception as error:  # MemoryError too: who does not report leaves the others waiting
            return _Report(_in_words(error), "", 0, cuts, steps)
        return _Report("", digest, len(data), cuts, steps)

    def _finish(
        self, partial: Path, name: str, state: CheckpointState, reports: list[_Report], done: Callable[[], None]
    ) -> tuple[str, int]:
        """Write the manifest and the sums, and name the folder; return (problem, bytes)."""
        try:
            sums = {shard_name(i, len(reports)): report.digest for i, report in enumerate(reports)}
            manifest = manifest_bytes(state, self._contents(reports))
            sums[MANIFEST] = hashlib.sha256(manifest).hexdigest()
            for path in partial.iterdir():  # of a save by other ranks that was killed
                if path.name not in sums:
                    path.unlink()
            write_new(partial / MANIFEST, manifest)
            listing = sums_text(sums).encode()
            write_new(partial / SUMS, listing)
            publish(partial, self._folder / name)
            sync(self._folder)
            done()
        except Exception as error:
            return f"rank 0: {_in_words(error)}", 0
        return "", sum(report.bytes for report in reports) + len(manifest) + len(listing)

    def _contents(self, reports: list[_Report]) -> Contents:
        steps = {name: 0 for name, _ in self._named}
        for report in reports:
            steps |= report.steps
        cuts = [report.cuts for report in reports]
        return Contents(
            num_shards=len(reports),
            trained={name: tuple(zero3.full_shape(param)) for name, param in self._named},
            masks={name: layer.layout.numel for name, layer in self._layers.items()},
            steps=steps,
            cuts=cuts if any(cuts) else None,
            grid=grid_numbers(self._engine.module),
            scales=scale_shapes(self._engine.module),
        )


def save_checkpoint(folder: Path, engine: Engine, state: CheckpointState) -> None:
    """Write ``folder`` whole or not at all, and wait for it. Collective. Raises OSError on every rank."""
    writer = CheckpointWriter(folder.parent, engine)
    writer.save(folder.name, state)
    written = writer.wait()
    assert written is not None
    if written.error:
        raise OSError(f"{folder} could not be written: {written.error}")


def size_limit(model: nn.Module) -> int:
    """Return the bytes that a checkpoint of ``model`` may take."""
    trained = sum(zero3.full_numel(param) for _, param in trainable(model))
    weights = sum(layer.layout.numel for layer in pst_layers(model).values())
    return most_bytes(trained, weights, sum(map(math.prod, scale_shapes(model).values())))


def _mask_share(layer: PSTLayer) -> Tensor:
    """Return the bits of this rank's share of a mask: shard ``rank`` of as many as there are ranks."""
    bits, numel = layer.pst_mask, layer.layout.numel
    if zero3.is_partitioned(bits):
        return zero3.shard_of(bits).values
    start, stop = _even_share(numel)
    num_bytes = shard_bytes(numel, world_size())
    if layer.num_shards == 1 and start % 8 == 0 and stop - start == 8 * num_bytes:
        return bits.detach()[start // 8 : start // 8 + num_bytes]
    return pack_shard(unpack_range(bits.detach(), numel, layer.num_shards, start, stop), num_bytes)


def _scale_share(param: nn.Parameter) -> Tensor:
    """Return the bytes of this rank's share of a layer's scales."""
    if zero3.is_partitioned(param):
        return zero3.shard_of(param).values
    return param.detach()[slice(*_even_share(param.numel()))]


def _even_share(numel: int) -> tuple[int, int]:
    """Return (first, after the last) of this rank's share of ``numel`` values, as ZeRO-3 cuts them."""
    return shard_range(numel, world_size(), rank())


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
