"""Cost of a checkpoint: how long a save blocks training, and how much writing it slows the next step.

A Llama of 135 M parameters (the shape of SmolLM2-135M) with random weights trains on ZeRO-3 ranks and saves after every
other step. The step before a save runs undisturbed, the step after it while the checkpoint is written. Times are
medians of the slowest rank. One process then verifies and reads the last checkpoint.

    python -m tools.bench.checkpoint --json
    python -m tools.bench.checkpoint --json --ranks 1 --sequence 512
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst_ds.checkpoint.format import CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import magnitude_scales
from pst_ds.checkpoint.writer import CheckpointWriter, SaveResult, size_limit
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst
from tools.bench.ranks import Ranks, slowest
from tools.bench.timing import benchmark_parser, conditions, medians, medians_of, print_result, progress
from tools.bench.variants import (
    Shape,
    Variant,
    add_shape_options,
    peak_bytes,
    random_llama,
    reset_peak,
    resident_bytes,
    shape_of,
)

WARMUP_STEPS = 3
"""Untimed steps. The first save is not timed either: it allocates the buffers, whose size is measured."""


@dataclass(frozen=True, kw_only=True)
class SmolShape(Shape):
    """SmolLM2-135M, whose embeddings are tied, and one sequence of 1,024 tokens per rank."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    batch: int = 1


class Saver(Variant):
    """PST on this rank with a checkpoint writer for ``folder``. Construction is collective."""

    def __init__(self, shape: SmolShape, folder: str):
        model = random_llama(shape, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True)
        inject_pst(model, PSTConfig(score_rank=shape.rank, update_rank=shape.rank))
        self._start("pst", shape, model)
        self._writer = CheckpointWriter(Path(folder), self.engine)
        self._saves, self._written_at = 0, 0.0
        for _ in range(WARMUP_STEPS):
            self.step()
        reset_peak()
        before = resident_bytes()
        self._save()
        self._written()
        self._save_memory = peak_bytes() - before

    def round(self) -> dict[str, float]:
        """Return the seconds of an undisturbed step, a save and a step during writing, and the bytes. Collective."""
        undisturbed = self.step()
        start = time.perf_counter()
        self._save()
        outside = time.perf_counter() - start
        disturbed = self.step()
        written = self._written()
        return {
            "step": undisturbed["step"],
            "step_while_writing": disturbed["step"],
            "cpu_step": undisturbed["cpu_step"],
            "cpu_step_while_writing": disturbed["cpu_step"],
            "blocked": written.blocked_seconds,
            "blocked_outside": outside,
            "until_written": max(0.0, self._written_at - start),  # known to rank 0 only
            "bytes": written.bytes,
        }

    def sizes(self) -> dict[str, int]:
        """Return bytes and counts; only the memory differs between ranks."""
        return {
            "trainables": self.trainables,
            "limit": size_limit(self.engine.module),
            "save_memory": self._save_memory,
        }

    def _save(self) -> None:
        self._saves += 1
        self._writer.save(f"step-{self._saves:08d}", self._state(), when_written=self._note_written)

    def _note_written(self) -> None:
        self._written_at = time.perf_counter()

    def _written(self) -> SaveResult:
        written = self._writer.wait()
        if written is None or written.error:
            raise OSError(f"the checkpoint was not written: {written and written.error}")
        return written

    def _state(self) -> CheckpointState:
        return CheckpointState(
            step=self._saves,
            sparsity=self.shape.sparsity,
            masks_frozen=False,
            precision="bf16",
            device_type=self.tokens.device.type,
            base_path="",
            base_fingerprint="",
            labels=[],
            magnitude_scales=magnitude_scales(self.engine.module),
            metrics={},
        )


def main() -> None:
    arguments = _parser().parse_args()
    shape = shape_of(arguments, SmolShape)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(shape, arguments.ranks, arguments.saves, Path(folder))
    print_result(report, as_json=arguments.json)


def measure(shape: SmolShape, num_ranks: int, saves: int, folder: Path) -> dict[str, Any]:
    """Return medians over ``saves`` rounds, and the size and reading time of the last checkpoint."""
    rounds = []
    with Ranks(num_ranks, Saver, shape, str(folder)) as team:
        for turn in range(saves):
            found = slowest(team.call("round"))
            progress(f"save {turn}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
            rounds.append(found)
            for older in sorted(folder.glob("step-*"))[:-1]:
                shutil.rmtree(older)
        sizes = slowest(team.call("sizes"))
    (newest,) = folder.glob("step-*")
    seconds = medians_of(rounds) | read_seconds(newest)
    del seconds["bytes"]
    stated = conditions(shape=asdict(shape), dtype="bfloat16", ranks=num_ranks, zero_stage=3, saves=saves)
    return summary(stated, seconds, {"checkpoint": int(rounds[-1]["bytes"]), **sizes})


def read_seconds(folder: Path, repeats: int = 3) -> dict[str, float]:
    """Return the median seconds that one process takes to verify a checkpoint, and to read all of its tensors."""

    def read() -> None:
        for found in (checkpoint.trained, checkpoint.masks):
            for name in found:
                found[name]

    checkpoint = read_checkpoint(folder)
    candidates: dict[str, Callable[[], object]] = {
        "read_checkpoint": lambda: read_checkpoint(folder),
        "read_all_values": read,
    }
    return medians(candidates, repeats, warmup=0)


def summary(stated: dict[str, Any], seconds: dict[str, float], sizes: dict[str, int]) -> dict[str, Any]:
    """Return the report: blocked and added time as shares of a step, and bytes as a share of the limit."""
    step, blocked = seconds["step"], max(seconds["blocked"], seconds["blocked_outside"])
    return {
        "benchmark": "checkpoint",
        "conditions": stated,
        "seconds": seconds,
        "blocked_ratio": blocked / step,
        "hidden_ratio": seconds["step_while_writing"] / step - 1.0,
        "cpu_hidden_ratio": seconds["cpu_step_while_writing"] / seconds["cpu_step"] - 1.0,
        "bytes": sizes,
        "bytes_ratio": sizes["checkpoint"] / sizes["limit"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--saves", type=int, default=10, help="measured checkpoints")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to write to (default: temporary)")
    add_shape_options(parser, SmolShape)
    return parser


if __name__ == "__main__":
    main()
