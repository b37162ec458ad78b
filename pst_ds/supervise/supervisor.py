"""Supervise a run: restart its launcher after failures while that makes progress, without faulty hosts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from pst_ds.atomic_files import LOCK, only_writer
from pst_ds.file_names import ATTEMPTS_FILE, CHECKPOINTS, EXIT_CODES_VARIABLE, FINETUNED, LATEST, LAUNCH, STALLS
from pst_ds.parallel.stall_verdict import VERDICT_FILE, blamed_hosts
from pst_ds.parallel.stop_signals import EXIT_STOPPED
from pst_ds.supervise.hosts import Hosts

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
BAD_INPUT = 2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the launcher."""

    number: int
    seconds: float
    exit_code: int
    from_step: int
    to_step: int
    """Step of the newest checkpoint after this start; ``from_step`` is the one before it."""
    left_out: list[str]
    """Excluded hosts."""


@dataclass(slots=True)
class Supervisor:
    """Supervisor that starts ``launcher`` until the run in ``folder`` is finished, stopped, or makes no progress."""

    launcher: Sequence[str]
    arguments: Sequence[str]
    folder: Path
    hosts: Hosts
    retries: int
    """Maximum restarts after failures; 0 also disables restarts after a stop."""
    wait_seconds: float
    say: Callable[[str], None]
    attempts: list[Attempt] = field(default_factory=list)
    _failures: int = 0
    _asked_by: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _asked: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """Supervise the run and return its exit code: 0, 1, 2, or 75 if it was stopped or requeued. Call it from the
        main thread. Raises InputError if another process of this host supervises the run."""
        lock = self.folder / LAUNCH / f"{socket.gethostname()}{LOCK}"
        with only_writer(lock, f"pst-ds launch of {self.folder}", patience=0.0), self._signals():
            while (code := self._once()) is None:
                self._asked.wait(self.wait_seconds)  # a signal ends the wait
                if self._asked_by:
                    return EXIT_STOPPED
        return code

    def _once(self) -> int | None:
        """Start the launcher once and return its exit code, or None to restart it."""
        if unwell := self.hosts.unwell():
            self._leave_out(unwell, "their check failed")
        attempt = self._start()
        with (self.folder / LAUNCH / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")
        self.attempts.append(attempt)
        outcome, restarts = self._outcome(attempt)
        at = f"at step {attempt.to_step}, after {attempt.seconds:.0f} s"
        self.say(f"attempt {attempt.number} ended with {attempt.exit_code} {at}{outcome}")
        return None if restarts else attempt.exit_code

    @property
    def _stalls(self) -> tuple[Path, Path]:
        """Folders of reports on stalls, of the run and of its fine-tuning."""
        return self.folder / STALLS, self.folder / FINETUNED / STALLS

    def _outcome(self, attempt: Attempt) -> tuple[str, bool]:
        """Return what follows an attempt, for the message, and whether that is a restart."""
        code = attempt.exit_code
        moved = attempt.to_step > attempt.from_step
        if code in (0, BAD_INPUT) or self._asked_by:
            return "", False
        if code == EXIT_STOPPED and (job := _slurm_job()):
            # Preempted: Slurm starts the job again when it has the hosts, so a restart here would be killed.
            requeued = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
            if requeued:
                return f"; requeued job {job}", False
            return f"; could not requeue job {job}", False
        if code == EXIT_STOPPED and moved and self.retries:
            return "; it goes on", True
        blamed = [host for stalls in self._stalls for host in blamed_hosts(stalls)]
        changed = bool(blamed) and self._leave_out(blamed, "a stalled run names them")
        # A failure that recurs before the first checkpoint, on the same hosts, has a cause that retries do not remove.
        if not moved and not changed:
            return ", and no checkpoint was written: another start would end like it", False
        self._failures += 1
        if self._failures > self.retries:
            return ", and no retry is left", False
        return f"; retry {self._failures} of {self.retries}", True

    def _leave_out(self, names: list[str], why: str) -> bool:
        """Exclude hosts and report them. Return whether any host is newly excluded."""
        new = self.hosts.leave_out(names)
        if new:
            self.say(f"without {', '.join(new)} from now on: {why}")
        elif set(names) - set(self.hosts.left_out):
            self.say(f"{', '.join(names)} should be left out ({why}), and there are not enough spare hosts")
        return bool(new)

    def _start(self) -> Attempt:
        """Run the launcher until it exits."""
        codes = (self.folder / LAUNCH / f"codes-{socket.gethostname()}").absolute()
        shutil.rmtree(codes, ignore_errors=True)
        codes.mkdir()
        # Verdicts and exit codes of an earlier start must not be read as this one's.
        for stalls in self._stalls:
            (stalls / VERDICT_FILE).unlink(missing_ok=True)
        words = self.hosts.filled_in(self.launcher, (self.folder / LAUNCH / "hosts.txt").absolute())
        before = newest_step(self.folder)
        began = time.monotonic()
        without = list(self.hosts.left_out)
        environment = {**os.environ, EXIT_CODES_VARIABLE: str(codes)}
        # a separate process group: Ctrl-C in a terminal must reach the ranks once, through this process
        self._process = subprocess.Popen([*words, *self.arguments], env=environment, process_group=0)
        try:
            if self._asked_by:  # the signal came before the process existed
                self._process.terminate()
            returned = self._process.wait()
        finally:
            with suppress(ProcessLookupError):  # ranks that a launcher left behind would hold the ports
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process = None
        code = exit_code_of(returned, _rank_codes(codes))
        seconds = round(time.monotonic() - began, 1)
        return Attempt(len(self.attempts) + 1, seconds, code, before, newest_step(self.folder), without)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop the run, which saves a checkpoint, when this process receives a signal."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked_by = number
        self._asked.set()
        if self._process is not None:
            self._process.terminate()  # USR1 kills some launchers; TERM reaches the ranks through all of them


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of the run in ``folder``, counted with its fine-tuning; -1 for none."""
    steps = []
    for path in (folder, folder / FINETUNED):
        with suppress(OSError, ValueError):
            steps.append(int((path / CHECKPOINTS / LATEST).readlink().name.removeprefix("step-")))
    return sum(steps) if steps else -1


def _rank_codes(folder: Path) -> list[int]:
    """Return the exit codes of ranks in ``folder``; killed ranks are missing."""
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):
            codes.append(int(path.read_text(encoding="utf-8")))
    return codes


def exit_code_of(launcher: int, ranks: Sequence[int]) -> int:
    """Return the exit code of a run by its ranks, because some launchers lose their codes, else by its launcher."""
    # One rank's bad input or stop decides: the others then fail because they miss it.
    for code in (BAD_INPUT, EXIT_STOPPED):
        if code in ranks:
            return code
    if any(ranks) or (launcher and launcher not in (BAD_INPUT, EXIT_STOPPED)):
        return 1
    return launcher


def _slurm_job() -> str:
    """Return the Slurm job of this process as scontrol names it: array tasks by their index."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
