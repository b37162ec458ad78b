"""``pst-ds generate DIR --prompt TEXT``: generate text with a dense or packed model; tokens per second go to stderr."""

import argparse

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_engine_arguments, count
from pst_ds.errors import InputError

FLAGS = flags_of_fields(["temperature", "top_p"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pst-ds generate``."""
    add = parser.add_argument
    add("model", metavar="DIR", help="model folder: dense, or packed by pst-ds export")
    add("--prompt", required=True, metavar="TEXT", help='text to continue; "-" reads stdin')
    add("--chat", action="store_true", help="the prompt is a message: use the tokenizer's chat template")
    add("--max-new-tokens", type=count, default=128, metavar="N", help="(default: 128)")
    add("--temperature", type=float, metavar="T", help="sampling temperature (default: greedy)")
    add("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that add up to P")
    add("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    add("--store", metavar="DIR", help="per-user adapters (pst-ds users train --form beside)")
    add("--user", metavar="NAME", help="user in --store whose adapter is used")
    add_engine_arguments(parser)
    bits = "bits of the native decoder's activations in prompts: 8 is faster and less exact (default: 16)"
    add("--prompt-bits", type=int, choices=(8, 16), metavar="BITS", help=bits)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Stream the generated text to stdout; return it with its speed. Raises InputError."""
    if (args.store is None) != (args.user is None):
        raise InputError("--store and --user must be given together")
    # imported here, because transformers takes seconds to import, and --help must not wait for it
    from pst_ds.cli.generate.answer import answer

    return answer(args)
