"""The answer that ``pst-ds generate`` streams to stdout, and its speed."""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

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
    # wrong options first, because loading the model takes long
    sampling = _sampling(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = open_model_folder(args.model)
    folder.require_causal()
    if args.store is not None:
        # the native decoder computes the adapters of users, and runs on the CPU only
        store = UserStore(Path(args.store))
        device = "cpu"
    else:
        store = None
        device = device_of(LaunchEnvironment(rank=0, world_size=1, local_rank=0))
    tokenizer = folder.tokenizer()
    ids = _encoded(tokenizer, args)
    new_tokens = _new_tokens(args, ids, folder)
    context = len(ids) + new_tokens
    start = time.perf_counter()
    decoder = _decoder(args, folder, device, context, store)
    model = decoder or folder.load(args.load_as, args.dtype, device)
    load_seconds = time.perf_counter() - start
    if new_tokens < args.max_new_tokens:
        print(f"stops after {new_tokens} tokens: the model has {context} positions", file=sys.stderr)
    stopwatch = Stopwatch(tokenizer, skip_prompt=True, skip_special_tokens=True)
    new = generated(
        model,
        ids,
        new_tokens=new_tokens,
        sampling=sampling,
        ends=folder.end_tokens(tokenizer),
        seed=args.seed,
        streamer=stopwatch,
    )
    result: Facts = {"model": args.model, "format": folder.format}
    result |= _facts_of_engine(model, folder)
    result |= {
        "device": device,
        "threads": torch.get_num_threads(),
        "load_seconds": load_seconds,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
    }
    result |= stopwatch.rates(len(ids))
    print(_speed(result), file=sys.stderr, flush=True)
    return result


def _facts_of_engine(model: Decoder | PreTrainedModel, folder: ModelFolder) -> Facts:
    """Return the engine that computes, its number of layers with packed weights, and its dtype."""
    if isinstance(model, Decoder):
        dtype = folder.values or str(folder.config.dtype)
        # the decoder has loops for whole models instead of layers
        return {"engine": "native", "sparse_layers": 0, "dtype": dtype.removeprefix("torch.")}
    dtype = str(model.dtype)
    return {"engine": "torch", "sparse_layers": len(sparse_layers(model)), "dtype": dtype.removeprefix("torch.")}


def _speed(result: Facts) -> str:
    """Format the tokens per second of prefill and decoding, and what they were computed with."""
    decoding = ""
    decode = result["decode_tokens_per_second"]
    if decode is not None:
        # the first token comes with the prefill
        decoding = f", then {result['new_tokens'] - 1} tokens at {decode:.1f} a second"
    layers = ""
    if result["sparse_layers"]:
        layers = f"{result['sparse_layers']} sparse layers, "
    return (
        f"prefill: {result['prompt_tokens']} tokens at {result['prefill_tokens_per_second']:.1f} a second{decoding} "
        f"({layers}{result['dtype']}, {result['engine']}, {result['threads']} threads, loaded in "
        f"{result['load_seconds']:.1f} s)"
    )


def _decoder(
    args: argparse.Namespace, folder: ModelFolder, device: str, context: int, store: UserStore | None
) -> Decoder | None:
    """Return the native decoder if it is chosen, with the state of ``--user``. Raises InputError."""
    prompt_bits = args.prompt_bits or 16
    decoder = native_decoder(args, folder, device, context, users=store, prompt_bits=prompt_bits)
    if decoder is None and args.prompt_bits:
        # transformers would ignore it
        raise InputError("--prompt-bits is for the native decoder, which is not used here. Add --engine native")
    if decoder is not None and store is not None:
        decoder.assign(store.state(args.user))
    return decoder


def _sampling(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings, which are greedy without options. Raises InputError."""
    temperature = args.temperature
    if temperature is None:
        # --top-p alone asks for sampling, of which greedy decoding would make nothing
        temperature = 0.0 if args.top_p is None else 1.0
    top_p = 1.0 if args.top_p is None else args.top_p
    try:
        return Sampling(temperature, top_p=top_p)
    except ValueError as error:
        raise InputError(str(error)) from None


def _encoded(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[int]:
    """Return the tokens of the prompt, at least one. Raises InputError."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise InputError("--prompt is empty. Give a text to continue")
    if args.chat and tokenizer.chat_template is None:
        raise InputError(f"{args.model}: the tokenizer has no chat template. Omit --chat")
    messages = [{"role": "user", "content": prompt}]
    ids = prompt_tokens(tokenizer, messages if args.chat else prompt, args.model)
    if not ids:
        # such as a word-level vocabulary without the words of the prompt, and without a token for unknown ones
        raise InputError("--prompt: the tokenizer returns no tokens for it")
    return ids


def _new_tokens(args: argparse.Namespace, ids: list[int], folder: ModelFolder) -> int:
    """Return the number of requested tokens, or fewer if the model's positions end. Raises InputError."""
    config = folder.config.get_text_config()
    if max(ids) >= config.vocab_size:
        # otherwise the embedding would fail, on a GPU without a readable error
        raise InputError(
            f"{args.model}: the tokenizer gives token {max(ids)}, and the model has {config.vocab_size}: "
            "model and tokenizer do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        # models with relative positions have no limit
        return int(args.max_new_tokens)
    # a trained prompt, which the model puts before the tokens of the user
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
        """Record the time, and print what is new. Called with the prompt first, and then with every token."""
        # before the text is decoded and printed, which is not part of the model's time
        self._times.append(time.perf_counter())
        super().put(value)

    def rates(self, prompt_tokens: int) -> dict[str, float | None]:
        """Return seconds to the first token, and tokens per second of prefill and decoding (None for one token)."""
        prompt, first, *later = self._times
        seconds = first - prompt
        decode = None
        if later:
            # without the first token, which the prefill gives
            decode = len(later) / (later[-1] - first)
        return {
            "first_token_seconds": seconds,
            "prefill_tokens_per_second": prompt_tokens / seconds,
            "decode_tokens_per_second": decode,
        }
