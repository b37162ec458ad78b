"""``pst-ds plan --search``: the same batch cut and stored in other ways, and which of them is the fastest that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pst_ds.cli.plan_text import Plan
from pst_ds.cli.plan_values import Ask, make_plan
from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.planning.activations import Trace
from pst_ds.progress import Progress
from pst_ds.text_table import aligned, bytes_text

_SHOWN = 5
HPZ = "zero_hpz_partition_size"
"""Ranks of ZeRO++'s second copy of the weights: those of a node, so that the backward pass gathers inside it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run."""

    accumulation: int
    checkpointing: bool
    shared_by: int
    """Ranks that share a sequence."""
    partition: int
    """Of :data:`HPZ`; 1 for none."""

    def of(self, run: RunConfig) -> RunConfig:
        """Return ``run`` with these settings. Raises ConfigError where they do not go together."""
        train = replace(
            run.train, gradient_accumulation_steps=self.accumulation, sequence_parallel=self.shared_by
        )  # fmt: skip
        keeps = self.checkpointing
        model = replace(
            run.model,
            gradient_checkpointing=keeps,
            gradient_checkpointing_reentrant=keeps and run.model.gradient_checkpointing_reentrant,
            activation_offload=keeps and run.model.activation_offload,
        )
        return replace(run, train=train, model=model)

    @property
    def zero(self) -> dict[str, int]:
        """Return what ``zero_optimization`` of the DeepSpeed JSON has more."""
        return {} if self.partition == 1 else {HPZ: self.partition}

    @property
    def settings(self) -> dict[str, str]:
        """Return what ``--set`` takes."""
        return {
            "train.gradient_accumulation_steps": str(self.accumulation),
            "train.sequence_parallel": str(self.shared_by),
            "model.gradient_checkpointing": str(self.checkpointing).lower(),
        }


def search(run: RunConfig, ask: Ask, plan: Plan, node_size: int) -> list[Plan]:
    """Plan every :func:`choice <choices>` for the ranks of ``plan``; return those that can be, the best one first.

    Whoever fits comes before who does not, then who ends earlier, then who takes less memory. A micro-batch is traced
    once for all choices that have it.
    """
    found, traces, refused = [], dict[tuple[int, bool, int], Trace | None](), set[int]()
    wanted = list(choices(run, plan, node_size))
    with Progress("search", len(wanted), "plans") as progress:
        for number, choice in enumerate(wanted, 1):
            key = choice.accumulation, choice.checkpointing, choice.shared_by
            planned = None
            if choice.shared_by not in refused:
                try:
                    planned = make_plan(choice.of(run), replace(ask, trace=traces.get(key), zero=choice.zero))
                except InputError:  # such as attention heads that ranks cannot share; larger micro-batches no more
                    refused.add(choice.shared_by)
            if planned is not None:
                traces[key] = Trace(**planned["trace"]) if planned["trace"] else None
                found.append(_line(choice, planned))
            progress.at(number)
    return sorted(found, key=lambda line: (line["fits"] is False, line["hours"], line["needed_bytes"]))


def choices(run: RunConfig, plan: Plan, node_size: int) -> Iterator[Choice]:
    """Yield the ways to cut the batch of ``run`` over the ranks of ``plan``, and to store what it takes; smaller
    micro-batches first."""
    ranks, at_stage_3 = plan["ranks"], plan["zero_stage"] == 3
    powers = [1 << i for i in range(run.train.batch_size.bit_length())]
    shared = [n for n in powers if ranks % n == 0] if at_stage_3 and run.task_facts.predicts_tokens else [1]
    partitions = [1, node_size] if at_stage_3 and node_size < ranks and ranks % node_size == 0 else [1]
    for degree, steps in itertools.product(shared, reversed(powers)):
        if degree <= run.data.max_length and steps * ranks // degree <= run.train.batch_size:
            for checkpointing, partition in itertools.product((False, True), partitions):
                yield Choice(steps, checkpointing, degree, partition)


def _line(choice: Choice, plan: Plan) -> Plan:
    judged = plan["verdict"]
    return {
        "settings": choice.settings,
        "zero_optimization": choice.zero,
        "micro_batch_size": plan["micro_batch_size"],
        "peak_bytes": plan["memory_bytes_per_rank"]["peak"],
        "needed_bytes": judged["needed_bytes"],
        "fits": judged["fits"],
        "step": plan["time"]["step"],
        "tokens_per_second": judged["tokens_per_second"],
        "hours": judged["hours"],
    }


def print_search(lines: list[Plan]) -> None:
    """Print the first few, and how to take the first."""
    head = ("", "micro-batch", "accumulated", "checkpointed", "ranks a sequence", "hpZ", "memory", "fits", "tokens/s")
    rows = [head]
    for number, line in enumerate(lines[:_SHOWN], 1):
        steps, degree, checkpointed = line["settings"].values()
        fits = {True: "yes", False: "no", None: "?"}[line["fits"]]
        rows.append((
            str(number), str(line["micro_batch_size"]), steps, "yes" if checkpointed == "true" else "no", degree,
            str(line["zero_optimization"].get(HPZ, "-")), bytes_text(line["needed_bytes"]), fits,
            f"{line['tokens_per_second']:,.0f}",
        ))  # fmt: skip
    print(f"of {len(lines)} ways to run the same batch, the best:")
    print("\n".join(f"  {row}" for row in aligned(rows)))
    best = lines[0]
    print("the first: " + " ".join(f"--set {name}={value}" for name, value in best["settings"].items()))
    if best["zero_optimization"]:
        print(f'and in "zero_optimization" of the DeepSpeed JSON: {best["zero_optimization"]}'.replace("'", '"'))
    if best["fits"] is False:
        print("none fits: take more ranks, a smaller batch, shorter sequences, or offload_param in the DeepSpeed JSON")
