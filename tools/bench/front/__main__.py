"""Measure the front: which files are the best for their speed and size. Rows, a table and a figure.

    python -m tools.bench.front decoders --models dense=runs/smollm2/dense half=runs/half@dense
    PST_DS_INSTRUCTIONS=avx2 PYTHONPATH=LLAMA_FOR_AVX2 python -m tools.bench.front decoders --models ...
    python -m tools.bench.front encoders --models dense=runs/films/export half=runs/films-50
    python -m tools.bench.front table --level avx512           # from the rows
    python -m tools.bench.front figure                         # docs/decoders.svg and docs/accuracy.svg

Rows are kept in tools/quality/logs/results/front.jsonl; what has a row is not measured again. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pst_ds.errors import InputError
from tools.bench.front import decoders, encoders, figure
from tools.quality.cells import Lines

ROWS = Path("tools/quality/logs/results/front.jsonl")


def main() -> None:
    args = make_parser().parse_args()
    try:
        lines = Lines(args.rows)
        args.run(args, lines)
    except InputError as error:
        sys.exit(f"front: {error}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.bench.front", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="(default: %(default)s)")
    verbs = parser.add_subparsers(required=True)
    measured = verbs.add_parser("decoders", description=decoders.__doc__)
    decoders.add_arguments(measured)
    measured.set_defaults(run=lambda args, lines: decoders.measure(args, lines))
    classifiers = verbs.add_parser("encoders", description=encoders.__doc__)
    encoders.add_arguments(classifiers)
    classifiers.set_defaults(run=lambda args, lines: encoders.measure(args, lines))
    shown = verbs.add_parser("table", help="print the decoders' table")
    shown.add_argument("--level", default="avx512", help="instructions (default: %(default)s)")
    shown.set_defaults(run=lambda args, lines: print(decoders.table(lines, args.level)))
    drawn = verbs.add_parser("figure", help="draw the figures of decoders and of classifiers")
    drawn.add_argument("--level", default="avx512", help="instructions (default: %(default)s)")
    drawn.add_argument("--corpus", default="Brown", choices=list(decoders.CORPORA))
    reference = "only decoders whose distance is from this model (default: %(default)s)"
    drawn.add_argument("--reference", default="fine-tuned", help=reference)
    drawn.add_argument("--decoders", type=Path, default=figure.DECODERS, metavar="FILE", help="(default: %(default)s)")
    drawn.add_argument("--encoders", type=Path, default=figure.ENCODERS, metavar="FILE", help="(default: %(default)s)")
    drawn.set_defaults(run=_draw)
    return parser


def _draw(args: argparse.Namespace, lines: Lines) -> None:
    of_decoders = [row for row in decoders.table_rows(lines, args.level) if row["reference"] == args.reference]
    figure.draw_decoders(of_decoders, args.corpus, args.decoders)
    of_encoders = [line for line in lines.by_id.values() if line["kind"] == encoders.KIND]
    figure.draw_encoders(of_encoders, args.encoders)


if __name__ == "__main__":
    main()
