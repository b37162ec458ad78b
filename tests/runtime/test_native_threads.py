"""The kernels' threads are torch's: one OpenMP, one pool, one way to set how many."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

if not Path("/proc/self/task").is_dir():
    pytest.skip("threads are counted in /proc", allow_module_level=True)

SCRIPT = """
import json, os, sys, torch
from pst_ds.runtime import native
from tools.packed_layers import packed_linear

def threads():
    return len(os.listdir("/proc/self/task"))

def torch_work():
    torch.ones(1 << 21).add(1).sum()

def kernel_work():
    layer(x)

torch.set_num_threads(1)
layer, x = packed_linear(torch.ones(640, 256).bfloat16()), torch.ones(40, 256).bfloat16()
torch.set_num_threads(int(sys.argv[1]))
has_kernels, counts = native.library() is not None, [threads()]
for work in sys.argv[2:]:
    {"torch": torch_work, "kernel": kernel_work}[work]()
    counts.append(threads())
with open("/proc/self/maps") as maps:
    pools = {line.split()[-1] for line in maps if "/" in line and "libgomp" in line.split("/")[-1]}
print(json.dumps({"has_kernels": has_kernels, "counts": counts, "pools": sorted(pools)}))
"""


def counted(number, *works):
    """Threads of a fresh process before and after each of ``works``, less those it began with; and its OpenMPs."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(number), *works], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    if not found["has_kernels"]:
        pytest.skip("no C++ compiler, or PST_DS_NATIVE=0")
    return [count - found["counts"][0] for count in found["counts"]], found["pools"]


@pytest.mark.thorough
def test_the_kernels_run_on_the_threads_that_torch_has():
    after, pools = counted(2, "torch", "kernel", "torch")
    assert after == [0, 1, 1, 1]
    assert len(pools) == 1, pools


@pytest.mark.thorough
def test_torch_runs_on_those_that_the_kernels_made():
    assert counted(2, "kernel", "torch", "kernel")[0] == [0, 1, 1, 1]


def test_one_thread_is_one_thread():
    assert counted(1, "kernel", "torch")[0] == [0, 0, 0]
