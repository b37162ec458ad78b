"""Machines to plan for: a table of assumed rates, and TOML files with a user's rates.

Data sheets: NVIDIA A100 80 GB (312 TFLOP/s of dense bf16, 19.5 of fp32, 2.039 TB/s, NVLink 300 GB/s a direction), H100
SXM (989, 67, 3.35 TB/s, 450 GB/s), H200 SXM (989, 67, 4.8 TB/s, 450 GB/s), HGX B200 (2,250, 80, 8 TB/s, 900 GB/s); AMD
Instinct MI300X (1,307, 5.3 TB/s, seven Infinity Fabric links of 64 GB/s a direction). Between nodes: one ConnectX-7 of
400 Gb/s per GPU in DGX H100, H200 and B200, 200 Gb/s in DGX A100; 400 Gb/s is assumed for MI300X. Memory: 80, 80, 141,
180 (HGX B200) and 192 GB, of which a share is left to the driver, the collectives and fragmentation.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt

from pst_ds.config.settings import FINITE, ConfigError, Positive, Rate, settings
from pst_ds.errors import InputError, first_line

_Above0 = Annotated[float, Gt(0.0), FINITE]

LAUNCH_SECONDS = 5.5e-6
"""Seconds between two launches of an eager torch program, assumed for every GPU."""
BANDWIDTH_SHARE, INSTRUCTION_SHARE = 0.8, 0.8
"""Shares of the data sheet's bandwidths, and of the instructions that its fp32 rate implies, that a run reaches."""
MEMORY_SHARE = 0.92
"""Share of a device's memory that driver, collectives and fragmentation leave to a run."""
STORAGE_BYTES = 2e9
"""Bytes per second of the whole run, from and to a shared file system: assumed for every cluster."""
_SHARES = "80 % of all bandwidths, 5 us a hop and 5.5 us a launch are assumed"


@settings
class Machine:
    """Rates that one rank of a cluster reaches."""

    name: str
    flops: _Above0
    """FLOP/s of 16-bit matrix products."""
    memory_bytes: _Above0
    """Bytes of memory read or written per second."""
    node_size: Positive
    """Ranks that share the faster links."""
    node_bytes: _Above0
    """Bytes received per second and rank from ranks of the same node."""
    network_bytes: _Above0
    """Bytes received per second and rank from other nodes."""
    latency: Rate
    """Seconds per hop of a collective between nodes."""
    source: str = ""
    """Origin of the rates."""
    code: Literal["triton", "torch", "native"] = "triton"
    """Implementation that runs there, see :data:`pst_ds.planning.time.COUNTS`."""
    launch_seconds: Rate = LAUNCH_SECONDS
    """Seconds between two launches of the host."""
    instructions: Rate = 0.0
    """Instructions per second, one lane each, of the kernel that scores weights; 0 where memory decides."""
    update_seconds: Rate = 0.0
    """Measured seconds to score and select one weight of the shard in a mask update; 0 to predict them."""
    overlaps: bool = True
    """True if communication overlaps computation."""
    capacity: Rate = 0.0
    """Bytes of memory that a rank may use; 0 if unknown."""
    peak_flops: Rate = 0.0
    """FLOP/s of 16-bit matrix products on the data sheet; 0 without one."""
    storage_bytes: _Above0 = STORAGE_BYTES
    """Bytes of models and checkpoints that the whole run reads or writes per second."""

    @property
    def device(self) -> str:
        """Type of the device that ranks compute on."""
        return "cpu" if self.code == "native" else "cuda"

    @property
    def backend(self) -> str:
        """Backend of the collectives."""
        return "gloo" if self.code == "native" else "nccl"

    def transfer_seconds(self, received: float, collectives: float, world_size: int) -> float:
        """Time ring collectives over all ranks: the slowest link decides, and each passes every node once."""
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
    """Return a machine with eight GPUs per node, which reaches ``share`` of the data sheet's FLOP/s."""
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
"""Machines by name. An A100's schedulers issue twice the instructions of its fp32 rate, to integer units too."""


def machine_of(name: str) -> Machine:
    """Return the machine that ``--machine`` names: one of :data:`MACHINES`, or a TOML file. Raises InputError."""
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".toml"):
        raise InputError(
            f"--machine {name!r} is not a machine. Choose from {', '.join(MACHINES)}, or name a TOML file with your "
            "rates, whose name ends in .toml (docs/how-to/large-models.md)"
        )
    return read_machine(Path(name))


def read_machine(path: Path) -> Machine:
    """Read a Machine, its fields as keys, from a TOML file. Raises InputError with the file, key, value and fix."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"--machine {str(path)!r} cannot be read ({reason}). Name a TOML file of rates") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"--machine {path} is not TOML: {first_line(error)}. See docs/how-to/large-models.md for an example"
        ) from None
    required = {field.name: field.default is MISSING for field in fields(Machine)}
    if missing := [name for name in required if required[name] and name not in table]:
        unknown = [key for key in table if key not in required]
        also = f" ({', '.join(unknown)} unknown)" if unknown else ""
        raise InputError(
            f"{path}: {', '.join(missing)} missing{also}. Set them as docs/how-to/large-models.md describes"
        )
    try:
        return Machine(**table)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
