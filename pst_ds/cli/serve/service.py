"""The model, store and limits that ``pst-ds serve`` serves, as its options say."""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase as Tokenizer

from pst_ds.checkpoint.user_store import State, UserStore
from pst_ds.cli.engine import native_decoder
from pst_ds.cli.main import quiet_libraries
from pst_ds.data.conversations import read_template
from pst_ds.data.model_limits import positions_of
from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder, open_model_folder
from pst_ds.inference.encoder.encoder import Encoder, kind_of
from pst_ds.inference.serve.app import Limits, Service, make_app
from pst_ds.inference.serve.batches import Batches
from pst_ds.inference.serve.encoders import Batcher, EncoderService
from pst_ds.inference.serve.gate import Access
from pst_ds.inference.serve.grammar import GrammarError, Grammars
from pst_ds.inference.serve.jobs import Answering
from pst_ds.inference.serve.metrics import FOLDER
from pst_ds.inference.serve.processes import answer, answer_from_workers, bound
from pst_ds.inference.serve.prompt_size import ReaderTokenizers, longest_token
from pst_ds.inference.serve.protocol import ProtocolError
from pst_ds.inference.serve.slots import Slots
from pst_ds.inference.serve.text import TextService
from pst_ds.parallel.launch import LaunchEnvironment, device_of

KEYS = "PST_DS_API_KEYS"
"""Environment variable with the keys of clients, separated by commas."""
_UNLIMITED = 1 << 17
"""Positions of a model whose config has no limit."""
_TEXT_OPTIONS = {
    "store": None,
    "chat_template": None,
    "memory": None,
    "max_new_tokens": None,
    "load_as": "auto",
    "dtype": None,
    "engine": "auto",
}
"""Options for causal models only, with their defaults."""


def serve(args: argparse.Namespace) -> dict[str, object]:
    """Serve until told to stop, from this process or from workers. Returns the model, its users and the port."""
    # also with workers, which open the folder themselves: an invalid one is reported once, before they start
    folder, tokenizer, store = opened(args)
    facts: dict[str, object] = {"model": args.model, "name": args.name, "users": len(store or ())}
    # before the model is loaded, which may take minutes: the port may be in use
    with bound(args.host, args.port) as listener:
        # --port 0 lets the system choose
        facts["port"] = listener.getsockname()[1]
        if args.workers > 1:
            was_told_to_stop = _serve_from_workers(args, listener, facts)
            return facts if was_told_to_stop else {**facts, "exit_code": 1}
        app = make_app(service_of(args, folder, tokenizer, store))
        _say(args, facts)
        _log_requests()
        answer(app, listener)
    return facts


def _serve_from_workers(args: argparse.Namespace, listener: socket.socket, facts: Mapping[str, object]) -> bool:
    """Serve from ``--workers`` processes. Returns False if a worker could not start."""
    _say(args, facts)
    with TemporaryDirectory(prefix="pst-ds-counters-") as shared:
        # the workers inherit the environment; prometheus_client reads it when they import it
        os.environ[FOLDER] = shared
        return answer_from_workers(partial(_app_of_worker, args), listener, args.workers)


def _log_requests() -> None:
    """Write a line of JSON per request to stderr."""
    handler = logging.StreamHandler()
    # nothing but the message, which is JSON
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("pst_ds.inference.serve.metrics")
    log.handlers = [handler]
    # a handler of the root logger would write each line again
    log.propagate = False
    log.setLevel(logging.INFO)


def _say(args: argparse.Namespace, facts: Mapping[str, object]) -> None:
    """Print the address, the users and the number of keys of the server."""
    users = f", {facts['users']} users" if args.store else ""
    access = f"no key required: set {KEYS} to require one"
    if _keys():
        access = f"{len(_keys())} keys"
    if args.workers > 1:
        access += f", {args.workers} workers"
    # flushed, since programs that start a server wait for this line
    print(f"serving {facts['name']}{users} at http://{args.host}:{facts['port']}/v1 ({access})", flush=True)


def _app_of_worker(args: argparse.Namespace) -> FastAPI:
    """Load the application of a worker, which uses its share of the cores. Raises InputError."""
    # a worker is a new process, which has not run main()
    quiet_libraries()
    _log_requests()
    if not args.threads and "OMP_NUM_THREADS" not in os.environ:
        args.threads = max(1, (os.cpu_count() or 1) // args.workers)
    return make_app(service_of(args, *opened(args)))


def _keys() -> tuple[str, ...]:
    """Return the keys of clients. An environment variable, since others on this machine see the command line."""
    stripped = (key.strip() for key in os.environ.get(KEYS, "").split(","))
    # an empty key would admit requests without one
    return tuple(filter(None, stripped))


def opened(args: argparse.Namespace) -> tuple[ModelFolder, Tokenizer, UserStore | None]:
    """Return the folder, its tokenizer and the store, without loading the model; name the model. Raises InputError."""
    folder = open_model_folder(args.model)
    args.name = args.name or folder.path.resolve().name
    tokenizer = folder.tokenizer()
    if not folder.is_causal:
        _require_no_text_options(args, folder)
        return folder, tokenizer, None
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template, "--chat-template")
    if tokenizer.chat_template is None:
        why = "the tokenizer has no chat template: only /v1/completions is answered. Add one with --chat-template FILE"
        print(f"{args.model}: {why}", file=sys.stderr)
    store = None
    if args.store:
        store = UserStore(Path(args.store), kept=args.users_in_memory)
    return folder, tokenizer, store


def _require_no_text_options(args: argparse.Namespace, folder: ModelFolder) -> None:
    """Raise InputError for options that have no effect on classifiers, regressors and embedding models."""
    kind = kind_of(folder)
    for name, default in _TEXT_OPTIONS.items():
        if getattr(args, name) != default:
            raise InputError(f"--{name.replace('_', '-')} is for causal models, and {args.model} is a {kind}. Omit it")


def _encoder_service(args: argparse.Namespace) -> EncoderService:
    """Load a classifier, regressor or embedding model and return its service. Raises InputError."""
    encoder = Encoder(args.model, threads=args.threads, max_length=args.max_prompt_tokens, batch=args.max_batch)
    # compiles what the first request would wait for
    encoder.outputs(["What is the time?"])
    batcher = Batcher(encoder, args.max_waiting)
    batcher.start()
    return EncoderService(
        name=args.name,
        limits=Limits(body_bytes=args.max_body),
        access=Access(_keys(), args.host),
        encoder=encoder,
        worker=batcher,
        tokenizers=ReaderTokenizers(encoder.tokenizer),
    )


def service_of(args: argparse.Namespace, folder: ModelFolder, tokenizer: Tokenizer, store: UserStore | None) -> Service:
    """Load the model and return the service. Raises InputError."""
    if not folder.is_causal:
        return _encoder_service(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    # only the native decoder has per-user adapters, and it runs on the CPU
    device = "cpu"
    if store is None:
        device = device_of(LaunchEnvironment(0, 1, 0))
    positions = positions_of(folder.config)
    # adapters of some methods put tokens before every prompt
    if positions:
        positions -= folder.extra_tokens
    ends = folder.end_tokens(tokenizer)
    # every worker has a cache of its sequences
    cache_bytes = round(1e9 * (args.memory or _memory_of_cache()) / args.workers)
    decoder = native_decoder(
        args, folder, device, positions or _UNLIMITED, sequences=args.max_batch, cache_bytes=cache_bytes, users=store
    )
    answering: Answering
    if decoder is not None:
        # less than the model's if the memory is too small for that
        positions = decoder.context
        answering = Slots(decoder, ends=ends, most_waiting=args.max_waiting)
    else:
        answering = _batches(args, folder, tokenizer, device, ends)
    limits = Limits(
        body_bytes=args.max_body,
        prompt_tokens=args.max_prompt_tokens or 0,
        new_tokens=args.max_new_tokens or positions or _UNLIMITED,
        positions=positions,
        vocabulary=folder.config.get_text_config().vocab_size,
        token_characters=longest_token(tokenizer),
    )
    service = TextService(
        name=args.name,
        limits=limits,
        access=Access(_keys(), args.host),
        worker=answering,
        tokenizer=tokenizer,
        tokenizers=ReaderTokenizers(tokenizer),
        grammars=Grammars(tokenizer, ends),
        store=store,
    )
    # before the thread that answers: both compute with the same cache
    _warm_up(args, service)
    answering.start()
    return service


def _batches(
    args: argparse.Namespace, folder: ModelFolder, tokenizer: Tokenizer, device: str, ends: list[int]
) -> Batches:
    """Load the transformers model. Raises InputError."""
    if args.memory:
        raise InputError("--memory is for the native decoder, which is not used here. Add --engine native")
    model = folder.load(args.load_as, args.dtype, device)
    pad = tokenizer.pad_token_id
    if pad is None:
        # any token will do, since padding is masked
        pad = next(iter(ends), 0)
    return Batches(model, pad=pad, ends=ends, most_in_batch=args.max_batch, most_waiting=args.max_waiting)


def _memory_of_cache() -> float:
    """Return a quarter of the memory of this machine, in GB. Weights and other programs need the rest."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total_bytes / 4 / 1e9


def _warm_up(args: argparse.Namespace, service: TextService) -> None:
    """Run what requests run, for a user too, so that no request waits for a compiler. Raises InputError."""
    states: list[State | None] = [None]
    if service.store is not None:
        states.append(_empty_state(service.store))
    text = "What is the time?"
    try:
        if service.tokenizer.chat_template is None:
            prompt = service.continued(text)
        else:
            prompt = service.prompt_of([{"role": "user", "content": text}])
        service.worker.warm_up(prompt, states)
        # without support for the tokenizer, requests with a JSON schema are refused, and others answered
        with suppress(GrammarError):
            service.grammars.of_schema({"type": "object"})
    except ProtocolError as error:
        # the chat template rejects a plain question
        raise InputError(f"{args.chat_template or args.model}: {error.message}") from None
    # a model's own code may raise anything, and every request would
    except Exception as error:
        raise InputError(f"{args.model}: the model fails at a prompt: {error}") from error


def _empty_state(store: UserStore) -> State:
    """Return a state of zeros with the shapes and the dtype of the store's users, of whom there may be none yet."""
    common = store.common
    dtype = torch.bfloat16 if common.dtype == "bf16" else torch.float32
    state = {}
    for name, shape in common.shapes.items():
        state[name] = torch.zeros(shape, dtype=dtype)
    return state
