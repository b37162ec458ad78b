"""pst-ds compared with ONNX Runtime, OpenVINO and llama.cpp: speed, file size and quality.

Encoders are the demo's runs, so run `make demo` first; see tools/bench/peers/encoders.py. Decoders are the 135M Llama
of tools/fetch_smollm2.py, in runs/smollm2; see tools/bench/peers/decoders.py. Needs the extra `peers`. Build llama.cpp
for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python 'pst-ds[peers]'.

    python -m tools.bench.peers --json
    python -m tools.bench.peers --no-decoders --threads 1 --shapes 1x128 --no-quality
    python -m tools.bench.peers --no-encoders --json
    PST_DS_INSTRUCTIONS=amx python -m tools.bench.peers --json           # pst-ds with other instructions
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError
from pst_ds.runtime.native_loop import LEVELS, best_level
from tools.bench.peers import decoders, engines
from tools.bench.timing import benchmark_parser, conditions, print_result


def main() -> None:
    arguments = _parser().parse_args()
    try:
        result = measured(arguments)
    except InputError as error:
        sys.exit(f"peers: {error}")
    if arguments.json:
        print_result(result, as_json=True)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all contestants, print a table of each kind, and return the object of ``--json``. Raises InputError."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    stated: dict[str, Any] = {"instructions": LEVELS[best_level()]}
    if not arguments.no_decoders:
        stated["llama_cpp"] = llama_cpp_build()
    if not arguments.no_encoders:
        from tools.bench.peers import encoders

        rows += encoders.measure(
            arguments.folder,
            arguments.sparse,
            threads=arguments.threads,
            shapes=arguments.shapes,
            repeats=arguments.repeats,
            quality=not arguments.no_quality,
        )
        ratios |= encoders.ratios(rows)
        encoders.print_table(rows)
    if not arguments.no_decoders:
        decoded = decoders.measure(
            arguments.decoders,
            threads=arguments.threads,
            repeats=arguments.decoder_repeats,
            only=arguments.only,
            text=arguments.text,
            quality=not arguments.no_quality,
        )
        ratios |= decoders.ratios(decoded)
        decoders.print_table(decoded)
        rows += decoded
    repeats = {"encode": arguments.repeats, "decode": arguments.decoder_repeats}
    return conditions(benchmark="peers", repeats=repeats, **stated, rows=rows, ratios=ratios)


def llama_cpp_build() -> dict[str, str]:
    """Return the version of llama-cpp-python, and the instructions that llama.cpp was built for."""
    library = engines.llama_cpp()
    instructions = library.llama_print_system_info().decode().strip(" |")
    return {"llama-cpp-python": library.__version__, "built_for": instructions}


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, "python -m tools.bench.peers")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--no-quality", action="store_true", help="skip accuracy and perplexity")
    encoders = parser.add_argument_group("encoders")
    encoders.add_argument("--no-encoders", action="store_true")
    encoders.add_argument("--folder", type=Path, default=Path("runs/demo"), help="runs of make demo")
    runs = "runs in it; NAME:8 for int8 activations (default: %(default)s)"
    ours = ["pst-90-1x4", "pst-90", "pst-50", "pst-50:8"]
    encoders.add_argument("--sparse", nargs="*", default=ours, help=runs, metavar="NAME")
    encoders.add_argument("--shapes", nargs="*", default=("1x32", "1x128", "8x128"), metavar="BATCHxTOKENS")
    encoders.add_argument("--repeats", type=int, default=21)
    decoding = parser.add_argument_group("decoders")
    decoding.add_argument("--no-decoders", action="store_true")
    where = "folder of the models, which are made if missing (default: %(default)s)"
    decoding.add_argument("--decoders", type=Path, default=Path("runs/smollm2"), metavar="FOLDER", help=where)
    decoding.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="contestants with one of these in their name"
    )
    decoding.add_argument("--text", type=Path, default=decoders.TEXT, help="held-out text (default: %(default)s)")
    decoding.add_argument("--decoder-repeats", type=int, default=7)
    return parser


if __name__ == "__main__":
    main()
