"""Decoding speed at the shapes of Llama 1.2 B, 3 B and 8 B with random weights, compared with the memory's bandwidth.

    python -m tools.bench.shapes --model 1.2B --threads 1 2
    python -m tools.bench.shapes --model 8B --only "50 % int4" Q4_0 --json

Packed weights of pst-ds against llama.cpp's Q8_0, Q4_0 and Q4_K_M, which need the extra `peers`; without it, only
pst-ds is measured. Weights are random, so results say nothing about accuracy. Contestants are processes that are all
open and take turns; numbers are medians. A model that does not fit next to the others is measured with `--only`.

Tasks: "prompt" is one prompt with an empty cache; "decode" continues it one token per pass; "decode8" does so with
eight sequences per pass. A pass reads all weights, and the keys and values of all positions. Its bytes per second are
divided by those that reading, and copying (read and written bytes), a large buffer reaches between the same turns.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pst_ds.errors import InputError
from pst_ds.inference.decoder import Decoder
from pst_ds.runtime.native_loop import LEVELS, best_level
from tools.bench.peers import engines
from tools.bench.peers.random_models import GGUF_KINDS, OURS, SHAPES, Shape, gguf_bytes, random_table, write_gguf
from tools.bench.ranks import REST_SECONDS, Worker, working
from tools.bench.timing import benchmark_parser, conditions, print_result, progress

PRELOAD = ("pst_ds.inference.decoder", "tools.bench.peers.random_models", "tools.bench.peers.engines")
"""Modules imported once for all processes."""
MEMORY = "memory"
"""Name of the process that measures the bandwidth."""
TASKS = ("prompt", "decode", "decode8")
SEQUENCES = {"decode": 1, "decode8": engines.SEQUENCES}
_PASSES_OVER_MEMORY = 3


def main() -> None:
    arguments = _parser().parse_args()
    rows: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    kinds = _gguf_kinds(arguments.only)
    for name in arguments.model:
        shape = SHAPES[name]
        shape = replace(
            shape, layers=arguments.layers or shape.layers, vocabulary=arguments.vocabulary or shape.vocabulary
        )
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="shapes-") as folder:
            speeds, bandwidths = measure(shape, kinds, Path(folder), arguments)
        rows += [{"model": name, "layers": shape.layers, **row} for row in speeds]
        memory += [{"model": name, **row} for row in bandwidths]
    stated = conditions(
        instructions=LEVELS[best_level()],
        weights="random",
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        buffer_megabytes=arguments.buffer_megabytes,
        clock="wall, medians, contestants in turn",
    )
    stated["threads_per_rank"] = arguments.threads
    report = {"benchmark": "shapes", "conditions": stated, "memory": memory, "rows": rows}
    print_result(report, as_json=arguments.json)


def _gguf_kinds(only: Sequence[str]) -> list[str]:
    """Return the wanted kinds of GGUF files; none, with a message, if llama.cpp is not installed."""
    wanted = [kind for kind in GGUF_KINDS if _is_wanted(f"llama.cpp {kind}", only)]
    if wanted:
        try:
            engines.llama_cpp()
        except InputError as error:
            progress(f"only pst-ds is measured: {error}")
            return []
    return wanted


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(part in name for part in only)


class RandomModel(engines.PstDs):
    """A decoder of pst-ds with random weights."""

    def __init__(self, shape: Shape, kind: str, context: int):
        torch.set_num_threads(1)
        table = random_table(shape, OURS[kind], context)
        self._decoder = Decoder(table, threads=1, sequences=engines.SEQUENCES)
        self.read_bytes = table.weight_bytes
        """Bytes of weights that a pass reads."""
        rows = table.embedding.rows
        # a token reads one row of the embedding
        self.held_bytes = self.read_bytes + rows.numel() * rows.element_size()


class Memory:
    """Two large buffers in huge pages, like the weights."""

    def __init__(self, size: int):
        self._size = size
        self._library = ctypes.CDLL(None)
        self._library.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._maps = [mmap.mmap(-1, size) for _ in range(2)]
        for mapped in self._maps:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapped.madvise(mmap.MADV_HUGEPAGE)
        self._starts = [ctypes.addressof(ctypes.c_char.from_buffer(mapped)) for mapped in self._maps]
        for start in self._starts:
            # a page that was never written is shared, and would be read from a cache
            ctypes.memset(start, 1, size)

    def read_bandwidth(self, threads: int) -> float:
        """Return bytes read per second by the faster of two functions that only read.

        Which one is faster depends on the processor: ``memcmp`` has two streams of addresses, the largest value has
        one stream and more bytes in flight. On a Zen 4 core they reach 24 and 34 GB/s.
        """
        passes = [self._passes_per_second(threads, read) for read in (self._compare, self._largest)]
        return self._size * max(passes)

    def copy_bandwidth(self, threads: int) -> float:
        """Return bytes read and written per second of ``memmove``."""
        return 2 * self._size * self._passes_per_second(threads, self._copy)

    def _compare(self, at: int, size: int) -> None:
        half = size // 2
        first = self._starts[0] + at
        difference = self._library.memcmp(first, first + half, half)
        # otherwise it stopped early
        assert difference == 0

    def _largest(self, at: int, size: int) -> None:
        numbers = torch.frombuffer(self._maps[0], dtype=torch.int32, count=size // 4, offset=at)
        torch.amax(numbers)

    def _copy(self, at: int, size: int) -> None:
        ctypes.memmove(self._starts[1] + at, self._starts[0] + at, size)

    def _passes_per_second(self, threads: int, work: Callable[..., None]) -> float:
        # ctypes releases the interpreter's lock
        part = self._size // threads // 64 * 64
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            for _ in range(_PASSES_OVER_MEMORY):
                list(pool.map(partial(work, size=part), range(0, part * threads, part)))
            return _PASSES_OVER_MEMORY / (time.perf_counter() - start)


def measure(
    shape: Shape, kinds: Sequence[str], folder: Path, arguments: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row per contestant, number of threads and task, and the bandwidths per number of threads.

    ``folder``: where GGUF files of the ``kinds`` are written.
    """
    context = arguments.prompt_tokens + arguments.new_tokens + 8
    openers: dict[str, Callable[[], Any]] = {MEMORY: partial(Memory, arguments.buffer_megabytes << 20)}
    bytes_of: dict[str, tuple[int, int]] = {}
    for kind in OURS:
        if _is_wanted(f"pst-ds {kind}", arguments.only):
            openers[f"pst-ds {kind}"] = partial(RandomModel, shape, kind, context)
    for kind in kinds:
        file = folder / f"{kind}.gguf"
        progress(f"writing {file}")
        write_gguf(shape, kind, file, context)
        openers[f"llama.cpp {kind}"] = partial(engines.LlamaCpp, file, context)
        bytes_of[f"llama.cpp {kind}"] = gguf_bytes(shape, kind)
    rows: list[dict[str, Any]] = []
    bandwidths: list[dict[str, Any]] = []
    progress(f"opening {len(openers) - 1} models")
    with working(openers, max(arguments.threads), preload=PRELOAD) as workers:
        for name, worker in workers.items():
            if name.startswith("pst-ds"):
                bytes_of[name] = worker.ask(_held_and_read)
        for threads in arguments.threads:
            progress(f"{threads} threads")
            medians = _in_turn(workers, threads, arguments)
            read = medians[MEMORY, "read"]
            copy = medians[MEMORY, "copy"]
            bandwidths.append({"threads": threads, "read_gb_per_second": read / 1e9, "copy_gb_per_second": copy / 1e9})
            for (name, task), rate in medians.items():
                if name == MEMORY:
                    continue
                row = _row(shape, task, rate, bytes_of[name], arguments)
                if task in SEQUENCES:
                    row["share_of_read"] = row["gb_per_second"] * 1e9 / read
                    row["share_of_copy"] = row["gb_per_second"] * 1e9 / copy
                rows.append({"contestant": name, "threads": threads, **row})
    return rows, bandwidths


def _row(shape: Shape, task: str, rate: float, held_and_read: tuple[int, int], arguments: Any) -> dict[str, Any]:
    """Describe the speed of a task, ``rate`` tokens per second, and for decoding the bytes that it reads."""
    held, weight_bytes = held_and_read
    row: dict[str, Any] = {"task": task, "tokens_per_second": rate, "megabytes": held / 1e6}
    if task in SEQUENCES:
        sequences = SEQUENCES[task]
        # positions differ from pass to pass: their mean
        positions = arguments.prompt_tokens + arguments.new_tokens / 2
        pass_bytes = weight_bytes + sequences * shape.position_bytes * positions
        row["megabytes_per_pass"] = pass_bytes / 1e6
        row["gb_per_second"] = pass_bytes * rate / sequences / 1e9
    return row


def _held_and_read(model: RandomModel) -> tuple[int, int]:
    return model.held_bytes, model.read_bytes


def _in_turn(workers: dict[str, Worker], threads: int, arguments: Any) -> dict[tuple[str, str], float]:
    """Return the median over the rounds of each contestant's rate in each task, after a warm-up round."""
    generator = torch.Generator().manual_seed(0)
    most = arguments.vocabulary or min(SHAPES[name].vocabulary for name in arguments.model)
    ids = torch.randint(0, most, (arguments.prompt_tokens + arguments.new_tokens,), generator=generator).tolist()
    prompt = ids[: arguments.prompt_tokens]
    following = ids[arguments.prompt_tokens :]
    measured: dict[tuple[str, str], list[float]] = {}
    for counted in range(arguments.repeats + 1):
        for name, worker in workers.items():
            if name == MEMORY:
                rates = worker.ask(_bandwidths, threads)
            else:
                rates = worker.ask(_rates, threads, prompt, following, arguments.tasks)
            for task, rate in rates.items():
                # the first round only warms up
                if counted:
                    measured.setdefault((name, task), []).append(rate)
            time.sleep(REST_SECONDS)
    return {key: statistics.median(rates) for key, rates in measured.items()}


def _bandwidths(memory: Memory, threads: int) -> dict[str, float]:
    return {"read": memory.read_bandwidth(threads), "copy": memory.copy_bandwidth(threads)}


def _rates(
    engine: engines.Engine, threads: int, prompt: Sequence[int], following: Sequence[int], tasks: Sequence[str]
) -> dict[str, float]:
    """Return tokens per second of each task."""
    # also fills the cache for the other tasks
    rates = {"prompt": engines.prefill_rate(engine, threads, prompt)}
    if "decode" in tasks:
        start = time.perf_counter()
        for token in following:
            engine.forward([token])
        rates["decode"] = len(following) / (time.perf_counter() - start)
    if "decode8" in tasks:
        engine.reset(len(prompt))
        engine.spread(len(prompt))
        start = time.perf_counter()
        for position, token in enumerate(following, len(prompt)):
            engine.step(token, position, engines.SEQUENCES)
        rates["decode8"] = engines.SEQUENCES * len(following) / (time.perf_counter() - start)
    return {task: rate for task, rate in rates.items() if task in tasks}


def _parser() -> ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["1.2B"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick check")
    parser.add_argument("--vocabulary", type=int, help="another number of tokens than the model has")
    parser.add_argument("--only", nargs="+", default=[], help="contestants with one of these in their name")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--buffer-megabytes", type=int, default=1024, help="memory read, and copied, for the bandwidth")
    parser.add_argument(
        "--folder", type=Path, help="where GGUF files are written for the run (default: a temporary one)"
    )
    return parser


if __name__ == "__main__":
    main()
