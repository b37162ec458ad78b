"""What a checkpoint costs a training step: how long the save holds training up, and what writing it takes beside.

A Llama of 135 M parameters (the shape of SmolLM2-135M) with random weights trains on ZeRO-3 ranks; in every other step
a checkpoint is written. The step before it has the machine to itself, the step after it runs while it is written. Times
are medians, of the slowest rank each. The last checkpoint is then verified and read by one process, whole.

    python -m tools.bench.checkpoint --json
    python -m tools.bench.checkpoint --json --ranks 1 --sequence 512
"""

from __future__ import annotations

import argparse
import shutil
import statistics
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
from tools.bench.timing import conditions, medians, print_json, progress
from tools.bench.variants import (
    Shape,
    Variant,
    add_shape_options,
    peak_bytes,
    random_llama,
    reset_peak,
    resident_bytes,
    shape_of,
)  # fmt: skip

MOST_BLOCKED = 0.05
"""Of a step: what a save may hold training up for."""
WARMUP_STEPS = 3
"""Not timed; nor is the first save, which makes the buffers and tells what memory a save takes."""


@dataclass(frozen=True, kw_only=True)
class SmolShape(Shape):
    """SmolLM2-135M, whose embeddings are tied, and one sequence of 1,024 tokens a rank."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    batch: int = 1


class Saver(Variant):
    """PST on this rank with a writer of checkpoints into ``folder``. Construction is collective."""

    def __init__(self, shape: SmolShape, folder: str):
        model = random_llama(shape, num_key_value_heads=shape.kv_heads, tie_word_embeddings=True)
        inject_pst(model, PSTConfig(score_rank=shape.rank, update_rank=shape.rank))
        self._begin("pst", shape, model)
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
        """Seconds of a step alone, of a save, and of the step while it is written; with its bytes. Collective."""
        alone = self.step()
        began = time.perf_counter()
        self._save()
        outside = time.perf_counter() - began
        beside = self.step()
        written = self._written()
        return {
            "step": alone["step"],
            "step_while_writing": beside["step"],
            "cpu_step": alone["cpu_step"],
            "cpu_step_while_writing": beside["cpu_step"],
            "blocked": written.blocked_seconds,
            "blocked_outside": outside,
            "until_written": max(0.0, self._written_at - began),  # known to rank 0 alone
            "bytes": written.bytes,
        }

    def sizes(self) -> dict[str, int]:
        """Bytes and counts, the same on every rank but for the memory."""
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
    if arguments.json:
        print_json(report)
    else:
        _print(report)


def measure(shape: SmolShape, num_ranks: int, saves: int, folder: Path) -> dict[str, Any]:
    """Medians of ``saves`` rounds, and what the last checkpoint takes on disk and to read."""
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
    seconds = {name: statistics.median(found[name] for found in rounds) for name in rounds[0] if name != "bytes"}
    seconds |= read_seconds(newest)
    stated = conditions(shape=asdict(shape), dtype="bfloat16", ranks=num_ranks, zero_stage=3, saves=saves)
    return summary(stated, seconds, {"checkpoint": int(rounds[-1]["bytes"]), **sizes})


def read_seconds(folder: Path, repeats: int = 3) -> dict[str, float]:
    """Median seconds of one process to open and verify a checkpoint, and then to read every mask and master whole."""

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
    """The report: what a save blocks and adds, as shares of a step, and its bytes against the limit."""
    step, blocked = seconds["step"], max(seconds["blocked"], seconds["blocked_outside"])
    return {
        "benchmark": "checkpoint",
        "conditions": stated,
        "seconds": seconds,
        "blocked_ratio": blocked / step,
        "blocked_within_bar": blocked <= MOST_BLOCKED * step,
        "hidden_ratio": seconds["step_while_writing"] / step - 1.0,
        "cpu_hidden_ratio": seconds["cpu_step_while_writing"] / seconds["cpu_step"] - 1.0,
        "bytes": sizes,
        "bytes_ratio": sizes["checkpoint"] / sizes["limit"],
    }


def _print(report: dict[str, Any]) -> None:
    stated, seconds, sizes = report["conditions"], report["seconds"], report["bytes"]
    print(f"{stated['hardware']}, {stated['ranks']} ranks, {stated['shape']}")
    print(f"a step {seconds['step']:.3f} s, while a checkpoint is written {seconds['step_while_writing']:.3f} s")
    print(
        f"a save blocks {seconds['blocked'] * 1e3:.1f} ms ({seconds['blocked_outside'] * 1e3:.1f} ms with its state), "
        f"{report['blocked_ratio']:.2%} of a step; written after {seconds['until_written']:.2f} s"
    )
    print(
        f"{sizes['checkpoint'] / 1e6:.2f} MB ({sizes['limit'] / 1e6:.2f} MB is the most); a save takes "
        f"{sizes['save_memory'] / 1e6:.0f} MB of memory a rank; verified in "
        f"{seconds['read_checkpoint']:.2f} s, all of it read in {seconds['read_all_values']:.2f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--saves", type=int, default=10, help="checkpoints that are measured")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to write to (default: temporary)")
    add_shape_options(parser, SmolShape)
    return parser


if __name__ == "__main__":
    main()
