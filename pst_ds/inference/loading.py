"""``pst_ds.load``: a model folder as an object that generates text, or predicts labels, numbers or embeddings."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder, open_model_folder
from pst_ds.inference.decoder import Decoder, Sampling
from pst_ds.inference.decoder.sampling import GREEDY_BELOW
from pst_ds.inference.encoder.encoder import Encoder
from pst_ds.inference.engine import Engine, open_decoder
from pst_ds.storage_format import format_opening


class Generator:
    """A causal language model in memory. Runs on the CPU, in the native decoder or in transformers."""

    def __init__(
        self, folder: ModelFolder, *, threads: int | None = None, context: int = 2048, engine: Engine = "auto"
    ):
        """Open a model in the engine that :func:`open_decoder` chooses. Raises InputError."""
        storage = format_opening(folder.path)
        if storage is not None:
            raise InputError(f"{folder.path} {storage.why_no_generation}. Name a bitmask or dense export")
        self.path = folder.path
        self.tokenizer = folder.tokenizer()
        self._ends = folder.end_tokens(self.tokenizer)
        # torch has one number for the whole process; the native decoder has its own
        if threads:
            torch.set_num_threads(threads)
        decoder = open_decoder(folder, engine, context=context, threads=threads)
        self._model: Decoder | PreTrainedModel = decoder or folder.load()

    def generate(
        self,
        prompt: str | list[dict[str, str]],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Return the text that follows ``prompt``, a text to continue or chat messages with ``role`` and ``content``.

        ``temperature``: 0 chooses the most likely tokens. Raises ValueError, such as InputError without chat template.
        """
        ids = prompt_tokens(self.tokenizer, prompt, self.path)
        new = generated(
            self._model,
            ids,
            new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p=top_p),
            ends=self._ends,
            seed=seed,
        )
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], place: str | Path
) -> list[int]:
    """Return the tokens of a text, or of chat messages. Raises InputError, naming ``place``, without chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError(f"{place}: the tokenizer has no chat template. Use a text instead of messages")
    # as text first, and tokenised without special tokens, which the template writes itself
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generated(
    model: Decoder | PreTrainedModel,
    ids: list[int],
    new_tokens: int,
    sampling: Sampling,
    ends: list[int],
    seed: int | None,
    streamer: BaseStreamer | None = None,
) -> list[int]:
    """Return the tokens that a model writes after ``ids``; with transformers, only temperature and top_p are used."""
    if isinstance(model, Decoder):
        tokens = model.stream(ids, new_tokens, sampling=sampling, end=ends, seed=seed)
        if streamer is not None:
            tokens = _told(streamer, ids, tokens)
        return list(tokens)
    is_drawn = sampling.temperature >= GREEDY_BELOW
    drawing: dict[str, float] = {}
    if is_drawn:
        # top_k = 0, because transformers draws from the 50 most likely tokens by default
        drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # without a padding token transformers prints a warning; a single sequence has no padding
    special = {"eos_token_id": ends or None, "pad_token_id": next(iter(ends), 0)}
    # replaces the folder's settings, such as penalties
    model.generation_config = GenerationConfig(max_new_tokens=new_tokens, do_sample=is_drawn, **drawing, **special)
    if seed is not None:
        # transformers draws from the global generator
        torch.manual_seed(seed)
    prompt = torch.tensor([ids], device=model.device)  # (1, tokens)
    with torch.inference_mode():
        tokens_of_all = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), streamer=streamer
        )
    new: list[int] = tokens_of_all[0, len(ids) :].tolist()  # without the prompt
    return new


def _told(streamer: BaseStreamer, ids: list[int], tokens: Iterator[int]) -> Iterator[int]:
    """Yield ``tokens``, and tell ``streamer`` what ``generate()`` of transformers would."""
    streamer.put(torch.tensor([ids]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
        yield token
    streamer.end()


def load(
    folder: str | Path,
    *,
    threads: int | None = None,
    context: int = 2048,
    max_length: int | None = None,
    batch: int | None = None,
    engine: Engine = "auto",
) -> Generator | Encoder:
    """Open a model folder, dense or packed, on the CPU.

    Returns an object with ``generate(prompt)`` for a causal language model, and with ``predict(texts)`` for a
    classifier, a regressor or an embedding model.

    Args:
        threads: OMP_NUM_THREADS by default, or all cores.
        context: positions of a prompt and its answer, at most those of the model.
        max_length: tokens to which a text for ``predict`` is truncated. By default as in the run that was exported, or
            what the folder's sentence-transformers files, tokenizer and positions allow.
        batch: texts that ``predict`` computes together; 16 by default.
        engine: what generates text. "auto" is the native decoder for quantised values (int8, int4) if it supports the
            model, and transformers otherwise; "native" and "torch" choose one of them for any folder.

    Raises InputError.
    """
    opened = open_model_folder(folder)
    if opened.is_causal:
        return Generator(opened, threads=threads, context=context, engine=engine)
    if engine != "auto":
        raise InputError(f"engine = {engine!r}: {folder} is not a causal language model. Omit engine")
    return Encoder(folder, threads=threads, max_length=max_length, batch=batch)
