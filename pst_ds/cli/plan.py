"""``pst-ds plan RUN.toml``: predict memory, time and cost of a run from names and shapes."""

import argparse
import math

from pst_ds.cli.main import add_run_arguments, count, load_run_or_folder, number
from pst_ds.cli.plan_text import plan_lines, search_lines
from pst_ds.planning.machines import MACHINES

_above_0 = number("a number above 0", float, lambda value: 0 < value < math.inf)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML)")
    add("--world-size", "--ranks", dest="ranks", type=count, metavar="N", help="ranks (default: the launcher's, or 1)")
    add("--no-data", action="store_true", help="needs only config.json and train.num_steps: no data, no tokenizer")
    machine = f"rates for the expected times: {', '.join(MACHINES)}, or a TOML file (default: by this machine)"
    add("--machine", metavar="FILE", help=machine)
    add("--memory", type=_above_0, metavar="GB", help="gigabytes of memory per rank (default: the machine's)")
    add("--search", action="store_true", help="also find the fastest way to run the same batch that fits")
    add("--price", type=_above_0, metavar="N", help="price of one rank for an hour, for the run's cost")


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
