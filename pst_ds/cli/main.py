"""``pst-ds VERB``: parse arguments, run a verb, return an exit code.

0: done, 1: failed, 2: invalid input, 3: a planned run does not fit, 75: stopped by a signal after saving, 130: ended by
Ctrl-C, 141: the reader of the output has exited.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import io
import logging
import math
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

from pst_ds import __version__, progress
from pst_ds.cli.flags import in_flags
from pst_ds.config import toml
from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.json_text import json_of
from pst_ds.parallel.stop_signals import EXIT_INPUT, EXIT_STOPPED, end_elastic_torchrun, record_exit_code

N = TypeVar("N", int, float)
EXIT_UNREAD = 141
"""The exit code that a shell reports for a program ended by SIGPIPE: 128 and its number."""
EXIT_INTERRUPTED = 130
"""The exit code that a shell reports for a program ended by Ctrl-C: 128 and the number of SIGINT."""
_LOCAL_RANK = ("--local_rank", "--local-rank")
"""The option that launchers add, in their two spellings; ranks read LOCAL_RANK instead."""
_REPORTED = ("DivergedError", "VerificationError", "FloatingPointError", "StoppedError", "CheckpointWriteError")
"""Failures that all ranks raise together, and whose message needs no traceback."""
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    # it logs what it raises
    "DATASETS_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # its threads do not survive a fork, and each process with them prints a warning
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment in which libraries print errors only."""

VERBS = {
    "init": "write a commented run file for a model and its training data",
    "plan": "show what a run would do (modules, parameters, memory, schedule) without starting it",
    "prepare": "tokenise a corpus once, into a token store that runs map into memory",
    "train": "train a run in one process, or as a rank of a launcher",
    "users": "train, evaluate, list, export and remove per-user adapters of one sparse model",
    "prune": "prune a pretrained model in one shot: weights (magnitude, Wanda, SparseGPT, ALPS), experts, or channels",
    "eval": "evaluate a checkpoint of a run",
    "export": "export a run or a model folder: dense, bitmask, 2:4, csr, compressed-tensors, gguf or onnx",
    "verify": "check an export, by itself or against its run: files, tensors, weights, logits",
    "predict": "write the label, number or embedding of each row of a file",
    "generate": "generate text with a causal model, dense or packed",
    "serve": "serve a model folder over HTTP with the chat-completions protocol, with or without per-user adapters",
    "bench": "measure the speed and size of a model, dense and sparse",
    "inspect": "describe a run, checkpoint, export or model folder, layer by layer",
    "doctor": "check this machine (versions, accelerator, compiler, communication, disk) and say what to fix",
}


class _Parser(argparse.ArgumentParser):
    """Parser that reports a wrong command line with one message from rank 0, a suggestion and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit. Replaces the usage, which hides the message, and which every rank would print."""
        sentence = message if message.endswith("?") else f"{message}."
        _say_on_main(f"{self.prog}: {sentence} See {self.prog} --help")
        self.exit(EXIT_INPUT)

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, and report unknown ones here: argparse would leave them to the parser of all verbs."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # this is the verb's parser, which knows the options that may have been meant
            self.error(f"unknown argument {unknown[0]!r}{_near_miss(unknown[0], self._option_string_actions)}")
        return parsed, unknown


def _near_miss(wrong: str, known: Iterable[str]) -> str:
    """Return a question that names the most similar of ``known``; "" if none is similar."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def build_parser(*loaded: str | None) -> argparse.ArgumentParser:
    """Build the parser with the arguments of the verbs ``loaded``. Other modules are not imported, so help is fast."""
    parser = _Parser(prog="pst-ds", description="Parameter-efficient Sparse Training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"pst-ds {__version__}")
    parser.add_argument(*_LOCAL_RANK, type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
        if name in loaded:
            importlib.import_module(f"pst_ds.cli.{name}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. Raises SystemExit for a wrong command line, and for ``--help``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parsed(arguments)
    # before a verb imports them
    quiet_libraries()
    progress.quiet = getattr(args, "quiet", False)
    module = importlib.import_module(f"pst_ds.cli.{args.verb}")
    try:
        result = module.run(args)
        if args.json and progress.is_first_rank():
            print(json_of(result), flush=True)
    except KeyboardInterrupt:
        return _leave(EXIT_INTERRUPTED)
    except Exception as error:
        return _leave(_reported(error, args.verb, getattr(module, "FLAGS", {})))
    return _leave(result.get("exit_code", 0))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. Raises SystemExit for a wrong one, and for ``--help``."""
    word = _first_word(arguments)
    verb = word if word in VERBS else None
    parser = build_parser(verb)
    # argparse would list the verbs too, but does not say which one is meant
    if word is not None and verb is None:
        parser.error(f"unknown verb {word!r}; there are {', '.join(VERBS)}{_near_miss(word, VERBS)}")
    return parser.parse_args(arguments)


def _first_word(arguments: Sequence[str]) -> str | None:
    """Return the first argument that is neither an option nor the rank after ``--local_rank``; None without one."""
    is_rank = False
    for argument in arguments:
        if is_rank:
            is_rank = False
        elif argument in _LOCAL_RANK:
            is_rank = True
        elif not argument.startswith("-"):
            return argument
    return None


def _reported(error: Exception, verb: str, flags: Mapping[str, str]) -> int:
    """Print what a user needs to know about an error that is being handled; return the exit code."""
    if isinstance(error, InputError):
        _say_on_main(f"pst-ds {verb}: {in_flags(str(error), flags)}")
        return EXIT_INPUT
    # any other broken pipe, such as one to a process of ours, is a bug
    if isinstance(error, BrokenPipeError) and _is_unread():
        return EXIT_UNREAD
    # by name, because importing the classes would import torch, also for --help
    kind = type(error).__name__
    if kind in _REPORTED:
        _say_on_main(f"pst-ds {verb}: {in_flags(str(error), flags)}")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        # from each rank whose disk is full, which need not be the first one's
        message = f"{error}. Free space on that disk, or write to another one"
        print(f"pst-ds {verb}: {message}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    return EXIT_STOPPED if kind == "StoppedError" else 1


def program() -> NoReturn:
    """Run :func:`main` as a process.

    A rank skips the interpreter's clean-up: gloo's threads may free their last tensors at any time, and doing so during
    the clean-up aborts the process with exit code 134.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # file names may contain any bytes, and the terminal's encoding may lack letters
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except SystemExit as ended:
        # from argparse
        code = int(ended.code or 0)
    except BrokenPipeError:
        # from the final message
        code = EXIT_UNREAD
    # before anything below can fail: launchers may lose the code of this process
    record_exit_code(code)
    end_elastic_torchrun(code)
    # looked up, because importing the module would import torch
    joined = getattr(sys.modules.get("pst_ds.parallel.launch"), "joined", False)
    if joined:
        # os._exit skips it
        logging.shutdown()
    with contextlib.suppress(BrokenPipeError, AttributeError):
        # stdout is None in a process that was started without one
        sys.stdout.flush()
    is_unread = _is_unread()
    if is_unread and code == 0:
        code = EXIT_UNREAD
    if joined or is_unread:
        # of output that nobody reads the interpreter would say that it cannot be written
        os._exit(code)
    sys.exit(code)


def _is_unread() -> bool:
    """Return whether stdout or stderr is a pipe without a reader, as after ``| head``."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            # a stream may have no file, as in tests, or be closed; 0 asks for errors only
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _say_on_main(message: str) -> None:
    """Print one message, not one per rank, since all ranks have the same input."""
    if progress.is_first_rank():
        print(message, file=sys.stderr, flush=True)


def _leave(code: int) -> int:
    """Leave the process group after success or an orderly stop; return ``code``. Collective for these codes."""
    # After an error other ranks may be in the middle of a collective, and leaving the group could wait for them.
    if "torch" in sys.modules and code in (0, EXIT_STOPPED):
        from pst_ds.parallel.launch import shut_down

        shut_down()
    return code


def quiet_libraries() -> None:
    """Silence messages of libraries, which would hide ours; PST_DS_VERBOSE=1 shows them."""
    if os.environ.get("PST_DS_VERBOSE"):
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, value in _QUIET.items():
        # a user may have set one of them
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:
        # it has already read the environment
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def add_run_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the arguments of verbs that start from a run file or a run folder. ``what``: help of the first."""
    parser.add_argument("run", help=what)
    overrides = "override a setting, such as train.num_steps=20"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=overrides)


def add_quiet_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet``, for verbs that may take long."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_shard_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--shard-bytes``, for verbs that write model folders."""
    limit = "maximum bytes per weight file (default: 5 GiB)"
    parser.add_argument("--shard-bytes", type=count, default=5 << 30, metavar="B", help=limit)


def number(what: str, kind: Callable[[str], N], is_valid: Callable[[N], bool]) -> Callable[[str], N]:
    """Return a parser of numbers for argparse, whose message says that the argument is not ``what``."""

    def parse(text: str) -> N:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if is_valid(value):
                return value
        # the same message for text that is not a number, and for a number that is out of range
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


count = number("a whole number of at least 1", int, lambda value: value >= 1)


def above(limit: int) -> Callable[[str], float]:
    """Return a parser of finite numbers above ``limit`` for argparse."""
    return number(f"a number above {limit}", float, lambda value: limit < value < math.inf)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of verbs that write text, which :func:`pst_ds.cli.engine.native_decoder` reads."""
    add = parser.add_argument
    add("--load-as", choices=("auto", "sparse", "dense"), default="auto", help="keep weights packed, or unpack them")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the folder's")
    add("--threads", type=count, metavar="N", help="threads (default: OMP_NUM_THREADS, or all cores)")
    engine = "the native decoder, or transformers (default: native for int8 and int4 values on a CPU, and with --store)"
    add("--engine", choices=("auto", "native", "torch"), default="auto", help=engine)


def load_run_or_folder(args: argparse.Namespace) -> RunConfig:
    """Load a run file, or the resolved run file of a run folder."""
    return toml.load_run_or_folder(args.run, args.set)


if __name__ == "__main__":
    program()
