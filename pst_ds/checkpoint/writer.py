"""Write portable checkpoints: every rank writes its part, in a thread, while training continues."""

import hashlib
import itertools
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from pst_ds.atomic_files import PARTIAL, publish, sync, write_new, write_pieces
from pst_ds.checkpoint.format import (
    MANIFEST,
    MASK,
    SCALES,
    SUMS,
    CheckpointState,
    Contents,
    manifest_bytes,
    most_bytes,
    sums_text,
)
from pst_ds.checkpoint.restore import model_grids, scale_shapes, trainable
from pst_ds.checkpoint.shards import shard_name
from pst_ds.core.bits import pack_shard, shard_bytes, shard_range, unpack_range
from pst_ds.formats.safetensors_file import header_and_slots, tensor_bytes
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.parallel.store import StoreGroup


@dataclass(frozen=True, slots=True)
class SaveResult:
    """The outcome of a save; the same on every rank."""

    name: str
    bytes: int
    """Size of all files."""
    blocked_seconds: float
    """Time for which this rank's training thread was blocked."""
    error: str = ""
    """Why the checkpoint was not written, or ``when_written`` failed, with the rank; empty after success."""


class _Report(TypedDict):
    """A rank's report on the file that it has written; JSON, as a StoreGroup sends it."""

    error: str
    file: str
    digest: str
    """SHA-256 of the file."""
    bytes: int
    cuts: list[tuple[int, int, int]]
    steps: dict[str, int]


class OwnPart:
    """This rank's part of a checkpoint: 12 bytes per trainable value, mask bits, and bytes of quantisation scales."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._named = trainable(engine.module)
        self._layers = pst_layers(engine.module)
        self.tensors: dict[str, list[Tensor]] = {}
        """Pieces of each tensor of the file, by name: flat, of one dtype, at least one each, in the file's order."""
        self.steps: dict[str, int] = {}
        """Adam's step count of each parameter that this rank has values of."""
        self.cuts: list[tuple[int, int, int]] = []
        """(index of the parameter, start, stop) of its values; empty if all parameters are divided evenly."""
        self._copies: dict[str, Tensor] = {}

    def update(self, *, copies: bool) -> None:
        """Copy the engine's values to host memory, which is kept for the next copy, or refer to its tensors.

        Not collective.
        """
        trained = [param for _, param in self._named]
        fragments = optimizer_state.local_fragments(self._engine, self._named)
        if optimizer_state.is_replicated(trained):
            # Every rank has all values. Each writes the share that it would hold under ZeRO-3, so that no value is
            # stored twice and the files are cut evenly.
            fragments = [fragment.cut(*_even_share(fragment.stop)) for fragment in fragments]
        tensors: dict[str, list[Tensor]] = {}
        for kind in optimizer_state.KINDS:
            tensors[kind] = optimizer_state.values(self._engine, fragments, kind)
        masks: list[Tensor] = []
        scales: list[Tensor] = []
        for layer in self._layers.values():
            masks.append(_mask_share(layer))
            if layer.pst_scales is not None:
                scales.append(_scale_share(layer.pst_scales))
        tensors[MASK] = masks
        if scales:
            tensors[SCALES] = scales
        self.tensors = {}
        for name, pieces in tensors.items():
            # ZeRO-1 and 2 may leave a rank without values.
            self.tensors[name] = self._copied(name, pieces) if copies else _at_least_one(name, pieces)
        self.steps = optimizer_state.adam_steps(self._engine, fragments)
        self.cuts = []
        if not optimizer_state.is_cut_evenly(trained):
            index = {name: i for i, (name, _) in enumerate(self._named)}
            for fragment in fragments:
                self.cuts.append((index[fragment.name], fragment.start, fragment.stop))

    def _copied(self, name: str, pieces: list[Tensor]) -> list[Tensor]:
        """Return one tensor on the CPU with the values of ``pieces``, in memory that the next copy uses again."""
        sizes = list(map(Tensor.numel, pieces))
        if name not in self._copies or self._copies[name].numel() != sum(sizes):
            self._copies[name] = torch.empty(sum(sizes), dtype=_dtype_of(name))
        if pieces:  # one call for all: hundreds of small copies would block training for longer
            torch._foreach_copy_(list(self._copies[name].split(sizes)), pieces)
        return [self._copies[name]]


def _dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a tensor of the file."""
    return torch.uint8 if name in (MASK, SCALES) else torch.float32


def _at_least_one(name: str, pieces: list[Tensor]) -> list[Tensor]:
    """Return ``pieces``, or an empty tensor if there are none: the file needs a dtype."""
    return pieces or [torch.empty(0, dtype=_dtype_of(name))]


class CheckpointWriter:
    """Saves checkpoints of one engine into ``folder``, one after another. Creating a writer is collective.

    :meth:`save` copies this rank's part and returns. A thread writes it, exchanges reports with the other ranks, and
    renames the folder once everything is on disk.
    """

    def __init__(self, folder: Path, engine: Engine):
        self._folder = folder
        self._model = engine.module
        self._part = OwnPart(engine)
        # Threads of several ranks meet in the rendezvous store: collectives of torch.distributed belong to the training
        # threads, and would mix with theirs.
        self._group = StoreGroup()
        self._thread: threading.Thread | None = None
        self._outcome: SaveResult | None = None

    def save(
        self,
        name: str,
        state: CheckpointState,
        *,
        copies: bool = True,
        when_written: Callable[[], None] = lambda: None,
        when_known: Callable[[], None] = lambda: None,
    ) -> None:
        """Start to write ``folder/name``, after waiting for a save that is still being written. Collective.

        Without ``copies`` the engine's tensors are written, and nothing may change them until :meth:`wait` has returned
        the result. ``when_written`` is called on rank 0, in the thread, once the checkpoint is complete, and then
        ``when_known`` on every rank.
        """
        start = time.perf_counter()
        self.wait()  # the thread reads the memory that the next line overwrites
        self._part.update(copies=copies)
        self._thread = threading.Thread(target=self._write, args=(name, state, when_written, when_known), daemon=True)
        self._blocked = time.perf_counter() - start
        self._thread.start()

    def wait(self, timeout: float | None = None) -> SaveResult | None:
        """Wait at most ``timeout`` seconds for the last save; return its result once, or None."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return None
            self._thread = None
        outcome = self._outcome
        self._outcome = None
        return outcome

    def _write(
        self, name: str, state: CheckpointState, when_written: Callable[[], None], when_known: Callable[[], None]
    ) -> None:
        """Write ``folder/name`` atomically, and note the outcome.

        Collective over the threads of all ranks. The checkpoint may be complete even if ``when_written`` failed.
        """
        partial = self._folder / (name + PARTIAL)
        is_complete = False

        def finish(reports: Sequence[_Report]) -> tuple[str, int]:
            nonlocal is_complete
            problem = _first_error(reports)
            size = 0
            if not problem:
                problem, size = self._finish(partial, name, state, reports, when_written)
            if problem:
                shutil.rmtree(partial, ignore_errors=True)
            is_complete = not problem
            return problem, size

        try:
            problem, size = self._group.decide(_write_shard(partial, self._part), finish)
        except Exception as error:  # the exchange failed: another rank is gone, which training will notice
            # Rank 0 may have renamed the folder before its answer was lost: the checkpoint is then good.
            problem = "" if is_complete else _in_words(error)
            size = 0
        if not problem:
            when_known()
        self._outcome = SaveResult(name, size, self._blocked, problem)

    def _finish(
        self, partial: Path, name: str, state: CheckpointState, reports: Sequence[_Report], done: Callable[[], None]
    ) -> tuple[str, int]:
        """Write the manifest and the sums, and rename the folder; return (problem, bytes). Called on rank 0."""
        try:
            sums: dict[str, str] = {}
            size = 0
            for report in reports:
                sums[report["file"]] = report["digest"]
                size += report["bytes"]
            manifest = manifest_bytes(state, _contents(self._model, reports))
            sums[MANIFEST] = hashlib.sha256(manifest).hexdigest()
            for path in partial.iterdir():  # left by a killed save on another number of ranks
                if path.name not in sums:
                    path.unlink()
            write_new(partial / MANIFEST, manifest)
            listing = sums_text(sums).encode()
            write_new(partial / SUMS, listing)
            # Every file is on disk before the folder gets its name, and the name before anyone hears of it.
            publish(partial, self._folder / name)
            sync(self._folder)
            done()
        except Exception as error:
            return f"rank 0: {_in_words(error)}", 0
        return "", size + len(manifest) + len(listing)


def _first_error(reports: Sequence[_Report]) -> str:
    """Return the error of the first rank that has one, with its number; "" if all have succeeded."""
    for i, report in enumerate(reports):
        if report["error"]:
            return f"rank {i}: {report['error']}"
    return ""


def _mask_share(layer: PSTLayer) -> Tensor:
    """Return the bits of this rank's shard of a mask in one shard per rank."""
    bits = layer.pst_mask
    numel = layer.layout.numel
    if sharding.is_partitioned(bits):
        return sharding.shard_of(bits).values
    start, stop = _even_share(numel)
    num_bytes = shard_bytes(numel, world_size())
    # A share of whole bytes of an undivided mask is a slice of it. Others start inside a byte, or end in one that also
    # has bits of the next share, and are packed again.
    if layer.num_shards == 1 and start % 8 == 0 and stop - start == 8 * num_bytes:
        return bits.detach().view(-1)[start // 8 : start // 8 + num_bytes]
    return pack_shard(unpack_range(bits.detach(), numel, layer.num_shards, start, stop), num_bytes)


def _scale_share(param: nn.Parameter) -> Tensor:
    """Return the bytes of this rank's share of a layer's scales."""
    if sharding.is_partitioned(param):
        return sharding.shard_of(param).values
    return param.detach()[slice(*_even_share(param.numel()))]


def _even_share(numel: int) -> tuple[int, int]:
    """Return (start, stop) of this rank's share of ``numel`` values, as ZeRO-3 divides them."""
    return shard_range(numel, world_size(), rank())


def _write_shard(partial: Path, part: OwnPart) -> _Report:
    """Write this rank's file into ``partial``, and return a report."""
    file = shard_name(rank(), world_size())
    digest = ""
    size = 0
    error = ""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, pieces in part.tensors.items():
            kinds[name] = pieces[0].dtype, (sum(map(Tensor.numel, pieces)),)
        header, slots, size = header_and_slots(kinds)
        pieces_in_order = itertools.chain.from_iterable(part.tensors[name] for name in slots)
        # A generator: without copies, one piece at a time comes from the device.
        data = (tensor_bytes(piece.cpu()) for piece in pieces_in_order)
        digest = write_pieces(partial / file, itertools.chain([header], data))
    except Exception as failure:  # also MemoryError: the others wait for a report
        error = _in_words(failure)
    return {"error": error, "file": file, "digest": digest, "bytes": size, "cuts": part.cuts, "steps": part.steps}


def _contents(model: nn.Module, reports: Sequence[_Report]) -> Contents:
    """Return what the checkpoint contains, from the reports of all ranks. Not collective: called in rank 0's thread."""
    trained: dict[str, tuple[int, ...]] = {}
    steps: dict[str, int] = {}
    for name, param in trainable(model):
        trained[name] = tuple(sharding.full_shape(param))
        steps[name] = 0  # for a parameter of which no rank reports values
    for report in reports:
        steps |= report["steps"]
    masks: dict[str, int] = {}
    parts: dict[str, int] = {}
    for name, layer in pst_layers(model).items():
        masks[name] = layer.whole_layout.numel
        if layer.group is not None:
            parts[name] = layer.group.degree
    cuts = [report["cuts"] for report in reports]
    return Contents(
        num_shards=len(reports),
        trained=trained,
        masks=masks,
        steps=steps,
        cuts=cuts if any(cuts) else None,
        grid=model_grids(model)["grid"],
        scales=scale_shapes(model),
        parts=parts,
    )


def size_limit(model: nn.Module) -> int:
    """Return the bytes that a checkpoint of ``model`` may take."""
    trained = 0
    for _, param in trainable(model):
        trained += sharding.full_numel(param)
    weights = 0
    for layer in pst_layers(model).values():
        weights += layer.whole_layout.numel
    scales = sum(map(math.prod, scale_shapes(model).values()))
    return most_bytes(trained, weights, scales)


def _in_words(error: Exception) -> str:
    """Return what an error says; the text of an OSError names its kind already."""
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"
