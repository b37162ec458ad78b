"""The model, store and limits that ``pst-ds serve`` serves, as its options say."""

import argparse
import logging
import os
import sys
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


def serve(args: argparse.Namespace) -> dict[str, object]:
    """Serve until told to stop, from this process or from workers. Returns the model, its users and the port."""
    folder, tokenizer, store = opened(args)
    facts: dict[str, object] = {"model": args.model, "name": args.name, "users": len(store or ())}
    with bound(args.host, args.port) as at:
        facts["port"] = at.getsockname()[1]
        if args.workers > 1:
            _say(args, facts)
            with TemporaryDirectory(prefix="pst-ds-counters-") as shared:
                os.environ[FOLDER] = shared
                ended = answer_from_workers(partial(_app_of_worker, args), at, args.workers)
            return facts if ended else {**facts, "exit_code": 1}
        app = make_app(service_of(args, folder, tokenizer, store))
        _say(args, facts)
        _log_requests()
        answer(app, at)
    return facts


def _log_requests() -> None:
    """Write a line of JSON per request to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("pst_ds.inference.serve.metrics")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def _say(args: argparse.Namespace, facts: dict[str, object]) -> None:
    users = f", {facts['users']} users" if args.store else ""
    keys = f"{len(_keys())} keys" if _keys() else f"no key required: set {KEYS} to require one"
    workers = f", {args.workers} workers" if args.workers > 1 else ""
    print(f"serving {facts['name']}{users} at http://{args.host}:{facts['port']}/v1 ({keys}{workers})", flush=True)


def _app_of_worker(args: argparse.Namespace) -> FastAPI:
    """Load the application of a worker, which uses its share of the cores. Raises InputError."""
    quiet_libraries()
    _log_requests()
    if not args.threads and "OMP_NUM_THREADS" not in os.environ:
        args.threads = max(1, (os.cpu_count() or 1) // args.workers)
    return make_app(service_of(args, *opened(args)))


def _keys() -> tuple[str, ...]:
    return tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())


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
    store = UserStore(Path(args.store), kept=args.users_in_memory) if args.store else None
    return folder, tokenizer, store


def _require_no_text_options(args: argparse.Namespace, folder: ModelFolder) -> None:
    kind, defaults = kind_of(folder), {"load_as": "auto", "engine": "auto"}
    for name in ("store", "chat_template", "memory", "max_new_tokens", "load_as", "dtype", "engine"):
        if getattr(args, name) != defaults.get(name):
            raise InputError(f"--{name.replace('_', '-')} is for causal models, and {args.model} is a {kind}. Omit it")


def _encoder_service(args: argparse.Namespace) -> EncoderService:
    encoder = Encoder(args.model, threads=args.threads, max_length=args.max_prompt_tokens, batch=args.max_batch)
    encoder.outputs(["What is the time?"])  # compiles what a request would wait for
    batcher, limits = Batcher(encoder, args.max_waiting), Limits(body_bytes=args.max_body)
    batcher.start()
    access = Access(_keys(), args.host)
    return EncoderService(
        name=args.name,
        limits=limits,
        access=access,
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
    device = device_of(LaunchEnvironment(0, 1, 0)) if store is None else "cpu"
    positions = positions_of(folder.config)
    if positions:
        positions -= folder.extra_tokens
    ends = folder.end_tokens(tokenizer)
    cache_bytes = round(1e9 * (args.memory or _memory_of_cache()) / args.workers)
    decoder = native_decoder(
        args, folder, device, positions or _UNLIMITED, sequences=args.max_batch, cache_bytes=cache_bytes, users=store
    )
    if decoder is not None:
        positions = decoder.context
        answering: Answering = Slots(decoder, ends=ends, most_waiting=args.max_waiting)
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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return Batches(model, pad=pad, ends=ends, most_in_batch=args.max_batch, most_waiting=args.max_waiting)


def _memory_of_cache() -> float:
    """Return a quarter of the memory of this machine, in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4e9


def _warm_up(args: argparse.Namespace, service: TextService) -> None:
    """Run what requests run, for a user too, so that no request waits for a compiler. Raises InputError."""
    states: list[State | None] = [None]
    if service.store is not None:
        common = service.store.common
        dtype = torch.bfloat16 if common.dtype == "bf16" else torch.float32
        states.append({name: torch.zeros(shape, dtype=dtype) for name, shape in common.shapes.items()})
    has_template, text = service.tokenizer.chat_template is not None, "What is the time?"
    try:
        prompt = service.prompt_of([{"role": "user", "content": text}]) if has_template else service.continued(text)
        service.worker.warm_up(prompt, states)
        with suppress(GrammarError):  # JSON schemas are then refused
            service.grammars.of_schema({"type": "object"})
    except ProtocolError as error:
        raise InputError(f"{args.chat_template or args.model}: {error.message}") from None
    except Exception as error:
        raise InputError(f"{args.model}: the model fails at a prompt: {error}") from error
