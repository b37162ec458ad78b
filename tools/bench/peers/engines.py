"""The decoders of pst-ds and llama.cpp behind one interface, their timed tasks, and the table of contestants."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pst_ds.errors import InputError

PEER = (
    "llama.cpp needs the package llama-cpp-python, which is not installed: pip install 'pst-ds[peers]', with "
    "CMAKE_ARGS=-DGGML_NATIVE=ON and --no-binary llama-cpp-python, so that it is built for this processor"
)


SEQUENCES = 8


class Engine(Protocol):
    """A decoder with :data:`SEQUENCES` sequences and their caches; methods without a number use the first one."""

    def use(self, threads: int) -> None:
        """Set the number of threads."""

    def reset(self, length: int) -> None:
        """Truncate the cache to its first ``length`` tokens."""

    def forward(self, ids: Sequence[int]) -> Callable[[], NDArray[np.float32]]:
        """Append ``ids`` and compute the logits of the last one. Return a function that copies them: (vocabulary,)."""

    def step(self, token: int, position: int, sequences: int) -> None:
        """Append ``token`` at ``position`` to each of the first ``sequences`` in one pass, and compute logits for all.

        Later positions of these sequences are dropped.
        """

    def spread(self, length: int) -> None:
        """Replace the tokens of all other sequences with the first ``length`` ones of the first sequence."""

    def all_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Empty the cache, append ``ids`` and return the logits of each: (len(ids), vocabulary)."""


class PstDs:
    """A model folder in the decoder of pst-ds."""

    def __init__(self, folder: Path, context: int, prompt_bits: int = 16) -> None:
        import torch

        from pst_ds.inference.decoder import Decoder

        torch.set_num_threads(1)  # for what is outside the native loop: rows of the embedding
        self._decoder = Decoder.from_pretrained(
            folder, context=context, threads=1, verify=False, prompt_bits=prompt_bits, sequences=SEQUENCES
        )

    def use(self, threads: int) -> None:
        self._decoder.threads = threads

    def reset(self, length: int) -> None:
        self._decoder.reset(length)

    def forward(self, ids: Sequence[int]) -> Callable[[], NDArray[np.float32]]:
        logits = self._decoder.forward(list(ids))
        return lambda: logits.numpy().copy()

    def step(self, token: int, position: int, sequences: int) -> None:
        for number in range(sequences):
            self._decoder.reset(position, number)
        self._decoder.step([token] * sequences)

    def spread(self, length: int) -> None:
        for number in range(1, SEQUENCES):
            self._decoder.copy(0, number, length)

    def all_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._decoder.reset(0)
        return self._decoder.forward(list(ids), all_logits=True).numpy()


class Transformers:
    """A dense model folder in transformers, computed in fp32, from which others are measured."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def use(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def all_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
        return found


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C interface."""

    def __init__(self, file: Path, context: int) -> None:
        self._library = library = llama_cpp()
        model_settings = library.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(file).encode(), model_settings)
        settings = library.llama_context_default_params()
        settings.n_batch = settings.n_ubatch = context
        settings.n_ctx, settings.n_seq_max = SEQUENCES * context, SEQUENCES
        settings.n_threads = settings.n_threads_batch = 1
        self._context = library.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise InputError(f"{file}: llama.cpp cannot read it. Remove it, so that it is written again.")
        self._memory = library.llama_get_memory(self._context)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def use(self, threads: int) -> None:
        self._library.llama_set_n_threads(self._context, threads, threads)

    def reset(self, length: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, 0, length, -1)

    def forward(self, ids: Sequence[int]) -> Callable[[], NDArray[np.float32]]:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        self._decode(self._library.llama_batch_get_one(tokens, len(ids)))
        return lambda: self._logits(-1)

    def step(self, token: int, position: int, sequences: int) -> None:
        for number in range(sequences):
            self._library.llama_memory_seq_rm(self._memory, number, position, -1)
        with self._batch([(token, position, number) for number in range(sequences)]) as batch:
            self._decode(batch)

    def spread(self, length: int) -> None:
        self.reset(length)
        for number in range(1, SEQUENCES):
            self._library.llama_memory_seq_rm(self._memory, number, -1, -1)
            # llama.cpp copies only whole sequences
            self._library.llama_memory_seq_cp(self._memory, 0, number, -1, -1)

    def all_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.reset(0)
        with self._batch([(token, at, 0) for at, token in enumerate(ids)]) as batch:
            self._decode(batch)
            return np.stack([self._logits(at) for at in range(len(ids))])

    @contextmanager
    def _batch(self, tokens: Sequence[tuple[int, int, int]]) -> Iterator[Any]:
        """Yield a batch of (token, position, sequence) whose logits are all computed."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, (token, position, sequence) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, 1
            batch.seq_id[at][0] = sequence
        try:
            yield batch
        finally:
            self._library.llama_batch_free(batch)

    def _decode(self, batch: Any) -> None:
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._library.llama_synchronize(self._context)

    def _logits(self, at: int) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, at), (self._vocabulary,)).copy()


def llama_cpp() -> Any:
    """Return the package with logging of errors only. Raises InputError if it is not installed."""
    try:
        library = importlib.import_module("llama_cpp")
    except ImportError:
        raise InputError(PEER) from None
    library.llama_log_set(_errors_only(library), None)
    library.llama_backend_init()
    return library


_KEPT: list[Any] = []
"""Callbacks that llama.cpp refers to, kept alive."""


def _errors_only(library: Any) -> Any:
    if not _KEPT:
        error = 4  # GGML_LOG_LEVEL_ERROR

        @library.llama_log_callback
        def write(level: int, text: bytes, _: Any) -> None:
            if level == error:
                print(text.decode(errors="replace"), end="", flush=True)

        _KEPT.append(write)
    return _KEPT[0]


def decode_rate(engine: Engine, threads: int, prompt: Sequence[int], following: Sequence[int]) -> float:
    """Return tokens per second of ``following``, one per call, with ``prompt`` in the cache already."""
    engine.use(threads)
    engine.reset(0)
    engine.forward(prompt)
    engine.forward(following[:1])
    engine.reset(len(prompt))
    start = time.perf_counter()
    for token in following:
        engine.forward([token])
    return len(following) / (time.perf_counter() - start)


def batch_rate(engine: Engine, threads: int, prompt: Sequence[int], following: Sequence[int]) -> float:
    """Return tokens per second of all :data:`SEQUENCES` sequences together, as in :func:`decode_rate`."""
    engine.use(threads)
    for position, token in enumerate([*prompt, following[0]]):
        engine.step(token, position, SEQUENCES)
    start = time.perf_counter()
    for position, token in enumerate(following, len(prompt)):
        engine.step(token, position, SEQUENCES)
    return SEQUENCES * len(following) / (time.perf_counter() - start)


def prefill_rate(engine: Engine, threads: int, prompt: Sequence[int]) -> float:
    """Return tokens per second of ``prompt``, in one call with an empty cache."""
    engine.use(threads)
    engine.reset(0)
    start = time.perf_counter()
    engine.forward(prompt)
    return len(prompt) / (time.perf_counter() - start)


def print_by_contestant(
    rows: list[dict[str, Any]],
    measure: str,
    unit: str,
    column: Callable[[dict[str, Any]], str],
    *,
    quality: str,
    shown: str,
) -> None:
    """Print a Markdown table with a row per contestant: megabytes, quality, and ``measure`` per column of the rows."""
    columns = list(dict.fromkeys(map(column, rows)))
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["contestant"], {})[column(row)] = row
    print(f"| {unit} | MB | {quality} | {' | '.join(columns)} |\n|---|{'---|' * (len(columns) + 2)}")
    for name, cells in by_name.items():
        one = next(iter(cells.values()))
        known = one["quality"][quality]
        values = " | ".join(f"{cells[head][measure]:.1f}" for head in columns)
        print(f"| {name} | {one['file_bytes'] / 1e6:.1f} | {'-' if known is None else f'{known:{shown}}'} | {values} |")
