"""Sizes, a clock and the rates that the sections of tools.gpu share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.planning.machines import MACHINES, Machine
from tools.bench.timing import medians


@dataclass(frozen=True)
class Sizes:
    """What is measured; of a dry run as little as goes through every section."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 2
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 4096
    updates: tuple[int, ...] = (1024, 4096, 8192)
    """Sides of the matrices that masks are chosen for."""
    matrix: tuple[int, int] = (11008, 4096)
    """Of one layer's kernels and products."""
    repeats: int = 20


TINY = Sizes(64, 96, 1, 4, 50, 16, (32, 48, 64), (96, 64), 2)


@dataclass(frozen=True)
class Bench:
    """Where a section runs, and with what."""

    device: torch.device
    sizes: Sizes
    machine: Machine

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median time of ``run`` until the device is done, after two that are not counted."""

        def until_done() -> None:
            run()
            self.wait()

        self.wait()
        return medians({"run": until_done}, self.sizes.repeats, warmup=2)["run"]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def llama(self) -> LlamaForCausalLM:
        """Return a Llama with random weights in bf16, the same in every call."""
        s = self.sizes
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers, use_cache=False,
            num_attention_heads=s.heads, num_key_value_heads=s.heads, vocab_size=s.vocabulary,
        )  # fmt: skip
        with self.device:
            return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def machine_of_card(name: str) -> Machine:
    """Return the rates of a card by its name; an H100's for one that has none of its own."""
    low = name.lower()
    return next((machine for key, machine in MACHINES.items() if key in low), MACHINES["h100"])
