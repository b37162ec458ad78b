"""The answer that ``pst-ds generate`` streams to stdout, and its speed."""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from pst_ds.checkpoint.user_store import UserStore
from pst_ds.cli.engine import native_decoder
from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder, open_model_folder
from pst_ds.inference.decoder import Decoder, Sampling
from pst_ds.inference.loading import generated, prompt_tokens
from pst_ds.parallel.launch import LaunchEnvironment, device_of
from pst_ds.runtime import sparse_layers
from pst_ds.writing.manifest import Facts


def answer(args: argparse.Namespace) -> Facts:
    """Generate the text that ``args`` ask for. Raises InputError."""
    sampling = _sampling(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(LaunchEnvironment(0, 1, 0)) if args.store is None else "cpu"
    folder = open_model_folder(args.model)
    folder.require_causal()
    store = UserStore(Path(args.store)) if args.store is not None else None
    tokenizer = folder.tokenizer()
    ids = _encoded(tokenizer, args)
    new_tokens = _new_tokens(args, ids, folder)
    context, start = len(ids) + new_tokens, time.perf_counter()
    model = _decoder(args, folder, device, context, store) or folder.load(args.load_as, args.dtype, device)
    load_seconds = time.perf_counter() - start
    if new_tokens < args.max_new_tokens:
        print(f"stops after {new_tokens} tokens: the model has {context} positions", file=sys.stderr)
    stopwatch = Stopwatch(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if isinstance(model, Decoder):
        engine, dtype, layers = "native", folder.values or str(folder.config.dtype), 0
    else:
        engine, dtype, layers = "torch", str(model.dtype), len(sparse_layers(model))
    new = generated(model, ids, new_tokens, sampling, folder.end_tokens(tokenizer), args.seed, stopwatch)
    result: Facts = {
        "model": args.model,
        "format": folder.format,
        "engine": engine,
        "sparse_layers": layers,
        "dtype": dtype.removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
        "load_seconds": load_seconds,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        **stopwatch.rates(len(ids)),
    }
    print(_speed(result), file=sys.stderr, flush=True)
    return result


def _speed(result: Facts) -> str:
    decode = result["decode_tokens_per_second"]
    after = "" if decode is None else f", then {result['new_tokens'] - 1} tokens at {decode:.1f} a second"
    layers = f"{result['sparse_layers']} sparse layers, " if result["sparse_layers"] else ""
    return (
        f"prefill: {result['prompt_tokens']} tokens at {result['prefill_tokens_per_second']:.1f} a second{after} "
        f"({layers}{result['dtype']}, {result['engine']}, {result['threads']} threads, loaded in "
        f"{result['load_seconds']:.1f} s)"
    )


def _decoder(
    args: argparse.Namespace, folder: ModelFolder, device: str, context: int, store: UserStore | None
) -> Decoder | None:
    """Return the native decoder if it is chosen, with the state of ``--user``. Raises InputError."""
    decoder = native_decoder(args, folder, device, context, users=store, prompt_bits=args.prompt_bits or 16)
    if decoder is None and args.prompt_bits:
        raise InputError("--prompt-bits is for the native decoder, which is not used here. Add --engine native")
    if decoder is not None and store is not None:
        decoder.assign(store.state(args.user))
    return decoder


def _sampling(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings, which are greedy without options. Raises InputError."""
    default = 0.0 if args.top_p is None else 1.0
    try:
        temperature = default if args.temperature is None else args.temperature
        return Sampling(temperature, top_p=1.0 if args.top_p is None else args.top_p)
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from None


def _encoded(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[int]:
    """Return the tokens of the prompt, at least one. Raises InputError."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise InputError("--prompt is empty. Give a text to continue")
    if args.chat and tokenizer.chat_template is None:
        raise InputError(f"{args.model}: the tokenizer has no chat template. Omit --chat")
    ids = prompt_tokens(tokenizer, [{"role": "user", "content": prompt}] if args.chat else prompt, args.model)
    if not ids:
        raise InputError("--prompt: the tokenizer returns no tokens for it")
    return ids


def _new_tokens(args: argparse.Namespace, ids: list[int], folder: ModelFolder) -> int:
    """Return the number of requested tokens, or fewer if the model's positions end. Raises InputError."""
    config = folder.config.get_text_config()
    if max(ids) >= config.vocab_size:
        raise InputError(
            f"{args.model}: the tokenizer gives token {max(ids)}, and the model has {config.vocab_size}: "
            "model and tokenizer do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return int(args.max_new_tokens)
    positions -= folder.extra_tokens
    if len(ids) >= positions:
        raise InputError(f"--prompt has {len(ids)} tokens, and the model has {positions} positions. Shorten it")
    return min(args.max_new_tokens, positions - len(ids))


class Stopwatch(TextStreamer):
    """Streamer of ``generate()`` that also records when the prompt and every token arrive."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **options: bool):
        super().__init__(tokenizer, **options)
        self._times = list[float]()

    def put(self, value: torch.Tensor) -> None:
        self._times.append(time.perf_counter())
        super().put(value)

    def rates(self, prompt_tokens: int) -> dict[str, float | None]:
        """Return seconds to the first token, and tokens per second of prefill and decoding (None for one token)."""
        prompt, first, *later = self._times
        return {
            "first_token_seconds": first - prompt,
            "prefill_tokens_per_second": prompt_tokens / (first - prompt),
            "decode_tokens_per_second": len(later) / (later[-1] - first) if later else None,
        }
