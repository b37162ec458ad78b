"""Decoders on the front: KL divergence and perplexity against size and tokens per second, ours and llama.cpp's.

Each dense model becomes files of pst-ds and of llama.cpp, each sparse one files of pst-ds. Divergence is measured from
the model before quantisation, computed in fp32. Files are measured in turn, in processes of their own, always next to
the first of them, whose rate tells how busy the machine is. A row that exists is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError
from pst_ds.runtime.native_loop import LEVELS, VARIABLE, best_level
from tools.bench.front.files import CHUNK_TOKENS, File, Model, files_of
from tools.bench.peers import engines, predictions
from tools.bench.peers.decoder_files import evenly_spaced_chunks
from tools.bench.ranks import Worker, working
from tools.bench.timing import progress
from tools.machine import hardware
from tools.quality.cells import Lines, digest

CORPORA = {
    "Brown": Path("runs/quality/data/brown-test.txt"),
    "Bible": Path("runs/quality/data/bible-test.txt"),
    "Reuters": Path("runs/quality/data/reuters/test.jsonl"),
}
"""Texts that nothing was trained or calibrated on; of Brown and only Brown, other samples were."""
PROMPT, FOLLOWING = 128, 64
TASKS = ("decode", "prompt")
CONTEXT = 1024
IN_TURN = 6
"""Files that are open at once, in addition to the first."""
PRELOAD = ("pst_ds.inference.decoder", "tools.bench.peers.predictions")
ENGINES = {"pst-ds": engines.PstDs, "llama.cpp": engines.LlamaCpp}
QUALITY, SPEED = "decoder quality", "decoder speed"
"""Kinds of rows: of a file, corpus and reference; of a file, machine and instructions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = "model or run folders, or finished files; REFERENCE: names of dense ones, the first its own (itself)"
    add("--models", nargs="+", type=_model, required=True, metavar="NAME=FOLDER[@REFERENCE,...]", help=models)
    add("--folder", type=Path, default=Path("runs/front-files"), help="where files are made (default: %(default)s)")
    add("--only", nargs="*", default=[], metavar="TEXT", help="files with one of these in their name")
    add("--corpora", nargs="*", default=list(CORPORA), choices=list(CORPORA))
    add("--chunks", type=int, default=4, help=f"pieces of {CHUNK_TOKENS} tokens of each corpus (default: 4)")
    add("--repeats", type=int, default=7, help="rounds of the speed measurement; 0 measures none")


def measure(args: argparse.Namespace, lines: Lines) -> None:
    """Make missing files, and measure and keep missing rows. Raises InputError."""
    by_name = {model.name: model for model in args.models}
    for name in (name for model in args.models for name in model.references):
        if name not in by_name or not by_name[name].is_dense:
            raise InputError(f"--models: reference {name!r} is not a dense one of them. Add {name}=FOLDER")
    files = [file for model in args.models for file in files_of(model, args.folder, args.only)]
    pieces = {corpus: chunks_of(corpus, by_name, files, args.chunks) for corpus in args.corpora}
    for file in files:
        measure_quality(file, by_name, pieces, args.folder, lines)
    if args.repeats:
        measure_speed(files, args.repeats, chunks_of("Brown", by_name, files, 1)[0], lines)


def measure_quality(
    file: File, models: dict[str, Model], pieces: dict[str, list[list[int]]], top: Path, lines: Lines
) -> None:
    """Measure perplexity and divergence of a file on each corpus that lacks them, in a separate process."""
    rows = [
        (digest([QUALITY, file.sha256, chunks, models[name].sha256]), corpus, name)
        for corpus, chunks in pieces.items()
        for name in file.model.references
    ]
    missing = [row for row in rows if row[0] not in lines.by_id]
    if not missing:
        return
    kept: dict[str, dict[str, Path]] = {corpus: {} for _, corpus, _ in missing}
    for _, corpus, name in missing:
        kept[corpus][name] = logits_of(models[name], corpus, pieces[corpus], top)
    progress(f"quality of {file.name}")
    with opened([file]) as workers:
        found = {of: workers[file.name].ask(predictions.quality, 1, pieces[of], files) for of, files in kept.items()}
    for key, corpus, name in missing:
        loss, divergences = found[corpus]
        about = {"corpus": corpus, "tokens": len(pieces[corpus]) * (CHUNK_TOKENS - 1), "perplexity": math.exp(loss)}
        about |= {"reference": name, "own": name == file.model.references[0]}
        lines.put({"id": key, "kind": QUALITY, **file.facts(), **about, **divergences[name]})


def logits_of(model: Model, corpus: str, chunks: list[list[int]], top: Path) -> Path:
    """Return the file of a dense model's logits on a corpus, made unless it exists: 100 MB per chunk."""
    out = top / model.name / f"{corpus}-{digest([model.sha256, chunks])}.logits"
    if not out.is_file():
        progress(f"computing {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
        with working({"reference": partial(engines.Transformers, model.folder)}, 1, PRELOAD) as workers:
            workers["reference"].ask(predictions.write_logits, 1, chunks, out)
    return out


def measure_speed(files: Sequence[File], repeats: int, chunk: list[int], lines: Lines) -> None:
    """Measure tokens per second of the files, a few in turn with the first one. Raises InputError."""
    machine = {"machine": hardware(), "instructions": instructions(files), "threads": 1}
    ids = {file.name: digest([SPEED, file.sha256, machine]) for file in files}
    missing = [file for file in files if ids[file.name] not in lines.by_id]
    anchor = files[0]
    for group in (missing[start : start + IN_TURN] for start in range(0, len(missing), IN_TURN)):
        progress(f"speed of {', '.join(file.name for file in group)}")
        with opened([anchor, *(file for file in group if file is not anchor)]) as workers:
            rounds = [rates_of(workers, chunk) for _ in range(repeats + 1)][1:]  # the first warms up
        for file in group:
            found = {}
            for task in TASKS:
                ratios = [rates[file.name][task] / rates[anchor.name][task] for rates in rounds]
                found[task] = statistics.median(rates[file.name][task] for rates in rounds)
                found[f"{task}_over_first"] = statistics.median(ratios)
                found[f"{task}_of_first"] = statistics.median(rates[anchor.name][task] for rates in rounds)
            lines.put({"id": ids[file.name], "kind": SPEED, **file.facts(), **machine, "first": anchor.name, **found})


def rates_of(workers: dict[str, Worker], chunk: list[int]) -> dict[str, dict[str, float]]:
    """Return tokens per second of each file, in one turn."""
    prompt, following = chunk[:PROMPT], chunk[PROMPT : PROMPT + FOLLOWING]
    return {
        name: {
            "decode": worker.ask(engines.decode_rate, 1, prompt, following),
            "prompt": worker.ask(engines.prefill_rate, 1, prompt),
        }
        for name, worker in workers.items()
    }


def opened(files: Sequence[File]) -> Any:
    """Return a context of a worker per file."""
    return working({file.name: partial(ENGINES[file.engine], file.path, CONTEXT) for file in files}, 1, PRELOAD)


def instructions(files: Sequence[File]) -> str:
    """Return the instructions that both engines use. Raises InputError if llama.cpp is built for better ones."""
    level = LEVELS[best_level()]
    if any(file.engine == "llama.cpp" for file in files):
        built = engines.llama_cpp().llama_print_system_info().decode()
        if ("AVX512 = 1" in built) != (level != "avx2"):
            raise InputError(
                f"{VARIABLE} = {os.environ.get(VARIABLE, '')!r}: pst-ds uses {level}, and llama.cpp is built for "
                f"{built.strip()}. Put a package that is built for {level} first in PYTHONPATH"
            )
    return level


def chunks_of(corpus: str, models: dict[str, Model], files: Sequence[File], count: int) -> list[list[int]]:
    """Return pieces of a corpus, as tokens; all models have the same tokenizer."""
    from transformers import AutoTokenizer

    path = CORPORA[corpus]
    if not path.is_file():
        from tools.quality import texts

        texts.make([corpus.lower()])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    dense = models[files[0].model.references[0]].folder
    return evenly_spaced_chunks(text, AutoTokenizer.from_pretrained(dense), count, CHUNK_TOKENS)


def table_rows(lines: Lines, level: str) -> Iterator[dict[str, Any]]:
    """Yield a row per file that has all figures: of its speed at ``level``, and of each corpus from its own model.

    Tokens per second are those relative to the first file times the median rate of that file, so that they are of the
    same load.
    """
    speeds = [line for line in lines.by_id.values() if line["kind"] == SPEED and line["instructions"] == level]
    firsts = {task: statistics.median(line[f"{task}_of_first"] for line in speeds) for task in TASKS if speeds}
    for speed in speeds:
        own = [line for line in lines.by_id.values() if line["kind"] == QUALITY and line["own"]]
        of_corpora = {line["corpus"]: line for line in own if line["sha256"] == speed["sha256"]}
        if of_corpora:
            rates = {task: firsts[task] * speed[f"{task}_over_first"] for task in firsts}
            yield {**speed, **rates, "corpora": of_corpora, "reference": next(iter(of_corpora.values()))["reference"]}


def table(lines: Lines, level: str) -> str:
    """Return a Markdown table of :func:`table_rows`, the fastest file first."""
    rows = sorted(table_rows(lines, level), key=lambda row: -row["decode"])
    corpora = [name for name in CORPORA if any(name in row["corpora"] for row in rows)]
    of_corpora = [f"{figure} {name}" for figure in ("KL", "99 %", "perplexity") for name in corpora]
    head = ["model", "file", "MB", "decode", "prompt", "KL from", *of_corpora]
    found = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["model"], f"{row['engine']} {row['file']}", f"{row['file_bytes'] / 1e6:.1f}"]
        cells += [f"{row['decode']:.0f}", f"{row['prompt']:.0f}", row["reference"]]
        for key, form in (("kl_mean", ".3g"), ("kl_p99", ".2g"), ("perplexity", ".2f")):
            cells += [format(row["corpora"][name][key], form) if name in row["corpora"] else "" for name in corpora]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)


def _model(text: str) -> Model:
    name, separator, place = text.partition("=")
    folder, _, references = place.partition("@")
    if not separator or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=FOLDER or NAME=FOLDER@REFERENCE")
    return Model(name, Path(folder), tuple(references.split(",")) if references else (name,))
