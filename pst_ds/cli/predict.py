"""``pst-ds predict DIR --data FILE --out FILE``: the label, number or embedding of each row of a file."""

import argparse
import os
import time
from functools import partial
from pathlib import Path

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.cli.output_file import require_file_place
from pst_ds.errors import InputError

FLAGS = {"columns": "--text", **flags_of_fields(["out", "data"])}
"""Flags for the settings that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="folder of a classifier, regressor or embedding model: dense, packed, or ONNX")
    add("--data", required=True, metavar="FILE", help="JSONL, CSV, TSV, Parquet or text file, or a slice: a.csv[:100]")
    add("--out", required=True, metavar="FILE", help="file to write: .jsonl, .csv or .parquet")
    text = "column of texts, or two columns of pairs (default: the run's, or else text or sentence)"
    add("--text", nargs="+", default=(), metavar="COLUMN", help=text)
    add("--max-length", type=count, metavar="N", help="tokens of a text, which is truncated (default: as in training)")
    add("--batch", type=count, metavar="N", help="texts computed together (default: 16)")
    add("--processes", type=count, default=1, metavar="N", help="processes, each with a model (default: 1)")
    add("--threads", type=count, metavar="N", help="threads per process (default: OMP_NUM_THREADS, or its share)")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.hf.model_folder import open_model_folder
    from pst_ds.inference.encoder.encoder import CLASSIFIER, EMBEDDER, Encoder, kind_of
    from pst_ds.inference.encoder.file import FORMATS, open_file, require_no_formula

    out = Path(args.out)
    folder = open_model_folder(args.model)
    kind = kind_of(folder)
    formats = list(FORMATS)
    # an embedding has no columns with names
    if kind == EMBEDDER:
        formats.remove(".csv")
    if out.suffix not in formats:
        raise InputError(f"--out {out}: a {kind}'s predictions are written as {', '.join(formats)}. Name such a file")
    if out.suffix == ".csv" and kind == CLASSIFIER:
        require_no_formula(map(str, (folder.config.id2label or {}).values()), out)
    require_file_place(out, "--out")
    # otherwise each process would start as many threads as there are cores
    if not args.threads and "OMP_NUM_THREADS" not in os.environ:
        args.threads = max(1, (os.cpu_count() or 1) // args.processes)
    # pickled for each process, which opens a model
    open_model = partial(Encoder, args.model, threads=args.threads, max_length=args.max_length, batch=args.batch)
    file = open_file(args.model, args.data, args.text, open_model)
    if args.processes == 1:
        # opened before the clock starts
        _ = file.model
    start = time.perf_counter()
    file.predict(out, args.processes)
    seconds = time.perf_counter() - start
    rows = len(file.rows)
    print(f"wrote {out}: {rows} rows, {rows / seconds:.0f} per second")
    return {"out": args.out, "kind": kind, "rows": rows, "seconds": seconds, "rows_per_second": rows / seconds}
