"""The sparse encoder compared with ONNX Runtime and OpenVINO: speed, file size and accuracy.

Contestants are the demo's runs: the dense run in ONNX Runtime (fp32, dynamic int8) and OpenVINO (fp32, int8 by NNCF,
calibrated on training examples), and the sparse runs from `pst-ds export --format onnx`, with int8 weights and
embeddings. Every contestant has its own process, and they take turns at every size; times are medians. Accuracy is on
the demo's test split, one example per call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.inference.onnx.operators import open_session
from tools.bench.peers.engines import print_by_contestant
from tools.bench.ranks import medians_in_turn, working
from tools.bench.timing import progress
from tools.onnx_int8 import share_of_right_answers, write_int8
from tools.verbs import verb

Feed = dict[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]
SHAPES = ("1x32", "1x128", "8x128")
"""Batch x tokens."""
SMALL = ["--dtype", "bf16", "--values", "int8", "--embeddings", "int8"]
CALIBRATION_TEXTS = 128
PRELOAD = ("pst_ds.inference.onnx.operators",)
"""Modules imported once for all processes."""


@dataclass(frozen=True)
class Contestant:
    """A way to run the classifier."""

    name: str
    file_bytes: int
    open: Callable[[int], Run]
    """Called with a number of threads in its own process; returns a function from a feed to logits."""
    in_ratios: str = ""
    """Label in tables of ratios, for contestants of pst-ds."""


def measure(
    folder: Path, sparse: Sequence[str], *, threads: Sequence[int], shapes: Sequence[str], repeats: int, quality: bool
) -> list[dict[str, Any]]:
    """Return the rows of all contestants.

    Args:
        folder: The demo's runs.
        sparse: Runs of pst-ds in it, "NAME" or "NAME:BITS" of the activations.
    """
    sizes = [(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in shapes)]
    found = list(contestants(folder, sparse))
    vocabulary = json.loads((folder / "dense/export/config.json").read_text(encoding="utf-8"))["vocab_size"]
    rows: list[dict[str, Any]] = []
    for count in threads:
        feeds = {size: tokens_of(vocabulary, *size) for size in sizes}
        for (batch, tokens), seconds in seconds_in_turn({one.name: one.open for one in found}, count, feeds, repeats):
            size = {"task": "encode", "threads": count, "batch": batch, "tokens": tokens}
            rows += [{**size, "contestant": name, "ms": 1e3 * time} for name, time in seconds.items()]
    shares = {one.name: accuracy(one, folder) for one in found} if quality else {}
    named = {one.name: one for one in found}
    for row in rows:
        one = named[row["contestant"]]
        row |= {"file_bytes": one.file_bytes, "quality": {"accuracy": shares.get(one.name)}, "in_ratios": one.in_ratios}
    return rows


def seconds_in_turn(
    openers: Mapping[str, Callable[[int], Run]], threads: int, feeds: Mapping[tuple[int, int], Feed], repeats: int
) -> Iterator[tuple[tuple[int, int], dict[str, float]]]:
    """Yield the (batch, tokens) of each feed and the median seconds of all contestants on that many threads."""
    progress(f"opening {len(openers)} files for {threads} threads")
    with working({name: partial(one, threads) for name, one in openers.items()}, threads, PRELOAD) as workers:
        for (batch, tokens), feed in feeds.items():
            progress(f"{batch} x {tokens} on {threads} threads")
            rounds = repeats if batch * tokens <= 256 else max(5, repeats // 3)
            yield (batch, tokens), medians_in_turn(workers, seconds_of, feed, repeats=rounds)


def seconds_of(run: Run, feed: Feed) -> float:
    """Time ``run`` after a call that wakes its threads."""
    run(feed)
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start


def tokens_of(vocabulary: int, batch: int, tokens: int) -> Feed:
    """Return random tokens without padding, the same in every call."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (batch, tokens))
    return {
        "input_ids": ids,
        "attention_mask": np.ones((batch, tokens), np.int64),
        "token_type_ids": np.zeros((batch, tokens), np.int64),
    }


def contestants(folder: Path, sparse: Sequence[str]) -> Iterator[Contestant]:
    """Yield all contestants; make missing files."""
    dense = folder / "dense" / "export"
    onnx = folder / "dense" / "onnx"
    int8, fp32 = onnx / "model.onnx", onnx / "fp32" / "model.onnx"
    if not (int8.is_file() and fp32.is_file()):
        progress("writing the dense run for ONNX Runtime")
        write_int8(dense, onnx)
    yield Contestant("dense, ONNX Runtime fp32", fp32.stat().st_size, partial(run_onnx, fp32))
    yield Contestant("dense, ONNX Runtime int8", int8.stat().st_size, partial(run_onnx, int8))
    openvino = onnx / "openvino" / "int8.xml"
    if not openvino.is_file():
        progress("quantising the dense run with NNCF")
        quantize(fp32, openvino, folder / "data" / "train.jsonl", dense)
    yield Contestant("dense, OpenVINO fp32", fp32.stat().st_size, partial(run_openvino, fp32))
    nbytes = openvino.stat().st_size + openvino.with_suffix(".bin").stat().st_size
    yield Contestant("dense, OpenVINO int8", nbytes, partial(run_openvino, openvino))
    for run in sparse:
        name, _, bits = run.partition(":")
        file = folder / name / (f"onnx-int8-{bits}" if bits else "onnx-int8") / "model.onnx"
        if not file.is_file():
            progress(f"exporting {run}")
            options = [*SMALL, *(["--activation-bits", bits] if bits else [])]
            verb("export", str(folder / name), "--format", "onnx", *options, "--out", str(file.parent))
        yield ours(name, bits, file)


def ours(name: str, bits: str, file: Path) -> Contestant:
    """Return the contestant of a run; ``bits``: of its activations, empty for exact ones."""
    words, short = (f", inputs of {bits} bits", f"_in_{bits}_bits") if bits else ("", "")
    return Contestant(f"{name} int8{words}, pst-ds", file.stat().st_size, partial(run_onnx, file), name + short)


def run_onnx(file: Path, threads: int) -> Run:
    session = open_session(file, threads=threads)
    takes = [value.name for value in session.get_inputs()]
    return lambda feed: session.run(None, {name: feed[name] for name in takes})[0]


def run_openvino(file: Path, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    model = openvino.Core().compile_model(file, "CPU", settings)
    request, takes = model.create_infer_request(), [value.any_name for value in model.inputs]
    return lambda feed: request.infer({name: feed[name] for name in takes})[0]


def quantize(fp32: Path, out: Path, texts: Path, model: Path) -> None:
    """Write ``out`` with NNCF's settings for transformers, calibrated on ``texts`` with the tokenizer of ``model``."""
    import nncf
    import openvino
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = texts.read_text(encoding="utf-8").splitlines()[:CALIBRATION_TEXTS]
    feeds = [dict(tokenizer(json.loads(line)["text"], truncation=True, return_tensors="np")) for line in lines]
    quantized = nncf.quantize(
        openvino.Core().read_model(fp32),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantized, out)


def accuracy(contestant: Contestant, folder: Path) -> float:
    progress(f"accuracy of {contestant.name}")
    texts = folder / "data" / "test.jsonl"
    return share_of_right_answers(contestant.open(1), folder / "dense" / "export", texts, max_length=64)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the speed-ups of the sparse encoders, by size and by size and threads."""
    ms = {(row["contestant"], row["threads"], f"{row['batch']}x{row['tokens']}"): row["ms"] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row["in_ratios"]:
            continue
        threads, size = row["threads"], f"{row['batch']}x{row['tokens']}"
        for peer in ("OpenVINO int8", "ONNX Runtime int8"):
            table = f"{row['in_ratios']}_over_{peer.lower().replace(' ', '_')}"
            found.setdefault(table, {})[f"{size}/{threads}"] = ms[f"dense, {peer}", threads, size] / row["ms"]
    of_90 = found.get("pst-90_over_openvino_int8", {})
    found["encoder_over_openvino_int8"] = {size: of_90[f"{size}/1"] for size in SHAPES if f"{size}/1" in of_90}
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: (row["threads"], row["batch"], row["tokens"]))

    def column(row: dict[str, Any]) -> str:
        return f"{row['batch']} x {row['tokens']}, {row['threads']} thr."

    print_by_contestant(ordered, "ms", "ms", column, quality="accuracy", shown=".2%")
