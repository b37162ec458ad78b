"""Wall and CPU seconds and memory of ``pst-ds prune`` on several numbers of ranks, and whether all write the same.

    python -m tools.bench.prune run.toml --ranks 1 2 --method alps --budgets saliency --reconstruct 2 --samples 64

Ranks are processes with one thread each. Other options go to ``pst-ds prune``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        first: tuple[float, str] | None = None
        for ranks in arguments.ranks:
            wall, cpu, peak, digest = pruned(arguments.run_file, ranks, Path(folder) / str(ranks), options)
            first = first or (wall, digest)
            same = "same" if digest == first[1] else "OTHER"
            speed = f"{wall:.1f} s, {cpu:.1f} CPU s, {first[0] / wall:.2f} times as fast"
            print(f"{ranks} ranks: {speed}, {same} weights; peak of a rank so far {peak / 1e9:.2f} GB with its imports")


def pruned(run_file: str, ranks: int, out: Path, options: list[str]) -> tuple[float, float, int, str]:
    """Return (wall seconds, CPU seconds of all ranks, largest resident bytes of a rank of any prune so far, SHA-256 of
    the weight files) of one prune."""
    command = [sys.executable, "-m", "pst_ds", "prune", run_file, "--out", str(out), "--quiet", *options]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)} for r in range(ranks)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    processes = [subprocess.Popen(command, env=place, stdout=subprocess.DEVNULL) for place in places]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{' '.join(command)} failed on {ranks} ranks")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return time.perf_counter() - start, cpu, 1024 * after.ru_maxrss, digest.hexdigest()


if __name__ == "__main__":
    main()
