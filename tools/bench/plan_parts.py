"""Compare the parts of a training step that ``pst-ds plan`` predicts with those of a real run on two ranks of one core.

Each run file trains under torchrun with ``train.profile``. Its trace has three parts, seconds of wall-clock time:

* network: a collective is under way;
* products: an operator of torch computes, outside collectives. Operators include their dispatch;
* host: the rest, which is Python, autograd and DeepSpeed's hooks.

The prediction uses rates that two ranks of this machine measure first, and ``host_factor``: the time of this processor
relative to the one of :mod:`pst_ds.planning.host`, which ``python -m tools.bench.host`` tells.

    python -m tools.bench.plan_parts --json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.config.toml import load_run
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.plan import PlanOptions, plan
from tools.bench.ranks import Ranks
from tools.bench.scale_rank import machine_rates
from tools.bench.timing import benchmark_parser, conditions, print_result, progress

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 2
FIRST_STEP = 8
LAST_STEP = 13
"""Profiled steps, before the first mask update: ZeRO-3 records the order of modules in the first ones."""
OF_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Settings of a model's config that come with the tokenizer."""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """A run file of the tests with a larger model of random weights."""

    run_file: str
    model_class: Any
    settings: dict[str, Any]
    """Settings of the model's config that replace those of the run file's model."""


LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip
CASES = {
    "llama": Case("tests/data/causal_lm.toml", AutoModelForCausalLM, LLAMA),
    "bert": Case(
        "tests/data/world_size.toml",
        AutoModelForSequenceClassification,
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
    ),
    "mixture": Case(
        "tests/data/causal_lm.toml",
        AutoModelForCausalLM,
        {"model_type": "olmoe", "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2},
    ),
}  # fmt: skip


def main() -> None:
    arguments = _parser().parse_args()
    models = {}
    for name in arguments.models:
        progress(name)
        with tempfile.TemporaryDirectory() as folder:
            models[name] = _compared(CASES[name], Path(folder), arguments.host_factor)
    print_result({**conditions(ranks=NUM_RANKS, dtype="bfloat16"), "models": models}, as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--host-factor", type=float, default=1.0)
    return parser


def _compared(case: Case, folder: Path, host_factor: float) -> dict[str, Any]:
    """Return seconds of each part, predicted and measured, and their ratio."""
    words = _settings(case, folder)
    rates = _rates(case)
    machine = folder / "machine.toml"
    measured_rates: dict[str, Any] = {
        "flops": rates["flops"],
        "memory_bytes": rates["memory_bytes"],
        "node_bytes": rates["network_bytes"],
        "network_bytes": rates["network_bytes"],
        "latency": rates["latency"],
        "host_factor": host_factor,
    }
    here = replace(MACHINES["cpu"], name="here", source="measured", **measured_rates)
    machine.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in _fields(here).items()))
    run = load_run(case.run_file, words)
    times = plan(run, PlanOptions(ranks=NUM_RANKS, machine=str(machine))).time
    predicted = {"network": times.step_network, "products": times.step_compute, "host": times.step_host}
    predicted["step"] = times.step
    measured = _measured(case, words, folder / "run")
    ratios = {part: predicted[part] / measured[part] for part in predicted}
    return {"rates": rates, "predicted": predicted, "measured": measured, "predicted_over_measured": ratios}


def _fields(machine: Any) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in machine.__dataclass_fields__}


def _settings(case: Case, folder: Path) -> list[str]:
    """Write the model of a case, and return the settings that replace those of its run file."""
    source = load_run(case.run_file, []).model.path
    of_source = AutoConfig.from_pretrained(source)
    model_type = case.settings.get("model_type", of_source.model_type)
    settings = {name: getattr(of_source, name) for name in OF_TOKENIZER if hasattr(of_source, name)} | case.settings
    settings.pop("model_type", None)
    torch.manual_seed(0)
    model = case.model_class.from_config(AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    return [
        f"model.path={json.dumps(str(folder / 'model'))}",
        f"output_dir={json.dumps(str(folder / 'run'))}",
        "deepspeed_config=ds_configs/zero3_cpu.json",
        'train.precision="bf16"',  # that of the measured rates
        "train.num_steps=16",
        "schedule.warmup_fraction=0.9",  # so that the first mask update comes after the profiled steps
        "schedule.cooldown_fraction=0.0",
        f"train.profile=[{FIRST_STEP},{LAST_STEP}]",
    ]


class _Rates:
    """What :func:`tools.bench.scale_rank.machine_rates` needs on each rank. Construction is collective."""

    def __init__(self, job: dict[str, Any]):
        self._job = job

    def measure(self) -> dict[str, float]:
        """Return the rates of all ranks at once. Collective."""
        return machine_rates(self._job)


def _rates(case: Case) -> dict[str, float]:
    run = load_run(case.run_file, [])
    job = {"model": case.settings, "batch": run.micro_batch_size(NUM_RANKS), "sequence": run.data.max_length}
    with Ranks(NUM_RANKS, _Rates, job) as ranks:
        return dict(ranks.call("measure")[0])


def _measured(case: Case, words: list[str], out: Path) -> dict[str, float]:
    """Train, and return the median seconds of each part in the profiled steps of rank 0."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", str(NUM_RANKS), "-m", "pst_ds", "train", case.run_file]
    command += [word for setting in words for word in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    (trace,) = (out / "profile").glob("*rank-00000.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    by_step = [parts_of_step(events, f"step {step}") for step in range(FIRST_STEP, LAST_STEP + 1)]
    return {part: statistics.median(parts[part] for parts in by_step) for part in by_step[0]}


def parts_of_step(events: Iterable[dict[str, Any]], step: str) -> dict[str, float]:
    """Return the seconds of the parts of a step, given the events of a trace, whose times are in microseconds."""
    timed = [event for event in events if event.get("ph") == "X"]
    (region,) = (event for event in timed if event["name"] == step)
    first, last = _interval(region)
    inside = [event for event in timed if first <= event["ts"] and event["ts"] + event["dur"] <= last]
    collectives = [_interval(event) for event in inside if event["name"].startswith("gloo:")]
    operators = [
        _interval(event) for event in inside if event["name"].startswith("aten::") and event["tid"] == region["tid"]
    ]
    network = _covered(collectives)
    both = _covered([*collectives, *operators])
    whole = region["dur"]
    seconds = {"network": network, "products": both - network, "host": whole - both, "step": whole}
    return {part: value / 1e6 for part, value in seconds.items()}


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _covered(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals."""
    total = 0.0
    end = float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


if __name__ == "__main__":
    main()
