"""Connections of every rank on one host, with as many ranks as are asked for.

The ranks are forks. They do what training does with each other: collectives over gloo, and an exchange over the store;
with ``--train`` they train a tiny model for two steps and save it, and DeepSpeed makes groups of its own. Counted are
the sockets that a rank has open at the end, and those of the store at which more than a few ranks meet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pst_ds.config.toml import load_run
from pst_ds.parallel import launch
from pst_ds.parallel.launch import LaunchEnvironment

RUN_FILE = "tests/data/world_size.toml"
IMPORTS = (
    "deepspeed",
    "transformers.models.bert.modeling_bert",
    "datasets",
    "torch.utils.tensorboard",
    "pst_ds.train.run",
)
Action = Callable[[int, int, Path], object]
"""What a rank does, given its number, how many there are, and a folder; it returns what has connections of its own."""
LAZY = "TORCH_GLOO_LAZY_INIT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--train", action="store_true", help="a run, and not its collectives alone")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1")
    for name in IMPORTS if args.train else IMPORTS[:1]:
        importlib.import_module(name)
    act = train if args.train else communicate
    found = {}
    for ranks in args.ranks:
        for lazily in ("0", "1"):
            counts = measured(act, ranks, lazily)
            way = "connected when used" if lazily == "1" else "all connected"
            *of_ranks, of_store = counts
            name = f"{ranks}, {'as used' if lazily == '1' else 'full mesh'}"
            found[name] = {"ranks": of_ranks, "store": of_store}
            text = f"rank 0 {of_ranks[0]}, the others at most {max(of_ranks[1:])}, the store's process {of_store}"
            print(f"{ranks} ranks, {way}: {text}", flush=True)
    if args.json:
        print(json.dumps({"benchmark": "connections", "sockets": found}))


def measured(act: Action, ranks: int, lazily: str) -> list[int]:
    """Return the sockets of every rank, by rank, and those of the store's process, 0 where it is rank 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    os.environ[LAZY] = lazily
    with tempfile.TemporaryDirectory() as folder:
        children = [fork(act, rank, ranks, Path(folder)) for rank in range(ranks)]
        for child in children:
            os.waitpid(child, 0)
        return [int((Path(folder) / f"{name}.sockets").read_text()) for name in (*range(ranks), "store")]


def fork(act: Action, rank: int, ranks: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        before = open_sockets()
        kept = act(rank, ranks, folder)
        if rank == 0:
            (folder / "store.sockets").write_text(str(sockets_of_store()))
        (folder / f"{rank}.sockets").write_text(str(open_sockets() - before))
        wait_for_all(folder, ranks)  # a rank that leaves closes connections of others
        del kept
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    os._exit(code)


def wait_for_all(folder: Path, ranks: int) -> None:
    while len(list(folder.glob("*.sockets"))) < ranks + 1:
        time.sleep(0.05)


def communicate(rank: int, ranks: int, folder: Path) -> object:
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.ranks import all_gather_objects, barrier, of_main
    from pst_ds.parallel.store_group import StoreGroup

    torch.set_num_threads(1)
    launch.init_distributed(LaunchEnvironment(rank, ranks, rank))
    numbers, group = torch.ones(ranks), StoreGroup()
    dist.all_reduce(numbers)
    dist.all_gather_into_tensor(torch.empty(ranks**2), numbers)
    dist.reduce_scatter_tensor(torch.empty(1), numbers)
    dist.broadcast(numbers, 0)
    all_gather_objects(rank)
    of_main(lambda: rank)
    group.decide(rank, len)
    barrier()
    return group


def train(rank: int, ranks: int, folder: Path) -> None:
    import torch

    from pst_ds.train.run import prepare, train_run

    torch.set_num_threads(1)
    settings = [f"output_dir={folder}/run", "train.num_steps=2", f"train.batch_size={ranks}", "eval.interval=-1"]
    run = load_run(RUN_FILE, settings)
    train_run(prepare(run, LaunchEnvironment(rank, ranks, rank)), quiet=True)


def sockets_of_store() -> int:
    """Return the sockets of the process that this one started to hold the store; 0 for none."""
    server = launch._store_server
    return open_sockets(str(server._process.pid)) if server else 0


def open_sockets(process: str = "self") -> int:
    """Return how many sockets a process has open, by default this one."""
    links = []
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            links.append(os.readlink(f"/proc/{process}/fd/{name}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sum(link.startswith("socket:") for link in links)


if __name__ == "__main__":
    main()
