"""``pst-ds serve DIR``: serve a model folder over HTTP: text with or without per-user adapters, labels, embeddings."""

import argparse

from pst_ds.cli.main import above, add_engine_arguments, count
from pst_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="folder of a causal model, a classifier or an embedding model")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0 chooses a free one)")
    add("--name", help="the model's name in requests (default: the folder's)")
    add("--store", metavar="DIR", help="store of per-user adapters, each served as NAME:USER")
    add("--chat-template", metavar="FILE", help="Jinja file to use instead of the tokenizer's template")
    add("--users-in-memory", type=count, default=64, metavar="N", help="adapters kept in memory (default: 64)")
    add("--workers", type=count, default=1, metavar="N", help="processes, restarted when they die (default: 1)")
    add("--max-batch", type=count, default=8, metavar="N", help="requests answered together (default: 8)")
    add("--memory", type=above(0), metavar="GB", help="for keys and values, which limits the context of a request")
    add("--max-waiting", type=count, default=64, metavar="N", help="waiting requests (default: 64)")
    add("--max-body", type=count, default=1 << 20, metavar="B", help="request size (default: 2^20)")
    add("--max-prompt-tokens", type=count, metavar="N", help="(default: the model's positions)")
    add("--max-new-tokens", type=count, metavar="N", help="answer length (default: what the context allows)")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    # before the model is loaded; a socket refuses other numbers with an OverflowError
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port {args.port} is not a port. Use 0 to 65535")
    # FastAPI and its companions are an extra: most users only train
    try:
        from pst_ds.cli.serve.service import serve
    except ImportError as error:
        raise InputError(f"pst-ds serve needs {error.name}: pip install 'pst-ds[serve]'") from None
    return serve(args)
