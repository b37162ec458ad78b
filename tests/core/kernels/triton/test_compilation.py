"""Ranks that need a kernel at the same time compile it once: the others wait, and find it in Triton's cache."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from pst_ds.core.kernels.triton.compilation import LOCK, cache_folder, compile_first
from pst_ds.core.kernels.triton.launch import launch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
RANKS = 3

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")


@triton.jit
def doubled(x, y, count, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + places, mask=places < count)
    tl.store(y + places, 2 * values, mask=places < count)


class _Driver:
    """What compiling asks of a GPU's driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)


class _WithoutLaunch:
    """A kernel that is compiled for a GPU, and whose launches are only noted, with whether the lock was free."""

    def __init__(self, kernel):
        self.warmup = kernel.warmup
        self.launches = []

    def __getitem__(self, grid):
        def launched(*args, **options):
            self.launches.append((grid, _is_free(cache_folder() / LOCK)))

        return launched


def _is_free(path):
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _as_rank(folder, together, found):
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    triton.runtime.driver.set_active(_Driver())
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    kernel = _WithoutLaunch(doubled)
    x = torch.ones(64)
    together.wait()
    for size in (32, 32, 64):
        launch(kernel, (2,), x, torch.empty(64), 64, SIZE=size)
    found.put((hits, len(kernel.launches)))


def test_of_ranks_that_start_together_one_compiles_each_kernel(tmp_path):
    fork = multiprocessing.get_context("fork")
    together, found = fork.Barrier(RANKS), fork.Queue()
    ranks = [fork.Process(target=_as_rank, args=(tmp_path, together, found)) for _ in range(RANKS)]
    for rank in ranks:
        rank.start()
    of_ranks = [found.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert [len(hits) for hits, _ in of_ranks] == [2] * RANKS  # two sizes; the second launch asks for nothing
    assert sorted(hits[0] for hits, _ in of_ranks) == [False] + [True] * (RANKS - 1)
    assert sorted(hits[1] for hits, _ in of_ranks) == [False] + [True] * (RANKS - 1)
    assert [launches for _, launches in of_ranks] == [3] * RANKS


class _Fake:
    """A kernel that notes whether the lock was free while it was compiled, and when it was launched."""

    def __init__(self, lock):
        self.lock = lock
        self.seen = []

    def warmup(self, *args, grid, **options):
        self.seen.append(("compiled", _is_free(self.lock)))

    def __getitem__(self, grid):
        return lambda *args, **options: self.seen.append(("launched", _is_free(self.lock)))


def test_the_lock_is_held_while_a_kernel_is_compiled_and_not_while_it_is_launched(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    kernel = _Fake(tmp_path / "new" / LOCK)
    for _ in range(2):
        launch(kernel, (1,), torch.ones(2), SIZE=2)
    launch(kernel, (1,), torch.ones(2, dtype=torch.bfloat16), SIZE=2)
    compiled, launched = ("compiled", False), ("launched", True)
    assert kernel.seen == [compiled, launched, launched, compiled, launched]


def test_a_kernel_that_does_not_compile_leaves_the_lock_free_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    class Broken(_Fake):
        def warmup(self, *args, grid, **options):
            super().warmup(*args, grid=grid, **options)
            raise RuntimeError("out of registers")

    kernel = Broken(tmp_path / LOCK)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of registers"):
            launch(kernel, (1,), torch.ones(2))
        assert _is_free(tmp_path / LOCK)
    assert kernel.seen == [("compiled", False)] * 2


def test_without_a_lock_every_rank_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/below"))  # cannot be made
    compiled = []

    class Kernel:
        def warmup(self, *args, grid, **options):
            compiled.append(options)

    compile_first(Kernel(), [torch.ones(1)], {"SIZE": 4})
    assert compiled == [{"SIZE": 4}]


def test_the_folder_is_triton_s(monkeypatch, tmp_path):
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".triton/cache" == Path(triton.knobs.cache.dir)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".triton/cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" == Path(triton.knobs.cache.dir)
