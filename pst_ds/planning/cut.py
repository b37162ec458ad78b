"""Memory, time and traffic of a cut before a run, computed from shapes (docs/how-to/shapes.md)."""

from typing import NamedTuple, Self

from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.channels import COLUMNS_AT_ONCE
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.targets import resolve_targets
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
        one = layout.expert
        return cls(one.out_features, one.in_features, smaller.expert.in_features, layout.num_experts)

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
    smaller = {layer.name: layer.layout for layer in resolve_targets(bare_model(run, config.ffn), PSTConfig())}
    first = [layer for layer in layers if block_of(layer.name, stack) == 0]
    every = [_Fitted.of(layer.layout, smaller.get(layer.name, layer.layout)) for layer in first]
    fitted = [one for one in every if one.kept < one.inputs]
    number = len(blocks)
    whole, inside = (stored * sum(p.numel() for p in part.parameters()) for part in (model, blocks))
    tokens = data.pieces(config.samples) * data.piece_tokens
    token = 2 * met_weights(model, layers) / machine.flops
    sums = sum(one.sums for one in fitted)
    width = model_width(model)
    memory = {
        "outside_of_blocks": whole - inside, "block": inside // number, "libraries": RUNTIME_BYTES[machine.device],
        "hidden_states": tokens * width * size, "statistics": sums * 3 // 2,
        "removal": max((48 * one.inputs**2 + 24 * one.inputs * one.outputs for one in fitted), default=0),
    }  # fmt: skip
    fp32 = machine.flops * FP32[machine.device]
    seconds = dict[str, float]()
    passes = 2 - 1 / number
    attention = number * 4 * data.length * width / fp32
    products = number * sum(i.inputs**2 for i in fitted) / fp32
    seconds["statistics"] = tokens * (passes * (token + attention) + products)
    seconds["removal"] = number * sum(-(-i.experts // data.ranks) * i.seconds(machine) for i in fitted)
    received = number * 2.0 * sums * (data.ranks - 1) / data.ranks
    seconds["files"] = whole / READ_BYTES + whole / machine.storage_bytes
    seconds["network"] = machine.transfer_seconds(received, number * 20, data.ranks)
    working = memory["hidden_states"] + max(memory["statistics"], memory["removal"]) + memory["block"]
    host = memory["outside_of_blocks"] + working * (machine.device == "cpu")
    peak = memory["libraries"] + (host if machine.device == "cpu" else working)
    return Cost(
        memory={**memory, "peak": float(peak)},
        time=seconds | {"all": sum(seconds.values())},
        traffic={"read": float(whole), "received": received, "written": float(whole)},
    )
