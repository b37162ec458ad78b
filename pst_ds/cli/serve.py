"""``pst-ds serve DIR``: a model folder, with or without users, behind the chat-completions protocol."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.cli.main import count
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from pst_ds.serve.app import Service

KEYS = "PST_DS_API_KEYS"
"""Environment variable: keys that requests must have one of, with commas between them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="folder of a causal model: dense, or packed by pst-ds export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0 takes a free one)")
    parser.add_argument("--name", help="the model's name in requests (default: the folder's)")
    parser.add_argument("--store", metavar="DIR", help="states of users, each served as NAME:USER")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file in place of the tokenizer's template")
    parser.add_argument("--max-batch", type=count, default=8, metavar="N", help="texts written at a time (default: 8)")
    parser.add_argument("--max-waiting", type=count, default=64, metavar="N", help="requests that wait (default: 64)")
    parser.add_argument("--max-body", type=count, default=1 << 20, metavar="B", help="of a request (default: 2^20)")
    parser.add_argument("--max-prompt-tokens", type=count, metavar="N", help="(default: the model's positions)")
    parser.add_argument("--max-new-tokens", type=count, default=512, metavar="N", help="of an answer (default: 512)")
    load_as = "packed weights: keep them packed, or unpack them; auto takes the quicker"
    parser.add_argument("--load-as", choices=("auto", "sparse", "dense"), default="auto", help=load_as)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the folder's")
    parser.add_argument("--threads", type=count, metavar="N", help="threads (default: OMP_NUM_THREADS, or all cores)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"pst-ds serve needs {error.name}: pip install 'pst-ds[serve]'") from None
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port {args.port} is no port: 0 to 65535")
    from pst_ds.serve.app import make_app

    service = _service(args)
    keys = f"{len(service.keys)} keys" if service.keys else f"no key wanted: set {KEYS} to want one"
    users = f", {len(service.store)} users" if service.store is not None else ""
    print(f"serving {service.name}{users} at http://{args.host}:{args.port}/v1 ({keys})", flush=True)
    uvicorn.run(make_app(service), host=args.host, port=args.port, log_level="warning")
    return {"model": args.model, "name": service.name, "users": len(service.store or ())}


def _service(args: argparse.Namespace) -> Service:
    """Load what is served. Raises InputError."""
    import torch

    from pst_ds.data.conversations import read_template
    from pst_ds.data.generation import end_tokens
    from pst_ds.data.model_limits import positions_of
    from pst_ds.hf.model_folder import open_model_folder
    from pst_ds.parallel.launch import LaunchEnvironment, device_of
    from pst_ds.runtime.dense import quicken_output_layer
    from pst_ds.serve.app import Limits, Service
    from pst_ds.serve.batches import Batches
    from pst_ds.users.served import ServedUsers
    from pst_ds.users.store import UserStore

    if args.threads:
        torch.set_num_threads(args.threads)
    folder = open_model_folder(args.model)
    folder.require_causal()
    tokenizer = folder.tokenizer()
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template, "--chat-template")
    if tokenizer.chat_template is None:
        raise InputError(f"{args.model}: the tokenizer has no chat template; give a Jinja file with --chat-template")
    store = UserStore.open(Path(args.store)) if args.store else None
    model = folder.load(args.load_as, args.dtype, device_of(LaunchEnvironment(0, 1, 0)))
    quicken_output_layer(model)
    users = None if store is None else ServedUsers(model, folder.path, store)
    ends = end_tokens(model.generation_config)
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    batches = Batches(
        model, pad=pad, ends=ends, users=users, most_in_batch=args.max_batch, most_waiting=args.max_waiting
    )
    limits = Limits(
        body_bytes=args.max_body, prompt_tokens=args.max_prompt_tokens or 0, new_tokens=args.max_new_tokens,
        positions=positions_of(folder.config),
    )  # fmt: skip
    keys = tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())
    return Service(args.name or folder.path.resolve().name, batches, tokenizer, limits, store, keys)
