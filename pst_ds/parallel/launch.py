"""Read the launcher's environment, and join and leave the process group."""

import os
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from pst_ds.errors import InputError
from pst_ds.parallel import presence
from pst_ds.parallel.store import AGENT_STORE, StoreServer


@dataclass(frozen=True, slots=True)
class LaunchEnvironment:
    """Ranks that the launcher assigned."""

    rank: int
    world_size: int
    local_rank: int
    node_size: int = sys.maxsize
    """Ranks on this rank's node; if the launcher does not say, more than any number of ranks."""


def launch_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read RANK, WORLD_SIZE and LOCAL_RANK (deepspeed, torchrun); one process when none is set. LOCAL_WORLD_SIZE
    (torchrun) or LOCAL_SIZE (deepspeed) is the number of ranks on the node.

    Raises InputError when only some are set, one is not a number, or they contradict each other.
    """
    environ = os.environ if environ is None else environ
    names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in environ]
    if not present or (joined and present == ["LOCAL_RANK"]):  # then init_distributed has set it
        return LaunchEnvironment(0, 1, 0)
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in environ)
        raise InputError(
            f"the environment sets {', '.join(present)} but not {missing}; start with the deepspeed launcher, torchrun "
            "or launch/local.sh, or unset them for one process"
        )
    names += tuple(name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ)[:1]
    shown = ", ".join(f"{name}={environ[name]!r}" for name in names)
    with suppress(ValueError):
        found = LaunchEnvironment(*(int(environ[name]) for name in names))
        if 0 <= found.rank < found.world_size and 0 <= found.local_rank < found.node_size:
            return found
    raise InputError(
        f"{shown}: the launch environment needs whole numbers with 0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < "
        "LOCAL_WORLD_SIZE. Start with a launcher, or unset them for one process"
    )


def use_cpu_without_accelerator() -> None:
    """Tell DeepSpeed to use the CPU when there is no accelerator. Call it before deepspeed is imported.

    Raises InputError when the environment asks for one.
    """
    import torch

    if torch.accelerator.is_available():
        _grow_segments()
        return
    asked = os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if asked != "cpu":
        raise InputError(
            f"the environment sets DS_ACCELERATOR = {asked!r}, and torch {torch.__version__} finds no accelerator on "
            f"{socket.gethostname()}: unset it to compute on the CPU, or see what pst-ds doctor says"
        )


def _grow_segments() -> None:
    """Let torch's allocator grow its segments of GPU memory, unless the environment configures the allocator.

    Weights that ZeRO-3 gathers have many sizes, and blocks that are freed on another stream return late. Segments of
    fixed size then fragment. The launcher for several hosts forwards no ``PYTORCH_`` variables, so each rank sets this.
    """
    # Torch takes the first of these that is set, so a value in one would hide the user's in another.
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that configure torch's allocator."""
FEW_RANKS = 16
"""Ranks up to which gloo connects all pairs at the start, so that the death of one is noticed at once."""

joined = False
"""True once this process has joined a process group through :func:`init_distributed`."""
_store_server: StoreServer | None = None
"""The store on rank 0 of many ranks."""


def init_distributed(launch: LaunchEnvironment, *, timeout_seconds: float = 0.0) -> None:
    """Join the process group of all ranks: gloo on CPU, the accelerator's backend elsewhere. Collective.

    ``timeout_seconds``: after which a collective fails, 0 for the backend's default. With it, ranks also end when they
    lose one, until :func:`shut_down`. Raises InputError if several ranks lack an address or port to meet at; a single
    process needs neither.
    """
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and launch.world_size > 1 and not dist.is_initialized():
        raise InputError(
            f"the environment sets RANK and WORLD_SIZE but not {', '.join(missing)}, where the ranks meet; start with "
            "the deepspeed launcher, torchrun or a script in launch/"
        )
    use_cpu_without_accelerator()
    _prepare_connections(launch.world_size)
    if timeout_seconds and launch.world_size > 1 and not dist.is_initialized():
        presence.begin(launch.rank, launch.world_size)  # before the ranks meet: a host may be lost while others wait
    if launch.world_size > FEW_RANKS and launch.rank == 0:
        _start_store_server()  # it takes as long as the imports below
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # zero.Init reads it from there
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # compiling this op takes minutes although training never uses it; calling it incompatible skips that, and the
        # probing of every other op
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    else:
        index = _device_index(launch, get_accelerator().device_count())
        os.environ["LOCAL_RANK"] = str(index)
        get_accelerator().set_device(index)
        require_own_triton_cache()
    timeout = {"timeout": timedelta(seconds=timeout_seconds)} if timeout_seconds else {}
    if launch.world_size == 1 and not dist.is_initialized():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    if _store_server is not None:
        _store_server.wait()
    global joined
    joined = True
    deepspeed.init_distributed(dist_backend=_backend(), auto_mpi_discovery=False, verbose=False, **timeout)
    presence.all_have_met()


def require_own_triton_cache() -> None:
    """Create the folder TRITON_CACHE_DIR if it is set. Raises InputError if it belongs to another user of the host,
    whose code Triton would run."""
    if not (folder := os.environ.get("TRITON_CACHE_DIR")):
        return
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise InputError(
            f"TRITON_CACHE_DIR = {folder!r} belongs to another user of {socket.gethostname()}. Set it to a folder of "
            "yours on a local disk"
        )


def _prepare_connections(world_size: int) -> None:
    if world_size > FEW_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connects a pair of ranks at its first message
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if least != most:  # the store has three connections to each rank, and 1,024 open files are the usual limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _start_store_server() -> None:
    """Start the process that holds the ranks' store, unless the launcher holds it."""
    import torch.distributed as dist

    global _store_server
    if os.environ.get(AGENT_STORE) != "True" and not dist.is_initialized():
        _store_server = StoreServer(int(os.environ["MASTER_PORT"]))
        os.environ[AGENT_STORE] = "True"


def _device_index(launch: LaunchEnvironment, num_devices: int) -> int:
    """Return the index of this rank's accelerator: its local rank, or 0 if Slurm shows its task a single one. Raises
    InputError for a rank without one."""
    if launch.local_rank < num_devices:
        return launch.local_rank
    if num_devices == 1 and "SLURM_PROCID" in os.environ:
        return 0
    raise InputError(
        f"rank {launch.rank} has LOCAL_RANK = {launch.local_rank}, and {num_devices} accelerators are visible to "
        f"it on {socket.gethostname()}: start no more ranks on a host than it has accelerators (deepspeed "
        "--num_gpus, torchrun --nproc_per_node), and let every rank see them all (CUDA_VISIBLE_DEVICES)"
    )


def memory_of_rank(launch: LaunchEnvironment) -> int:
    """Return the bytes that this rank may use: all of its accelerator, or its share of the host's available memory."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().total_memory())
    return int(get_accelerator().available_memory()) // min(launch.node_size, launch.world_size)


def _backend() -> str:
    from deepspeed.accelerator import get_accelerator

    return "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name()


def shut_down() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    presence.close()
    if dist.is_available() and dist.is_initialized():
        comm = sys.modules.get("deepspeed.comm")  # it also forgets the groups that DeepSpeed has made
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
    if "RANK" not in os.environ:  # a single process, for which init_distributed has set it
        os.environ.pop("LOCAL_RANK", None)
    global _store_server
    if _store_server is not None:
        _store_server.stop()
        _store_server = None
        del os.environ[AGENT_STORE]


def device_of(launch: LaunchEnvironment) -> str:
    """Return the device of this rank, such as "cpu" or "cuda:0". Raises InputError."""
    import torch

    use_cpu_without_accelerator()
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    index = _device_index(launch, torch.accelerator.device_count())
    accelerator = torch.accelerator.current_accelerator()
    return f"{accelerator.type}:{index}" if accelerator else "cpu"
