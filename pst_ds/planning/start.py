"""Memory, time and traffic of the one-shot pruning before a run, computed from shapes."""

from dataclasses import dataclass
from typing import NamedTuple

from pst_ds.config.one_shot import PruneConfig
from pst_ds.core.one_shot.alps import GRADIENT_STEPS, PENALTIES, ROUNDS_PER_PENALTY
from pst_ds.planning.machines import MACHINES, Machine
from pst_ds.prune.blocks import PIECE_TOKENS
from pst_ds.prune.output_gradients import PIECES, STORED_BYTES
from pst_ds.prune.statistics import STATISTICS_BYTES
from pst_ds.writing.plan import SHARD_BYTES

# measured on a CPU, assumed on CUDA
RUNTIME_BYTES = {"cpu": 160 << 20, "cuda": 600 << 20}
"""Memory besides tensors, above the imports."""
ELEMENTWISE = {"cpu": 0.17, "cuda": 1.0}
"""Share of the bandwidth that unfused operators with new results reach."""
FP32 = {"cpu": 0.37, "cuda": 1 / 16}
"""Rate of fp32 products, relative to 16-bit ones."""
FACTORISATION = 0.7
"""Rate of Cholesky factors, relative to fp32 products."""
READ_BYTES = 2e9
"""Bytes per second from the page cache."""
SCORE_SECONDS = 20e-9
"""Seconds to score a weight for budgets."""
# Bytes that a round of ALPS and a gradient step move per weight, besides products.
ROUND_BYTES = 155
GRADIENT_BYTES = 60


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of the one-shot pruning before a run, on the fullest rank."""

    memory: dict[str, float]
    """Bytes of parts, some at different times; "host", what stays there with a GPU; "peak" of the GPU or process."""
    time: dict[str, float]
    """Seconds by phase, and in "all"."""
    traffic: dict[str, float]
    """Bytes read from files, received, and written by all ranks."""


class InputGroup(NamedTuple):
    """Matrices with the same inputs, which are pruned together: of linear layers, or of each of several experts."""

    outputs: int
    inputs: int
    experts: int = 1

    @property
    def sums(self) -> int:
        """Bytes of X'X in fp64: panels of 256 rows, without what mirrors them."""
        return 4 * self.inputs * (self.inputs + 256) * self.experts


class BlockSizes(NamedTuple):
    """Parameters of the largest of several blocks, and outside of them all."""

    blocks: int
    numel: int
    active_share: float
    groups: tuple[InputGroup, ...]
    largest_layer: int
    outside: int
    width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        return sum(g.outputs * g.inputs * g.experts for g in self.groups)


class StartData(NamedTuple):
    """Settings and examples of a start, and bytes of a value in the files and where blocks compute."""

    config: PruneConfig
    ranks: int
    length: int
    batch: int
    itemsizes: tuple[int, int]

    @property
    def piece_tokens(self) -> int:
        return min(self.batch, max(1, PIECE_TOKENS // self.length)) * self.length

    @property
    def steps(self) -> int:
        return self.config.reconstruct * -(-self.config.samples // self.batch)

    @property
    def uses_products(self) -> bool:
        return self.config.method in ("alps", "sparsegpt")

    def pieces(self, examples: int, most: int = 1 << 60) -> int:
        """Return this rank's pieces of so many examples, or of at most ``most`` of all pieces."""
        every = -(-examples * self.length // self.piece_tokens)
        return -(-every // (-(-every // most) * self.ranks))


def start_plan(block: BlockSizes, data: StartData, machine: Machine) -> Cost:
    """Predict the cost of a start on ``machine``."""
    config = data.config
    ranks = data.ranks
    groups = block.groups
    stored, size = data.itemsizes
    model = stored * (block.outside + block.blocks * block.numel)
    steps = data.steps
    kept = block.weights * (1 - (config.sparsity or 0.0))
    is_alps = config.method == "alps"
    # The pruned block; per step of reconstruct 64-bit sums of gradients and the moved weights; and Gram matrices.
    received = size * block.weights + steps * kept * (8 + size) + 2 * data.uses_products * sum(g.sums for g in groups)
    # ALPS's inverses in fp32, one per penalty; experts are dealt whole, so theirs stay on a rank.
    received += 4 * PENALTIES * is_alps * sum(g.inputs**2 for g in groups if g.experts == 1)
    received *= block.blocks * (ranks - 1) / ranks  # a rank has its own share already
    read = model * (1 + (2 + 1 / ranks) * (config.budgets == "saliency"))
    collectives = block.blocks * len(groups) * (2 * ranks + 3 * steps + 150)
    seconds = {phase: block.blocks * value for phase, value in _seconds(block, data, machine, kept).items()}
    seconds["files"] = read / READ_BYTES + 2 * model / machine.storage_bytes
    seconds["network"] = machine.transfer_seconds(received, collectives, ranks)
    return Cost(
        memory=dict(_memory(block, data, machine.device, model, kept)),
        time=seconds | {"all": sum(seconds.values())},
        traffic={"read": read, "received": received, "written": model},
    )


def _memory(block: BlockSizes, data: StartData, device: str, model: int, kept: float) -> dict[str, int]:
    config = data.config
    stored, size = data.itemsizes
    on_gpu = device != "cpu"
    block_bytes = stored * block.numel
    states = data.piece_tokens * block.width * size
    is_saliency = config.budgets == "saliency"
    activations = 2 * size * data.piece_tokens * sum(g.outputs + g.inputs for g in block.groups)
    # inputs of all blocks; logits, their logarithms and two gradients in fp32
    held = max(1, min(data.pieces(config.samples, PIECES), STORED_BYTES // (block.blocks * states)))
    logits = data.piece_tokens * block.vocabulary * (size + 12)
    budgets = held * (block.blocks + 2) * states + max(logits, block_bytes + activations)
    # values; places, gradients of pieces, a share of four fp32 numbers, and five 64-bit numbers of one layer
    each = 4 + size * data.pieces(data.batch) + 16 / data.ranks + 40 * block.largest_layer / block.weights
    fit = 0
    if config.reconstruct:
        fit = round(block.weights * size + kept * each + activations)
    pruning = 0
    sums = 0
    # Groups are pruned in order and their sums freed, so a group's peak comes on top of the sums of those after it.
    for g in reversed(block.groups):
        rows = g.outputs * g.inputs / (data.ranks if g.experts == 1 else 1)
        square = g.inputs**2 * data.uses_products
        # H in fp64, damped; then in fp32, its factor and inverses of two penalties; W, W H, scores and masks of a share
        most = max(20 * square, 24 * square + 13 * rows, 4 * square + 18 * rows)
        pruning = max(pruning, round(most) + 4 * g.outputs * g.inputs * is_saliency + sums)
        group_sums = g.sums
        if g.experts > 1:
            group_sums = min(g.sums, STATISTICS_BYTES)
        sums += group_sums * data.uses_products
    parts = {
        "outside_of_blocks": stored * block.outside, "block": block_bytes, "libraries": RUNTIME_BYTES[device],
        "hidden_states": data.pieces(config.samples) * states * (2 if config.reconstruct else 1),
        "copy_of_block": size * block.numel if on_gpu or size != stored else 0,
        "budgets": budgets * is_saliency, "statistics": sums * 3 // 2 + activations // 2, "pruning": pruning,
        "fit": fit, "last_file": model if model <= SHARD_BYTES else block_bytes,
    }  # fmt: skip
    working = parts["copy_of_block"] + max(parts["statistics"], pruning, fit)
    pruned = block_bytes + parts["hidden_states"] + working * (not on_gpu)
    host = parts["outside_of_blocks"] + max(pruned, parts["budgets"], parts["last_file"])
    return parts | {"host": host * on_gpu, "peak": parts["libraries"] + (working if on_gpu else host)}


def _seconds(block: BlockSizes, data: StartData, machine: Machine, kept: float) -> dict[str, float]:
    """Return the seconds of computation per block."""
    config = data.config
    ranks = data.ranks
    groups = block.groups
    rows = block.weights / data.ranks
    moved = machine.memory_bytes * ELEMENTWISE[machine.device]
    fp32 = machine.flops * FP32[machine.device]
    token = 2 * block.numel * block.active_share / machine.flops
    pieces = data.pieces(config.samples)
    forward = pieces * data.piece_tokens * token
    budgets = 0.0
    fit = 0.0
    statistics = forward * (1 if config.reconstruct else 2)
    pruning = rows * ROUND_BYTES / moved
    if data.uses_products:
        products = pieces * data.piece_tokens / 4 / fp32
        statistics += sum(g.sums * (products / g.experts + (6 * pieces + 30) / moved) for g in groups)
        is_alps = config.method == "alps"
        rounds = PENALTIES * ROUNDS_PER_PENALTY
        # SparseGPT: one product's worth of updates, and a factor, an inverse and the factor of that.
        num_products = 1
        num_inverses = 3
        passes = 1.0
        if is_alps:
            num_products = rounds + GRADIENT_STEPS + 2
            num_inverses = PENALTIES
            passes = rounds + GRADIENT_STEPS * GRADIENT_BYTES / ROUND_BYTES
        flops = 2 * num_products / ranks * sum(g.outputs * g.inputs**2 * g.experts for g in groups)
        cubes = 0
        for g in groups:
            # ranks share the inverses of one matrix, and whole experts
            inverses_here = -(-num_inverses // ranks) if g.experts == 1 else num_inverses * -(-g.experts // ranks)
            cubes += g.inputs**3 * inverses_here
        flops += cubes / FACTORISATION
        pruning = flops / fp32 + pruning * passes
    if config.budgets == "saliency":  # the head stays on the host
        host = MACHINES["cpu"] if machine.device != "cpu" else machine
        head = 6 * block.vocabulary * block.width / host.flops / block.blocks
        budgets = data.pieces(config.samples, PIECES) * data.piece_tokens * (3 * token + head) + SCORE_SECONDS * rows
    if config.reconstruct:
        pieces = data.pieces(data.batch)
        rounded = kept * (64 * pieces + 46 + 134 / ranks) + block.weights * 20 * (pieces + 1)
        fit = data.steps * (3 * pieces * data.piece_tokens * token + rounded / moved)
        fit += 2 * forward + 60 * block.weights / moved
    return {"budgets": budgets, "statistics": statistics, "pruning": pruning, "fit": fit}
