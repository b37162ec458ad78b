"""Smaller dense encoders compared with the model they were cut from, in OpenVINO int8: speed, size and accuracy.

    python -m tools.bench.peers.shapes runs/films-dense/model runs/films-25 --texts data/films --shapes 1x32 1x128 8x128

Folders are classifiers in the format of transformers; the first is the one that speed is relative to. Each is quantised
by NNCF, calibrated on training examples. All take turns, one thread each; times are medians. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from tools.bench.peers.encoders import SHAPES, quantize, run_openvino, seconds_in_turn, tokens_of
from tools.bench.timing import conditions
from tools.onnx_int8 import share_of_right_answers
from tools.verbs import verb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch x tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-length", type=int, default=64)
    arguments = parser.parse_args()
    files = {folder: _int8_of(folder, arguments.texts) for folder in arguments.folders}
    vocabulary = json.loads((arguments.folders[0] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    sizes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    feeds = {(batch, tokens): tokens_of(vocabulary, batch, tokens) for batch, tokens in sizes}
    openers = {str(folder): partial(run_openvino, file) for folder, file in files.items()}
    times = dict(seconds_in_turn(openers, 1, feeds, arguments.repeats))
    print(json.dumps(conditions()))
    for folder, file in files.items():
        right = share_of_right_answers(
            run_openvino(file, 1), folder, arguments.texts / "test.jsonl", arguments.max_length
        )
        first, own = str(arguments.folders[0]), str(folder)
        speed = ", ".join(
            f"{batch}x{tokens} {1e3 * of[own]:.2f} ms ({of[first] / of[own]:.2f})"
            for (batch, tokens), of in times.items()
        )
        size = sum(path.stat().st_size for path in (file, file.with_suffix(".bin"))) / 1e6
        print(f"{folder}: {speed}; {size:.1f} MB; {right:.2%} right")


def _int8_of(folder: Path, texts: Path) -> Path:
    """Return the folder's model for OpenVINO, quantised to int8; make it unless it exists."""
    out = folder.with_name(f"{folder.name}-openvino") / "int8.xml"
    if not out.is_file():
        onnx = out.parent / "onnx"
        verb("export", str(folder), "--format", "onnx", "--plain", "--out", str(onnx))
        quantize(onnx / "model.onnx", out, texts / "train.jsonl", folder)
    return out


if __name__ == "__main__":
    main()
