"""Train runs under limits of the memory that ``pst-ds plan`` calls enough, and of less than what it calls the least.

Every rank is in a control group of its own. With enough each run has to end; with less than the least each has to be
killed. Needs root and a memory controller.

    python -m tools.bench.fits --json
    python -m tools.bench.fits --cases tiny --measure
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.bench.memory_cgroup import MemoryCgroup
from tools.bench.timing import hardware

TOKENIZER, TEXT = "tests/data/tiny-llama", "tests/data/train.jsonl"
STEPS = 2
LOOK_SECONDS = 0.02
RUN_SECONDS, OTHERS_SECONDS = 300.0, 5.0
"""A run may take so long, and what is left of its ranks so long after one was killed."""


@dataclass(frozen=True, slots=True)
class Case:
    """A Llama of random weights, and how it is trained: ``sequences`` of ``tokens`` a rank."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    ranks: int = 1
    sequences: int = 1
    tokens: int = 64
    precision: str = "bf16"
    checkpointed: bool = True

    def write_model(self, folder: Path) -> None:
        config = transformers.LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64, vocab_size=self.vocabulary,
        )  # fmt: skip
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        transformers.LlamaForCausalLM._from_config(config, dtype=dtype).save_pretrained(folder)

    def write_inputs(self, folder: Path) -> None:
        """Write the model, a text, and a run file to be filled by :meth:`arguments`."""
        self.write_model(folder / "model")
        (folder / "run.toml").write_text("", encoding="utf-8")
        (folder / "text.jsonl").write_text(40 * Path(TEXT).read_text(encoding="utf-8"), encoding="utf-8")

    def arguments(self, folder: Path) -> list[str]:
        """The run file in ``folder`` and what is set over it."""
        settings = [
            f"model.path={folder}/model", f"model.tokenizer={TOKENIZER}", f"output_dir={folder}/out", "task=causal-lm",
            f"data.train={folder}/text.jsonl", f"data.max_length={self.tokens}", f"train.num_steps={STEPS}",
            f"train.batch_size={self.ranks * self.sequences}", f"train.precision={self.precision}",
            "schedule.final_sparsity=0.5", "schedule.update_interval=1", "schedule.warmup_fraction=0",
            "checkpoint.interval=0", f"model.gradient_checkpointing={str(self.checkpointed).lower()}",
            "deepspeed_config=ds_configs/zero3_cpu.json",
        ]  # fmt: skip
        return [f"{folder}/run.toml", *(word for setting in settings for word in ("--set", setting))]


CASES = {
    "tiny": Case(64, 128, 2, 512, checkpointed=False),
    "0.1B": Case(768, 2048, 8, 32000),
    "0.1B, 2 ranks": Case(768, 2048, 8, 32000, ranks=2),
    "0.1B, fp32": Case(768, 2048, 8, 32000, precision="fp32", checkpointed=False),
    "wide vocabulary": Case(512, 1408, 4, 128256, tokens=128, checkpointed=False),
    "8 x 512 tokens": Case(512, 1408, 8, 32000, sequences=8, tokens=512, checkpointed=False),
    "0.3B": Case(1024, 2816, 20, 32000),
}


@dataclass(frozen=True, slots=True)
class Need:
    """What ``pst-ds plan`` says of a rank, in bytes."""

    peak: int
    enough: int
    least: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks of a run ended."""

    limit: int | None
    codes: list[int]
    kills: int
    """Processes that the limit has killed."""
    most: int
    """Bytes that a rank had and no file backs, as far as was looked."""

    @property
    def trained(self) -> bool:
        return not any(self.codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", action="store_true", help="without limits: what the ranks take")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    print(hardware())
    found, held = {}, True
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            need = planned(CASES[name], Path(folder))
            limits = [None] if args.measure else [need.enough, need.least - 1]
            outcomes = [trained(CASES[name], Path(folder), limit) for limit in limits]
        if not args.measure:
            held &= outcomes[0].trained and outcomes[1].kills > 0
        found[name] = {**asdict(need), "outcomes": [asdict(outcome) for outcome in outcomes]}
        print(f"{name:>16}: {line(need, outcomes)}", flush=True)
    if args.json:
        print(json.dumps({"benchmark": "fits", "hardware": hardware(), "held": held, "cases": found}))
    return 0 if held else 1


def line(need: Need, outcomes: list[Outcome]) -> str:
    said = [f"planned peak {need.peak / 1e6:,.0f} MB, enough {need.enough / 1e6:,.0f}"]
    for outcome in outcomes:
        under = "without a limit" if outcome.limit is None else f"under {outcome.limit / 1e6:,.0f}"
        how = "trains" if outcome.trained else "is killed" if outcome.kills else f"ends with {outcome.codes}"
        said.append(f"{under} it {how}, at most {outcome.most / 1e6:,.0f}")
    return "; ".join(said)


def planned(case: Case, folder: Path) -> Need:
    """Write the model and the run into ``folder``, and plan it."""
    case.write_inputs(folder)
    words = ["plan", *case.arguments(folder), "--json", "--ranks", str(case.ranks), "--machine", "cpu"]
    done = subprocess.run([sys.executable, "-m", "pst_ds", *words], capture_output=True, text=True, check=True)
    plan: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    verdict = plan["verdict"]
    return Need(plan["memory_bytes_per_rank"]["peak"], verdict["needed_bytes"], verdict["least_bytes"])


def trained(case: Case, folder: Path, limit: int | None) -> Outcome:
    """Train under a limit, every rank in a group of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "pst_ds", "train", *case.arguments(folder), "--restart", "--quiet"]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        groups = [MemoryCgroup(f"pst-ds-fits-{os.getpid()}-{rank}", limit) for rank in range(case.ranks)]
        for group in groups:
            stack.callback(group.close)
        processes = []
        for rank, group in enumerate(groups):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)} if case.ranks > 1 else {}
            processes.append(group.start(words, {**shared, **own}, folder / f"rank-{rank}.log"))
        most, deadline = 0, time.monotonic() + RUN_SECONDS
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            most = max([most, *(group.anonymous_bytes for group in groups)])
            time.sleep(LOOK_SECONDS)
        codes = ended(processes)
        return Outcome(limit, codes, sum(group.kills for group in groups), most)


def ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes. A rank that was killed may leave the others waiting for it: they are ended."""
    for process in processes:
        try:
            process.wait(OTHERS_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.returncode for process in processes]


if __name__ == "__main__":
    sys.exit(main())
