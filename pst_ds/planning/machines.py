"""Machines that a plan can be made for, and the rates assumed of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that one rank of a kind of cluster reaches."""

    name: str
    flops: float
    """16-bit matrix products, per second."""
    memory_bytes: float
    """Read or written per second."""
    node_size: int
    """Ranks that share the faster links."""
    node_bytes: float
    """Received per second and rank from ranks of the same node."""
    network_bytes: float
    """Received per second and rank from other nodes."""
    latency: float
    """Seconds a hop of a collective takes between nodes."""
    update_seconds: float
    """Scoring and selecting one weight of the shard, in a mask update."""
    overlaps: bool
    """True where communication overlaps computation."""
    source: str

    def transfer_seconds(self, received: float, collectives: float, world_size: int) -> float:
        """Time rings over all ranks: the slowest link decides, and every collective passes every node once."""
        if world_size == 1:
            return 0.0
        nodes = math.ceil(world_size / self.node_size)
        hops = nodes if nodes > 1 else world_size - 1
        return received / (self.network_bytes if nodes > 1 else self.node_bytes) + collectives * hops * self.latency


MACHINES = {
    "h100": Machine(
        name="8 x H100 SXM a node, 400 Gb/s InfiniBand a GPU",
        flops=0.40 * 989e12,
        memory_bytes=0.8 * 3.35e12,
        node_size=8,
        node_bytes=0.8 * 450e9,
        network_bytes=0.8 * 50e9,
        latency=5e-6,
        update_seconds=20 / (0.8 * 3.35e12),
        overlaps=True,
        source="NVIDIA H100 data sheet (989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 450 GB/s a direction) and DGX H100 "
        "guide (one ConnectX-7 of 400 Gb/s a GPU); 40 % of the FLOPs, as Llama 3 (arXiv 2407.21783, table 4: 38 to "
        "43 %), 80 % of every bandwidth, 5 us a hop and 20 bytes a scored weight assumed",
    ),
    "a100": Machine(
        name="8 x A100 80 GB SXM a node, 200 Gb/s InfiniBand a GPU",
        flops=0.45 * 312e12,
        memory_bytes=0.8 * 2.039e12,
        node_size=8,
        node_bytes=0.8 * 300e9,
        network_bytes=0.8 * 25e9,
        latency=5e-6,
        update_seconds=20 / (0.8 * 2.039e12),
        overlaps=True,
        source="NVIDIA A100 80 GB data sheet (312 TFLOP/s bf16 dense, 2.039 TB/s, NVLink 300 GB/s a direction) and DGX "
        "A100 guide (200 Gb/s a GPU); 45 % of the FLOPs, 80 % of every bandwidth, 5 us a hop, 20 bytes a scored weight "
        "assumed",
    ),
    "cpu": Machine(
        name="one core of an AMD EPYC with AVX-512-BF16 a rank, gloo on one host",
        flops=280e9,
        memory_bytes=40e9,
        node_size=1 << 30,
        node_bytes=0.6e9,
        network_bytes=0.6e9,
        latency=2e-4,
        update_seconds=3e-9,
        overlaps=False,
        source="measured by tools.bench.scale on two free cores: products at 128 tokens, copies, gathers of two "
        "ranks, an all-reduce of one number, and the native scoring of a mask update (2.2 ns at 7B)",
    ),
}
