"""Memory, time and traffic of a cut before a run, computed from shapes (docs/how-to/shapes.md)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.channels import COLUMNS_AT_ONCE
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.targets import Target, resolve_targets
from pst_ds.planning.machines import Machine
from pst_ds.planning.speedup import bare_model, met_weights
from pst_ds.planning.start import ELEMENTWISE, FACTORISATION, FP32, READ_BYTES, RUNTIME_BYTES, Cost, StartData
from pst_ds.prune.blocks import block_of, find_blocks

FP64 = 0.5
"""Rate of fp64 products, relative to fp32 ones."""


class _Fitted(NamedTuple):
    """Matrices of a block that lose inputs, and are fitted to what they keep."""

    outputs: int
    inputs: int
    kept: int
    experts: int

    @classmethod
    def of(cls, layout: WeightLayout, smaller: WeightLayout) -> Self:
        return cls(
            outputs=layout.expert.out_features,
            inputs=layout.expert.in_features,
            kept=smaller.expert.in_features,
            experts=layout.num_experts,
        )

    @property
    def sums(self) -> int:
        """Bytes of X'X in fp64."""
        return 8 * self.inputs**2 * self.experts

    def seconds(self, machine: Machine) -> float:
        """Time one matrix on one rank: an inverse that every round of removals updates, and the fit."""
        bandwidth = machine.memory_bytes * ELEMENTWISE[machine.device]
        fp64 = machine.flops * FP32[machine.device] * FP64
        rounds = (self.inputs - self.kept) / COLUMNS_AT_ONCE
        updates = rounds * 24 * self.inputs * (self.inputs + self.outputs) / bandwidth
        chosen = self.inputs**3 / FACTORISATION / fp64 + updates
        fit = 2 / 3 * self.kept**3 + 2 * self.kept * self.outputs * (self.kept + self.inputs)
        return chosen + (fit + 4 * self.outputs * self.inputs**2) / fp64


def cut_plan(run: RunConfig, data: StartData, machine: Machine) -> Cost:
    """Predict the cost of a cut on ``machine``.

    Raises InputError for what the config of the model cannot express.
    """
    config = data.config
    stored, size = data.itemsizes
    model = bare_model(run, None)
    layers = resolve_targets(model, PSTConfig())
    stack, blocks = find_blocks(model, [layer.name for layer in layers])
    num_blocks = len(blocks)
    # all blocks are alike, so the first is counted for each
    first = [layer for layer in layers if block_of(layer.name, stack) == 0]
    fitted = _fitted(run, config.ffn, first)
    whole = stored * _numel(model)
    inside = stored * _numel(blocks)
    width = model_width(model)
    tokens = data.pieces(config.samples) * data.piece_tokens
    sums = sum(matrix.sums for matrix in fitted)
    removals = [48 * matrix.inputs**2 + 24 * matrix.inputs * matrix.outputs for matrix in fitted]
    memory = {
        "outside_of_blocks": whole - inside,
        "block": inside // num_blocks,
        "libraries": RUNTIME_BYTES[machine.device],
        "hidden_states": tokens * width * size,
        "statistics": sums * 3 // 2,
        "removal": max(removals, default=0),
    }
    received = num_blocks * 2.0 * sums * (data.ranks - 1) / data.ranks
    fp32 = machine.flops * FP32[machine.device]
    token = 2 * met_weights(model, layers) / machine.flops
    attention = num_blocks * 4 * data.length * width / fp32
    products = num_blocks * sum(matrix.inputs**2 for matrix in fitted) / fp32
    # each block runs before its cut, and again behind it for the next one, except the last
    passes = 2 - 1 / num_blocks
    removal = 0.0
    for matrix in fitted:
        # ranks share the experts of a layer, and one of them cuts a layer without experts
        experts_here = -(-matrix.experts // data.ranks)
        removal += num_blocks * experts_here * matrix.seconds(machine)
    seconds = {
        "statistics": tokens * (passes * (token + attention) + products),
        "removal": removal,
        "files": whole / READ_BYTES + whole / machine.storage_bytes,
        "network": machine.transfer_seconds(received, num_blocks * 20, data.ranks),
    }
    return Cost(
        memory={**memory, "peak": float(_peak(memory, machine.device))},
        time=seconds | {"all": sum(seconds.values())},
        traffic={"read": float(whole), "received": received, "written": float(whole)},
    )


def _fitted(run: RunConfig, ffn: float | None, layers: Sequence[Target]) -> list[_Fitted]:
    """Return the matrices of ``layers`` that lose inputs if the feed-forward channels are cut to the share ``ffn``."""
    smaller = {layer.name: layer.layout for layer in resolve_targets(bare_model(run, ffn), PSTConfig())}
    fitted = []
    for layer in layers:
        matrix = _Fitted.of(layer.layout, smaller.get(layer.name, layer.layout))
        if matrix.kept < matrix.inputs:
            fitted.append(matrix)
    return fitted


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _peak(memory: Mapping[str, int], device: str) -> int:
    """Return the peak of the GPU, or on a CPU of the process."""
    # inputs are removed after the statistics are complete, so their temporaries are there at different times
    working = memory["hidden_states"] + max(memory["statistics"], memory["removal"]) + memory["block"]
    if device == "cpu":
        working += memory["outside_of_blocks"]
    return memory["libraries"] + working
