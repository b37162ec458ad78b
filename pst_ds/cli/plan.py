"""``pst-ds plan RUN.toml``: predict memory, time and cost of a run from names and shapes."""

import argparse
import math

from pst_ds.cli.main import add_run_arguments, count, load_run_or_folder
from pst_ds.cli.plan_text import plan_lines, search_lines
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
    memory = "gigabytes of memory per rank (default: the machine's)"
    parser.add_argument("--memory", type=_above_0, metavar="GB", help=memory)
    search = "also find the fastest way to run the same batch that fits"
    parser.add_argument("--search", action="store_true", help=search)
    parser.add_argument("--price", type=_above_0, metavar="N", help="price of one rank for an hour, for the run's cost")


def run(args: argparse.Namespace) -> dict[str, object]:
    config = load_run_or_folder(args)
    from pst_ds.planning.plan import PlanOptions, plan
    from pst_ds.planning.search import search

    options = PlanOptions(args.ranks, args.machine, args.no_data, round((args.memory or 0) * 1e9), args.price)
    planned = plan(config, options)
    print("\n".join(plan_lines(planned)))
    if not args.search:
        return planned.as_json()
    found = search(config, options, planned)
    print("\n".join(search_lines(found)))
    return planned.as_json() | {"search": [one.as_json() for one in found]}


def _above_0(text: str) -> float:
    """Parse an argument that is a finite number above 0. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
