"""``pst-ds init MODEL --train FILE``: write a commented run file for a model and its training data."""

import argparse
from pathlib import Path

from pst_ds.atomic_files import require_writable
from pst_ds.cli.main import above, count
from pst_ds.config.methods import METHODS
from pst_ds.config.one_shot import ENGINES
from pst_ds.config.targets import TARGETS
from pst_ds.config.tasks import TASKS
from pst_ds.errors import InputError

# by hand, since the names of the flags do not follow from those of the settings
FLAGS = {
    "task": "--task",
    "method": "--method",
    "machine": "--machine",
    "speedup": "--speedup",
    "data.train": "--train",
    "data.validation": "--validation",
    "data.test": "--test",
    "data.text_columns": "--text-columns",
    "data.label_column": "--label-column",
    "data.max_length": "--max-length",
    "pst.pattern": "--pattern",
    "pst.exclude_modules": "--exclude-modules",
    "schedule.final_sparsity": "--sparsity",
    "train.num_steps": "--steps",
    "train.num_epochs": "--epochs",
    "train.batch_size": "--batch-size",
    "output_dir": "--output-dir",
}
"""Flags for the settings of the run file that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="model folder, or a name on the hub")
    add("--train", required=True, metavar="FILE", help="JSONL, CSV, Parquet or text file to train on")
    # argparse formats help texts with %, so a percent sign is written twice
    add("--validation", metavar="FILE", help="chooses the best checkpoint, or none (default: 10 %% of --train)")
    add("--test", metavar="FILE", help="file for pst-ds eval and verify")
    add("--task", choices=tuple(TASKS), help="default: inferred from the columns of the training file")
    add("--text-columns", type=_names, metavar="COLUMN,...", help="one column, or two for pairs")
    add("--label-column", metavar="COLUMN", help="default: label")
    add("--method", choices=tuple(METHODS), help="default: pst; lora where --target proposes a smaller dense model")
    add("--sparsity", type=float, metavar="S", help="final sparsity (default: 0.9, and 0.5 for language models)")
    add("--pattern", metavar="P", help='matrix (default), global, row, N:M or blocks such as "16x1"')
    target = (
        f"where the model will run, as for export --for; proposes the fastest of similar quality: {', '.join(TARGETS)}"
    )
    # a metavar, since the names of all targets would fill the usage line; the help lists them
    add("--target", choices=tuple(TARGETS), metavar="TARGET", help=target)
    add("--speedup", type=above(1), metavar="X", help=f"cut until {', '.join(ENGINES)} is X times as fast")
    add("--exclude-modules", type=_names, metavar="NAME,...", help="modules to keep dense (pst.exclude_modules)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--epochs", type=float, metavar="N", help="default: 3 (causal-lm: 1), for 600 to 10,000 steps")
    steps.add_argument("--steps", type=count, metavar="N", help="optimizer steps")
    add("--batch-size", type=count, metavar="N", help="examples per step (default: about 32)")
    add("--max-length", type=count, metavar="N", help="tokens per example (default: 128, for causal-lm 512)")
    # the ranks of a cluster follow from its nodes
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=count, metavar="N", help="processes to train on (default: 1)")
    where.add_argument("--nodes", type=count, metavar="N", help="nodes of a Slurm cluster of --machine to train on")
    add("--machine", metavar="NAME", help="machine of --nodes, as for pst-ds plan; its search chooses the settings")
    add("--output-dir", metavar="DIR", help="run folder (default: runs/ and the name of the run file)")
    add("--out", default="run.toml", metavar="FILE", help="run file to write (default: run.toml)")
    add("--force", action="store_true", help="overwrite an existing run file")


def run(args: argparse.Namespace) -> dict[str, object]:
    out = Path(args.out)
    # with --force too: a folder is not overwritten by a file
    if out.is_dir():
        raise InputError(f"--out {out} is a folder. Name a file to write, such as {out / 'run.toml'}")
    deepspeed_file = out.with_suffix(".deepspeed.json")
    # before the model and the data are read, which may take minutes
    for path in (out, deepspeed_file):
        if path.exists() and not args.force:
            raise InputError(f"{path} exists. Name another file with --out, or overwrite it with --force")
        require_writable(path, f"--out {out}")
    # torch and transformers are imported only now, so that --help and the messages above do not wait for them
    from pst_ds.cli.init.draft import chosen_run
    from pst_ds.cli.init.text import write_files

    chosen = chosen_run(args, deepspeed_file)
    write_files(chosen, out, deepspeed_file)
    summary = chosen.summary
    # 0 for methods that do not prune
    sparsity = f", sparsity {summary['sparsity']}" if summary["sparsity"] else ""
    print(
        f"wrote {out}: {summary['task']}, method {summary['method']}{sparsity}, {summary['num_layers']} layers, "
        f"{summary['trained_parameters']:,} trained parameters, {summary['num_steps']} steps over "
        f"{summary['examples']} {summary['unit']}"
    )
    for remark in summary["remarks"]:
        print(remark)
    print(f"next: {chosen.plan_command(out)}; then {chosen.train_command(out)}")
    return {**summary, "out": args.out, "deepspeed_config": chosen.run.deepspeed_config}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
