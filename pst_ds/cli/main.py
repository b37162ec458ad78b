"""``pst-ds VERB``: arguments in, exit code out. 0 done, 1 failed, 2 bad input, 75 stopped by a signal and saved."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from pst_ds import __version__
from pst_ds.errors import InputError
from pst_ds.parallel.stop_signals import EXIT_STOPPED

VERBS = {
    "plan": "show what a run would do: modules, parameters, memory, schedule; starts nothing",
    "train": "train a run, on one process or as every rank of a launcher",
    "prune": "prune a run's pretrained model once, on calibration text: magnitude, Wanda or SparseGPT",
    "eval": "evaluate a checkpoint of a run",
    "export": "write a run, or a folder with zeros, as a model folder: dense, bitmask, 2:4 or csr",
    "verify": "check an export, alone or against the run it came from: files, tensors, weights, logits",
    "generate": "write text with a causal model, dense or packed",
    "bench": "measure how fast and how large a model is, dense and sparse",
}


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser; only ``verb``'s own module is imported, so that help is quick."""
    parser = argparse.ArgumentParser(prog="pst-ds", description="Parameter-efficient Sparse Training on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"pst-ds {__version__}")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
        if name == verb:
            importlib.import_module(f"pst_ds.cli.{name}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments if a in VERBS), None)
    args = build_parser(verb).parse_args(arguments)
    quiet_libraries()
    try:
        result = importlib.import_module(f"pst_ds.cli.{args.verb}").run(args)
    except InputError as error:
        _say_on_main(f"pst-ds {args.verb}: {type(error).__name__}: {error}")
        return _leave(2)
    except KeyboardInterrupt:
        return _leave(130)
    except Exception as error:
        if not _is_reported_error(error):
            traceback.print_exc()
        else:
            _say_on_main(f"pst-ds {args.verb}: {type(error).__name__}: {error}")
        return _leave(EXIT_STOPPED if type(error).__name__ == "StoppedError" else 1)
    if args.json and _rank() == 0:
        print(json.dumps(result), flush=True)
    return _leave(0)


def program() -> NoReturn:
    """:func:`main` as a process of its own.

    A rank ends without the interpreter's clean-up. gloo's threads may free their last tensors at any time, and one that
    does so during the clean-up aborts the process: exit code 134, whatever the run came to.
    """
    code = main()
    launch = sys.modules.get("pst_ds.parallel.launch")
    if launch is not None and launch.joined:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_reported_error(error: Exception) -> bool:
    """Failures of a run whose message says everything, and that all ranks raise together."""
    return type(error).__name__ in (
        "DivergedError", "VerificationError", "FloatingPointError", "StoppedError", "CheckpointWriteError",
    )  # fmt: skip


def _rank() -> int:
    return int(os.environ.get("RANK", "0") or 0) if os.environ.get("RANK", "0").isdigit() else 0


def _say_on_main(message: str) -> None:
    """One message, not one a rank: input is the same on all of them."""
    if _rank() == 0:
        print(message, file=sys.stderr, flush=True)


def _leave(code: int) -> int:
    torch = sys.modules.get("torch")
    if torch is not None and code in (0, EXIT_STOPPED):
        from pst_ds.parallel.launch import shut_down

        shut_down()
    return code


def quiet_libraries() -> None:
    """Libraries' notices would bury ours; set PST_DS_VERBOSE=1 to see them."""
    if os.environ.get("PST_DS_VERBOSE"):
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "DS_LOG_LEVEL": "warning",
        "DEEPSPEED_LOG_LEVEL": "warning",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def add_run_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments every verb shares that starts from a run file or a run folder."""
    parser.add_argument("run", help=what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, such as train.num_steps=20"
    )


def load_run_or_folder(args: argparse.Namespace) -> Any:
    """The RunConfig of a run file, or of the resolved run file in a run folder."""
    from pathlib import Path

    from pst_ds.train.config import ConfigError
    from pst_ds.train.run_file import load_run

    path = Path(args.run)
    if path.is_dir():
        if not (path / "run.toml").is_file():
            raise ConfigError(f"{str(path)!r} is not a run folder: run.toml is missing (looked in {path.absolute()})")
        return load_run(path / "run.toml", [*args.set, f"output_dir={json.dumps(str(path))}"])
    return load_run(path, args.set)


if __name__ == "__main__":
    program()
