"""Machines to plan for: the rates in machines.toml, and TOML files with a user's rates."""

import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt

from pst_ds.config.settings import FINITE, ConfigError, Positive, Rate, settings
from pst_ds.errors import InputError, first_line
from pst_ds.parallel.links import Group, Received

_Above0 = Annotated[float, Gt(0.0), FINITE]


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
    """Bytes received per second and rank from other nodes, while all ranks of the node receive some."""
    latency: Rate
    """Seconds per hop of a collective between nodes."""
    source: str = ""
    """Origin of the rates."""
    code: Literal["triton", "torch", "native"] = "triton"
    """Implementation that runs there, see :data:`pst_ds.planning.time.COUNTS`."""
    launch_seconds: Rate = 5.5e-6
    """Seconds between two launches of the host; the default is that of eager torch programs on GPUs."""
    triton_launch_seconds: Rate = 2e-5
    """The same for a Triton kernel; its launcher took 17 us (merge) to 31 us (scores) on a loaded AMD EPYC."""
    host_factor: Rate = 1.0
    """Time that Python takes on the host, relative to the AMD EPYC (Zen 4) of :mod:`pst_ds.planning.host`. Processors
    of GPU servers are assumed to be as fast as that one; ``python -m tools.bench.host`` measures another. 0 leaves
    Python and DeepSpeed's hooks out."""
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
    storage_bytes: _Above0 = 2e9
    """Bytes of models and checkpoints that the whole run reads or writes per second."""

    @property
    def device(self) -> str:
        """Type of the device that ranks compute on."""
        if self.code == "native":
            return "cpu"
        return "cuda"

    @property
    def backend(self) -> str:
        """Backend of the collectives."""
        if self.code == "native":
            return "gloo"
        return "nccl"

    def link_seconds(self, received: Received) -> float:
        """Time collectives that use both kinds of links at once, each at its own rate."""
        return max(received.within / self.node_bytes, received.between / self.network_bytes)

    def transfer_seconds(self, received: float, collectives: float, ranks: int) -> float:
        """Time ring collectives over all ranks that bring ``received`` bytes to each."""
        if ranks == 1:
            return 0.0
        group = Group.of_neighbours(ranks, self.node_size)
        # a group's gather counts the whole tensor, of which a rank has one part already
        by_link = group.gathered(received * ranks / (ranks - 1))
        return self.link_seconds(by_link) + collectives * group.hops * self.latency


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
MACHINES = {name: Machine(**table) for name, table in _TABLES.items()}
"""Machines by name."""


def machine_of(name: str) -> Machine:
    """Return a machine by its name: one of :data:`MACHINES`, or a TOML file. Raises InputError."""
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".toml"):
        raise InputError(
            f"machine = {name!r} is not a machine. Choose from {', '.join(MACHINES)}, or name a TOML file with your "
            "rates, whose name ends in .toml (docs/how-to/large-models.md)"
        )
    return read_machine(Path(name))


def read_machine(path: Path) -> Machine:
    """Read a Machine, its fields as keys, from a TOML file. Raises InputError with the file, key, value and fix."""
    try:
        # editors on Windows write a byte order mark, which TOML rejects
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"machine = {str(path)!r} cannot be read as TOML: {first_line(error)}. Name a TOML file of rates"
        ) from None
    missing = [field.name for field in fields(Machine) if field.default is MISSING and field.name not in table]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing. Set them as docs/how-to/large-models.md describes")
    try:
        return Machine(**table)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
