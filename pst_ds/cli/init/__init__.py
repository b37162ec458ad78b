"""``pst-ds init MODEL --train FILE``: write a commented run file for a model and its training data."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pst_ds.atomic_files import require_writable
from pst_ds.cli.main import count, number
from pst_ds.config.methods import METHODS
from pst_ds.config.tasks import TASKS
from pst_ds.errors import InputError

_DEFAULT_SPARSITY = "0.9, and 0.5 for language models"
_share = number("a number in [0, 1)", float, lambda value: 0.0 <= value < 1.0)
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="DIR", help="model folder, or a name on the hub")
    add("--train", metavar="FILE", help="JSONL, CSV, Parquet or text file to train on")
    add("--validation", metavar="FILE", help="chooses the best checkpoint, or none (default: 10 %% of --train)")
    add("--test", metavar="FILE", help="file for pst-ds eval and verify")
    add("--task", choices=tuple(TASKS), help="default: inferred from the columns of the training file")
    add("--text-columns", type=_names, metavar="COLUMN,...", help="one column, or two for pairs")
    add("--label-column", metavar="COLUMN", help="default: label")
    add("--method", choices=tuple(METHODS), default="pst", help="default: pst")
    add("--sparsity", type=float, metavar="S", help=f"final sparsity (default: {_DEFAULT_SPARSITY})")
    add("--pattern", metavar="P", help='matrix (default), global, row, N:M or blocks such as "16x1"')
    add("--target", choices=("cpu",), help="where the model will run; proposes the fastest pattern of similar quality")
    add("--exclude-modules", type=_names, metavar="NAME,...", help="modules to keep dense (pst.exclude_modules)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--epochs", type=float, metavar="N", help="default: 3 (causal-lm: 1), for 600 to 10,000 steps")
    steps.add_argument("--steps", type=count, metavar="N", help="optimizer steps")
    add("--batch-size", type=count, metavar="N", help="examples per step (default: about 32)")
    add("--max-length", type=count, metavar="N", help="tokens per example (default: 128, for causal-lm 512)")
    add("--ranks", type=count, metavar="N", help="processes to train on (default: 1)")
    add("--output-dir", metavar="DIR", help="run folder (default: runs/ and the name of the run file)")
    add("--out", default="run.toml", metavar="FILE", help="run file to write (default: run.toml)")
    add("--force", action="store_true", help="overwrite an existing run file")


def run(args: argparse.Namespace) -> dict[str, object]:
    out = Path(args.out)
    deepspeed_file = out.with_suffix(".deepspeed.json")
    for path in (out, deepspeed_file):
        if path.exists() and not args.force:
            raise InputError(f"{path} exists. Name another file with --out, or overwrite it with --force")
        require_writable(path, f"--out {out}")
    _complete(args)
    from pst_ds.cli.init.draft import chosen_run
    from pst_ds.cli.init.text import write_files

    chosen = chosen_run(args, deepspeed_file)
    write_files(chosen, out, deepspeed_file)
    result = chosen.summary | {"out": args.out, "deepspeed_config": chosen.run.deepspeed_config}
    shown = f", sparsity {result['sparsity']}" if result["sparsity"] else ""
    print(
        f"wrote {out}: {result['task']}, method {result['method']}{shown}, {result['num_layers']} layers, "
        f"{result['trained_parameters']:,} trained parameters, {result['num_steps']} steps over {result['examples']} "
        f"{result['unit']}"
    )
    for remark in result["remarks"]:
        print(remark)
    print(f"next: {chosen.plan_command(out)}; then {chosen.train_command(out)}")
    return result


def _complete(args: argparse.Namespace) -> None:
    """Ask for settings that the flags leave open. Raises InputError without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        missing = [name for name, value in (("the model folder", args.model), ("--train", args.train)) if not value]
        if missing:
            names = " and ".join(missing)
            raise InputError(f"{names} missing, and there is no terminal to ask on. Run pst-ds init DIR --train FILE")
        return
    if not args.model:
        args.model = _ask("model folder, or its name on the hub", str)
    if not args.train:
        args.train = _ask("file to train on (.jsonl, .csv, .parquet, .txt)", _file)
        if not args.validation:
            args.validation = _ask("file for validation, or none", _file, "the last 10 % of it")
    if args.sparsity is None and args.pattern is None and METHODS[args.method].masks != "none":
        args.sparsity = _ask("final sparsity", _share, _DEFAULT_SPARSITY)
    if args.ranks is None:
        args.ranks = _ask("processes to train on", count, "1")


def _ask(question: str, parse: Callable[[str], T], default: str = "") -> T | None:
    """Return the answer to a question, None for its default. Raises InputError after three wrong answers, or without
    one."""
    problem = "no answer was given"
    for _ in range(3):
        print(f"{question}{f' [{default}]' if default else ''}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        answer = line.strip()
        if not line:
            break
        if default and answer in ("", default):
            return None
        try:
            if answer:
                return parse(answer)
            problem = "an answer is needed"
        except argparse.ArgumentTypeError as error:
            problem = str(error)
        print(f"  {problem}", file=sys.stderr)
    raise InputError(f"{question}: {problem}")


def _file(answer: str) -> str:
    from pst_ds.cli.init.draft import NO_VALIDATION
    from pst_ds.data.dataset import file_and_slice

    if answer != NO_VALIDATION and not Path(file_and_slice(answer)[0]).is_file():
        raise argparse.ArgumentTypeError(f"{answer!r} is not a file (looked in {Path(answer).absolute()})")
    return answer


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
