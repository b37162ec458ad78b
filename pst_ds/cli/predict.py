"""``pst-ds predict DIR --data FILE --out FILE``: the label, number or embedding of each row of a file."""

import argparse
import os
import time
from functools import partial
from pathlib import Path

from pst_ds.atomic_files import require_writable
from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.errors import InputError

FLAGS = {"columns": "--text", **flags_of_fields(["out", "data"])}


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

    out, folder = Path(args.out), open_model_folder(args.model)
    kind = kind_of(folder)
    formats = [suffix for suffix in FORMATS if kind != EMBEDDER or suffix != ".csv"]
    if out.suffix not in formats:
        raise InputError(f"--out {out}: a {kind}'s predictions are written as {', '.join(formats)}. Name such a file")
    if out.suffix == ".csv" and kind == CLASSIFIER:
        require_no_formula(map(str, (folder.config.id2label or {}).values()), out)
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist. Create it, or name another file")
    require_writable(out, f"--out {out}")
    if not args.threads and "OMP_NUM_THREADS" not in os.environ:
        args.threads = max(1, (os.cpu_count() or 1) // args.processes)
    options = {name: getattr(args, name) for name in ("threads", "max_length", "batch")}
    file = open_file(args.model, args.data, args.text, partial(Encoder, args.model, **options))
    if args.processes == 1:
        _ = file.model  # opened before the clock starts
    start = time.perf_counter()
    file.predict(out, args.processes)
    seconds, rows = time.perf_counter() - start, len(file.rows)
    print(f"wrote {out}: {rows} rows, {rows / seconds:.0f} per second")
    return {"out": args.out, "kind": kind, "rows": rows, "seconds": seconds, "rows_per_second": rows / seconds}
