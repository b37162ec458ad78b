"""Machines to plan for, and the rates assumed for them.

Data sheets: NVIDIA A100 80 GB (312 TFLOP/s of dense bf16, 19.5 of fp32, 2.039 TB/s, NVLink 300 GB/s a direction), H100
SXM (989, 67, 3.35 TB/s, 450 GB/s), H200 SXM (989, 67, 4.8 TB/s, 450 GB/s), HGX B200 (2,250, 80, 8 TB/s, 900 GB/s); AMD
Instinct MI300X (1,307, 5.3 TB/s, seven Infinity Fabric links of 64 GB/s a direction). Between nodes: one ConnectX-7 of
400 Gb/s a GPU in DGX H100, H200 and B200, 200 Gb/s in DGX A100; the former is taken for MI300X. Memory: 80, 80, 141,
180 (HGX B200) and 192 GB, of which a share is left to the driver, the collectives and fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LAUNCH_SECONDS = 5.5e-6
"""Between two launches of an eager torch program, assumed of every GPU."""
BANDWIDTH_SHARE, INSTRUCTION_SHARE = 0.8, 0.8
"""Of the data sheet's bandwidths, and of the instructions that its fp32 rate stands for."""
MEMORY_SHARE = 0.92
"""Of a device's memory, what is left for a run beside driver, collectives and fragmentation."""
STORAGE_BYTES = 2e9
"""Per second, from and to a shared file system, of the whole run: assumed of every cluster."""
_SHARES = "80 % of all bandwidths, 5 us a hop and 5.5 us a launch are assumed"


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
    source: str = ""
    """Where the rates are from."""
    code: Literal["triton", "torch", "native"] = "triton"
    """What runs there, see :data:`pst_ds.planning.counts.COUNTS`."""
    launch_seconds: float = LAUNCH_SECONDS
    """Between two launches of the host."""
    instructions: float = 0.0
    """Per second, a lane each, for the kernel that scores weights; 0: memory decides."""
    update_seconds: float = 0.0
    """Scoring and selecting one weight of the shard in a mask update, if measured; 0: by its bytes and launches."""
    overlaps: bool = True
    """True where communication overlaps computation."""
    capacity: float = 0.0
    """Bytes of memory that a rank may take; 0 where that is not known."""
    peak_flops: float = 0.0
    """16-bit matrix products per second on the data sheet; 0 where there is none."""
    storage_bytes: float = STORAGE_BYTES
    """Read or written per second by the whole run, of models and checkpoints."""

    @property
    def device(self) -> str:
        """Return the kind of device that ranks compute on."""
        return "cpu" if self.code == "native" else "cuda"

    @property
    def backend(self) -> str:
        """Return the library of the collectives."""
        return "gloo" if self.code == "native" else "nccl"

    def transfer_seconds(self, received: float, collectives: float, world_size: int) -> float:
        """Time rings over all ranks: the slowest link decides, and every collective passes every node once."""
        if world_size == 1:
            return 0.0
        nodes = math.ceil(world_size / self.node_size)
        hops = nodes if nodes > 1 else world_size - 1
        return received / (self.network_bytes if nodes > 1 else self.node_bytes) + collectives * hops * self.latency


def _gpu(
    name: str,
    *,
    flops: float,
    share: float,
    memory: float,
    link: float,
    network: float,
    gb: float,
    fp32: float = 0.0,
    code: Literal["triton", "torch"] = "triton",
) -> Machine:
    """Return a machine of eight GPUs a node from data sheet rates, of whose products it reaches ``share``."""
    return Machine(
        name=f"8 x {name} a node, {network * 8 / 1e9:.0f} Gb/s a GPU between nodes",
        flops=share * flops,
        memory_bytes=BANDWIDTH_SHARE * memory,
        node_size=8,
        node_bytes=BANDWIDTH_SHARE * link,
        network_bytes=BANDWIDTH_SHARE * network,
        latency=5e-6,
        source=f"{name} data sheet: {flops / 1e12:,.0f} TFLOP/s of dense bf16, {memory / 1e12:.4g} TB/s, "
        f"{link / 1e9:.0f} GB/s a direction in the node; {share * 100:.0f} % of the products, {_SHARES}",
        code=code,
        instructions=INSTRUCTION_SHARE * fp32 / 2,
        capacity=MEMORY_SHARE * gb * 1e9,
        peak_flops=flops,
    )


MACHINES = {
    "h100": _gpu("H100 SXM", flops=989e12, share=0.63, memory=3.35e12, link=450e9, network=50e9, gb=80, fp32=67e12),
    "h200": _gpu("H200 SXM", flops=989e12, share=0.63, memory=4.8e12, link=450e9, network=50e9, gb=141, fp32=67e12),
    "b200": _gpu("B200 SXM", flops=2250e12, share=0.63, memory=8e12, link=900e9, network=50e9, gb=180, fp32=80e12),
    "a100": _gpu(
        "A100 80 GB SXM", flops=312e12, share=0.7, memory=2.039e12, link=300e9, network=25e9, gb=80, fp32=39e12
    ),
    "mi300x": _gpu("MI300X", flops=1307e12, share=0.45, memory=5.3e12, link=448e9, network=50e9, gb=192, code="torch"),
    "cpu": Machine(
        name="one core of an AMD EPYC with AVX-512-BF16 a rank, gloo on one host",
        flops=280e9,
        memory_bytes=40e9,
        node_size=1 << 30,
        node_bytes=0.6e9,
        network_bytes=0.6e9,
        latency=2e-4,
        source="measured by tools.bench.scale on two free cores: products at 128 tokens, copies, gathers of two "
        "ranks, an all-reduce of one number, and the native scoring of a mask update (2.2 ns at 7B)",
        code="native",
        launch_seconds=0.0,
        update_seconds=3e-9,
        overlaps=False,
    ),
}
"""By name. An A100's schedulers issue twice the instructions of its fp32 rate, to integer units too."""
