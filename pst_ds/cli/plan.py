"""``pst-ds plan RUN.toml``: predict a run from names and shapes alone."""

import argparse
import math

from pst_ds.cli.main import add_run_arguments, count, load_run_or_folder
from pst_ds.cli.plan_text import Plan, print_plan
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
    memory = "gigabytes of memory that a rank has (default: the machine's)"
    parser.add_argument("--memory", type=_above_0, metavar="GB", help=memory)
    parser.add_argument("--search", action="store_true", help="the fastest way to run the same batch that fits, too")
    parser.add_argument("--price", type=_above_0, metavar="N", help="of one rank for an hour, for the cost of the run")


def run(args: argparse.Namespace) -> Plan:
    config = load_run_or_folder(args)
    from pst_ds.cli.plan_search import print_search, search
    from pst_ds.cli.plan_values import Ask, make_plan
    from pst_ds.planning.machine_file import machine_of

    ask = Ask(args.ranks, args.machine, args.no_data, round((args.memory or 0) * 1e9), args.price)
    plan = make_plan(config, ask)
    print_plan(plan)
    if args.search:
        plan["search"] = search(config, ask, plan, machine_of(plan["machine"]).node_size)
        print_search(plan["search"])
    return plan


def _above_0(text: str) -> float:
    """Return the number that a command line gives. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
