"""``pst-ds plan RUN.toml``: predict a run from names and shapes alone."""

import argparse
from typing import Any

from pst_ds.cli.main import add_run_arguments, count, load_run_or_folder
from pst_ds.cli.plan_text import print_plan
from pst_ds.planning.machines import MACHINES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML)")
    ranks = "ranks to plan for; needs no cluster (default: the launcher's, or 1)"
    parser.add_argument("--world-size", "--ranks", dest="ranks", type=count, metavar="N", help=ranks)
    no_data = "read neither data nor tokenizer: model.path may hold a config.json alone; needs train.num_steps"
    parser.add_argument("--no-data", action="store_true", help=no_data)
    machine = (
        f"rates for the expected times: {', '.join(MACHINES)}, or a TOML file of your own (default: cpu where there is "
        "no GPU and a core for every rank, else h100)"
    )
    parser.add_argument("--machine", metavar="FILE", help=machine)


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.cli.plan_values import make_plan

    plan = make_plan(config, args.ranks, args.machine, no_data=args.no_data)
    print_plan(plan)
    return plan
