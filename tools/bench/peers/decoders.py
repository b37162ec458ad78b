"""The sparse decoder compared with llama.cpp: tokens per second, file size and perplexity.

llama.cpp runs its quantisations of the dense model, pst-ds the same model packed by `pst-ds export`, dense and sparse,
in int8 and int4; two of them also with int8 activations for prompts. Every contestant has its own process, and they
take turns. All read the same tokens of the same text: 128 are in the cache when decoding starts, and the following
tokens are given, so that times exclude sampling. Task decode8 appends a token to each of eight sequences per pass, with
32 tokens in each cache when it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

from tools.bench.peers import decoder_files, engines, predictions
from tools.bench.ranks import medians_in_turn, working
from tools.bench.timing import progress

CONTEXT = 1024
"""Tokens that fit in the cache of each decoder."""
PROMPTS = "int8, prompts of 8 bits"
"""Label of our decoder with int8 activations for prompts."""
SHARES = (0.0, 0.5, 0.8, 0.9)
PRELOAD = ("pst_ds.inference.decoder", "tools.bench.peers.predictions", "tools.bench.peers.engines")
"""Modules imported once for all processes."""
TEXT = Path("runs/quality/data/brown-test.txt")
CHUNKS, CHUNK_TOKENS = 8, 512
RATIOS = {
    "decode_over_llamacpp": ("0/Q8_0/1", "50/Q8_0/1", "80/Q4_0/1", "80/Q4_0/2", "90/Q4_0/2"),
    "decode8_over_llamacpp": ("50/Q8_0/1", "50/Q4_0/1", "50/Q8_0/2", "50/Q4_0/2"),
    "prefill_over_llamacpp": ("80/Q4_0/1",),
    "prefill_8_bits_over_llamacpp": ("80/Q4_0/1",),
}
"""Reported speed-ups over llama.cpp: percent of sparsity / kind of its file / threads."""


@dataclass(frozen=True)
class Contestant:
    """A file and the engine that decodes it."""

    name: str
    path: Path
    engine: Callable[[Path, int], engines.Engine]
    """Called with the path and the capacity of the cache in tokens."""


@dataclass(frozen=True)
class Material:
    """Token ids that all contestants read."""

    prompt: list[int]
    following: list[int]
    chunks: list[list[int]]
    """Pieces of the text whose perplexity is measured."""


def measure(
    top: Path,
    *,
    threads: Sequence[int],
    repeats: int,
    only: Sequence[str] = (),
    new_tokens: int = 64,
    prompt_tokens: int = 128,
    text: Path = TEXT,
    quality: bool = True,
) -> list[dict[str, Any]]:
    """Return the rows of all contestants, or of those with a word of ``only`` in their name; make missing files.

    Raises InputError.
    """
    engines.llama_cpp()
    found = [one for one in contestants(top) if not only or any(part in one.name for part in only)]
    material = text_material(top, text, prompt_tokens, new_tokens)
    rows: list[dict[str, Any]] = []
    perplexity: dict[str, float] = {}
    openers = {one.name: partial(one.engine, one.path, CONTEXT) for one in found}
    progress(f"opening {len(openers)} files")
    with working(openers, max(threads), preload=PRELOAD) as workers:
        for count in threads:
            progress(f"decoders on {count} threads")
            for task, work, inputs in (
                ("decode", engines.decode_rate, (material.prompt, material.following)),
                ("decode8", engines.batch_rate, (material.prompt[:32], material.following)),
                ("prefill", engines.prefill_rate, (material.prompt,)),
            ):
                size = {"task": task, "threads": count, "tokens": len(inputs[-1])}
                rates = medians_in_turn(workers, work, count, *inputs, repeats=repeats)
                rows += [{**size, "contestant": name, "tokens_per_second": rate} for name, rate in rates.items()]
        for name, worker in workers.items() if quality else ():
            progress(f"perplexity of {name}")
            perplexity[name] = exp(worker.ask(predictions.quality, max(threads), material.chunks, {})[0])
    sizes = {one.name: decoder_files.weight_bytes(one.path) for one in found}
    for row in rows:
        row |= {"file_bytes": sizes[row["contestant"]], "quality": {"perplexity": perplexity.get(row["contestant"])}}
    return rows


def contestants(top: Path) -> list[Contestant]:
    """Return all contestants with the model of ``top``/dense."""
    files = [(kind, decoder_files.gguf_file(top, kind)) for kind in decoder_files.KINDS]
    found = [Contestant(f"dense, llama.cpp {kind}", file, engines.LlamaCpp) for kind, file in files]
    for values in ("int8", "int4"):
        for share in SHARES:
            folder = decoder_files.packed_folder(top, values, share)
            found.append(Contestant(our_name(share, values), folder, engines.PstDs))
            if values == "int8" and share in (0.0, 0.8):
                found.append(Contestant(our_name(share, PROMPTS), folder, partial(engines.PstDs, prompt_bits=8)))
    return found


def our_name(share: float, values: str) -> str:
    return f"{f'{share:.0%}'.replace('%', ' %') if share else 'dense'} {values}, pst-ds"


def text_material(top: Path, text: Path, prompt_tokens: int, new_tokens: int) -> Material:
    from transformers import AutoTokenizer

    if not text.is_file() and text == TEXT:
        from tools.quality import texts

        texts.make(["brown"])
    tokenizer = AutoTokenizer.from_pretrained(top / "dense")
    chunks = decoder_files.evenly_spaced_chunks(text.read_text(encoding="utf-8"), tokenizer, CHUNKS, CHUNK_TOKENS)
    return Material(chunks[0][:prompt_tokens], chunks[0][prompt_tokens : prompt_tokens + new_tokens], chunks)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the speed-ups over llama.cpp of :data:`RATIOS` whose two rows exist, also for int4 weights."""
    rates = {(r["task"], r["contestant"], r["threads"]): r["tokens_per_second"] for r in rows}
    found: dict[str, dict[str, float]] = {}
    for table, places in RATIOS.items():
        task, _, rest = table.partition("_")
        for values in (PROMPTS,) if rest.startswith("8_bits_") else ("int8", "int4"):
            name = f"{task}_int4_{rest}" if values == "int4" else table
            for place in places:
                percent, kind, threads = place.split("/")
                ours = rates.get((task, our_name(int(percent) / 100, values), int(threads)))
                theirs = rates.get((task, f"dense, llama.cpp {kind}", int(threads)))
                if ours and theirs:
                    found.setdefault(name, {})[place] = ours / theirs
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    def column(row: dict[str, Any]) -> str:
        return f"{row['task']} {row['tokens']}, {row['threads']} thr."

    engines.print_by_contestant(
        rows, "tokens_per_second", "tokens per second", column, quality="perplexity", shown=",.2f"
    )
