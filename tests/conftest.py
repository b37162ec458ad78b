"""Fixtures: ranks forked from this process, which has torch and DeepSpeed imported already."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# the same examples in every run, and none fails for being slow; `make test` asks for the quick profile
hypothesis.settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("thorough"), max_examples=15)
hypothesis.settings.load_profile("thorough")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="pst-ds-tests-")
os.environ["PST_DS_CACHE"] = _CACHE.name

ROOT = Path(__file__).resolve().parent.parent
RANKS_TIMEOUT_SECONDS = 240
IMPORTED_BY_RANKS = (
    "deepspeed",
    "transformers.integrations",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "scipy.io",
    "sklearn.metrics",
    "torch.utils.tensorboard",
    "tensorboard.plugins.hparams.plugin_data_pb2",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "pst_ds.data.tasks.classification",
    "pst_ds.train.run",
)
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
"""As they were before any test: a module's fixture may train before the first test's fixtures begin."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cheap tests first, launchers last; GPU tests are skipped, with the reason, where there is no GPU.

    Clusters are ``thorough``, and so are all but ``number`` cases, evenly spread, of a test marked ``few(number)``.
    """
    _refuse_marks_from_elsewhere(items)
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.thorough)
    for cases in _cases_of_tests(items):
        few = cases[0].get_closest_marker("few")
        if few:
            (number,) = few.args
            for case in set(cases) - set(_spread(cases, number)):
                case.add_marker(pytest.mark.thorough)
    order = {"zero3": 1, "launcher": 2, "cluster": 3}
    items.sort(key=lambda item: max((order.get(mark.name, 0) for mark in item.iter_markers()), default=0))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and collected tests are a million objects that stay. Garbage collections look at none of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _refuse_marks_from_elsewhere(items: list[pytest.Item]) -> None:
    """``tools/run_tests.py`` finds the files of some stages by these marks in their text."""
    texts: dict[Path, str] = {}
    for item in items:
        for mark in item.iter_markers():
            if mark.name in ("zero3", "launcher", "cluster"):
                text = texts.setdefault(item.path, item.path.read_text(encoding="utf-8"))
                if f"mark.{mark.name}" not in text:
                    raise pytest.UsageError(
                        f"{item.nodeid}: its mark {mark.name} comes from another file, and the stage of the mark would "
                        f"not run it. Put pytest.mark.{mark.name} into {item.path.name}."
                    )


def _cases_of_tests(items: list[pytest.Item]) -> Iterable[list[pytest.Function]]:
    """The cases of each test that has parameters."""
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return cases.values()


def _spread(cases: list[pytest.Function], number: int) -> list[pytest.Function]:
    """Choose so many cases, evenly spread, the first among them."""
    return [cases[i * len(cases) // number] for i in range(min(number, len(cases)))]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in run files are relative to the top folder."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _signals_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``pst-ds train`` in this process notes SIGTERM, and every later run in the process would stop after one step."""
    from pst_ds.parallel import stop_signals

    monkeypatch.setattr(stop_signals, "_asked_by", 0)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """``prepare`` without a run after it leaves LOCAL_RANK, and a process that a later test starts would inherit it."""
    yield
    if "RANK" not in os.environ:
        os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(autouse=True)
def _progress_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--quiet`` in one test keeps no later one from showing progress."""
    from pst_ds import progress

    monkeypatch.setattr(progress, "quiet", False)
    monkeypatch.setattr(progress, "_outermost", None)


@pytest.fixture(scope="session")
def torch_bytes() -> Callable[[Callable[[], object]], tuple[int, int]]:
    """Measures a call: (the most bytes torch's CPU allocator gives it at a time, those its result still holds)."""
    from torch.profiler import ProfilerActivity, profile

    def measure(run: Callable[[], object]) -> tuple[int, int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            result = run()
        del result
        events = measured.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        alive = [0, *itertools.accumulate(nbytes for _, nbytes in changes)]
        return max(alive), alive[-1]

    return measure


@pytest.fixture(scope="session")
def tensor_bytes() -> Callable[[Callable[[], object]], int]:
    """Measures a call: the most bytes that the tensors which its operations return hold at a time.

    Unlike ``torch_bytes`` it leaves out what a library allocates within an operation, which depends on the processor:
    oneDNN copies the operands of a bf16 product where it uses AMX.
    """
    from torch import Tensor, UntypedStorage
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Measure(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.most = 0
            self.made: dict[int, tuple[StorageWeakRef, int]] = {}  # storages of results, with their bytes
            self.given: dict[int, object] = {}  # storages from before the call; held, so that no address is used again

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.made = {key: (held, nbytes) for key, (held, nbytes) in self.made.items() if not held.expired()}
            for storage in storages((args, kwargs)):
                if storage._cdata not in self.made:
                    self.given[storage._cdata] = storage
            result = operation(*args, **(kwargs or {}))
            for storage in storages(result):
                if storage._cdata not in self.given:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.most = max(self.most, sum(nbytes for _, nbytes in self.made.values()))
            return result

    def storages(values: object) -> Iterator[UntypedStorage]:
        return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

    def measure(run: Callable[[], object]) -> int:
        with Measure() as measured:
            run()
        return measured.most

    return measure


@pytest.fixture(scope="session")
def imported_by_ranks() -> None:
    """Do once, before any fork, what would cost every rank of every test a fifth of a second: imports, and what
    transformers prepares for the first model.

    A fork and its process group take 0.04 s, so ranks that outlive a test would save no time, and would share state.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in IMPORTED_BY_RANKS:
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    transformers.AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-bert")
    transformers.AutoModelForSequenceClassification.from_pretrained(ROOT / "tests/data/tiny-bert")
    from pst_ds.parallel.engine import import_muon_without_its_compiler

    import_muon_without_its_compiler()


@pytest.fixture
def run_ranks(tmp_path: Path, imported_by_ranks: None) -> Callable[..., list[Any]]:
    """``run_ranks(function, world_size, *args)``: its result on every rank, by rank.

    Each rank is a fork with gloo and DeepSpeed's communication up; they meet through a file, so no port can clash.
    """
    counter = iter(range(1000))

    def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        folder = tmp_path / f"ranks-{next(counter)}"
        folder.mkdir()
        children = [_fork_rank(function, rank, world_size, folder, args) for rank in range(world_size)]
        _wait(children)
        outcomes = [_outcome(folder / str(rank)) for rank in range(world_size)]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in outcomes]

    return run


def _fork_rank(function: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # collections need not look at, and so copy, all that came with the fork
    try:
        outcome = (True, _as_rank(function, rank, world_size, folder, args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        (folder / f"{rank}.partial").write_bytes(pickle.dumps(outcome))
        (folder / f"{rank}.partial").rename(folder / str(rank))
    finally:
        os._exit(0 if outcome[0] else 1)


def _as_rank(function: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import LaunchEnvironment, init_distributed

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)  # makes torch's pool anew: threads that do so at once after a fork find none and fail
    torch.set_printoptions(threshold=0, edgeitems=1)  # DeepSpeed words every parameter for a line it does not print
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    init_distributed(LaunchEnvironment(rank, world_size, rank))
    return function(*args)


def _wait(children: list[int]) -> None:
    """Until all have ended; when one fails, or time is up, the others are killed, for they may wait for it for ever."""
    deadline = time.monotonic() + RANKS_TIMEOUT_SECONDS
    running = set(children)
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            running.discard(pid)
            if status:
                deadline = min(deadline, time.monotonic() + 5)
        elif pid == 0:
            if time.monotonic() > deadline:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.01)


def _outcome(path: Path) -> tuple[bool, Any]:
    if not path.is_file():
        return False, "ended without a result (killed after another rank failed, or out of time)"
    return pickle.loads(path.read_bytes())


@pytest.fixture
def locked_elsewhere() -> Iterator[Callable[[Path], int]]:
    """``locked_elsewhere(path)``: the pid of a process that holds the lock of ``path`` until it is killed."""
    from pst_ds.atomic_files import only_writer

    pids = []

    def hold(path: Path) -> int:
        ready, say = os.pipe()
        pids.append(os.fork())
        if not pids[-1]:
            with only_writer(path, "test"):
                os.write(say, b".")
                signal.pause()
        os.close(say)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        return pids[-1]

    yield hold
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, with a cache of datasets of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """``verb("eval", folder)``: what the verb says with ``--json``; it must succeed."""
    from pst_ds.cli.main import main

    def run(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
