"""The decoder's public class: sequences with a cache, tokens in, logits or tokens out."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypedDict, Unpack

import torch
from torch import Tensor

from pst_ds.checkpoint.user_store import State, UserStore
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.hf.tables import StoredTable, stored_tables
from pst_ds.inference.decoder.model_reader import table_of
from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.decoder.table import USE_OTHER, DecoderError, DecoderTable, Part
from pst_ds.inference.decoder.users import require_fitting
from pst_ds.nn.addition import added_modules
from pst_ds.runtime.native_loop import Adapter, require_library

MOST_DIFFERENCE = 0.03
"""Largest mean difference of the loop's logits from the model's, relative to their norm, with a cache in fp32.

A model above it is rejected. Activations are rounded to about 14 bits. The largest deviation measured, in a model that
pruning had damaged, is a cosine of 1 - 7e-5, which corresponds to 0.012.
"""
PROBE_TOKENS = 24
"""Tokens whose logits are compared with the model's when a decoder opens."""
_SINGLE_PROBE_TOKENS = 4
"""The last of these tokens, which are processed one by one. They are few, because each reads all weights once more."""
TOKENS_IN_A_PASS = 128
"""Most tokens of a pass with fewer sequences than this; the loop's buffers have this many rows."""
PROMPT_TOKENS = 16
"""Tokens of one sequence in a pass from which on they count as a prompt."""
PROMPT_BITS = (8, 16)
CACHES = {"fp32": 32, "bf16": 16, "int8": 8}
"""Bits of keys and values. int8: quantised, with a scale for every position of a head."""


class Options(TypedDict, total=False):
    """Options of a decoder: concurrent sequences, threads (torch's number by default), cache, prompts and users."""

    sequences: int
    threads: int | None
    cache: str
    cache_bytes: int | None
    prompt_bits: int
    users: UserStore | None


class Decoder:
    """A causal language model on the CPU: native code over packed weights, with a cache for each sequence.

    Results do not depend on the number of threads, nor, with ``prompt_bits=16``, on how tokens are split over calls.
    """

    def __init__(
        self,
        table: DecoderTable,
        *,
        sequences: int = 1,
        threads: int | None = None,
        cache: str = "bf16",
        cache_bytes: int | None = None,
        prompt_bits: int = 16,
        users: UserStore | None = None,
    ):
        """Create a decoder from a table; the class methods are the usual way.

        ``cache_bytes``: memory for all caches, which shortens the context; taken as positions fill up.

        ``prompt_bits``: bits of activations if 16 or more tokens of a sequence are processed together and weights are
        quantised. 16: about 14, as for single tokens. 8: int8 with a scale per 64 columns, which AVX-512 multiplies in
        half the time; no effect on other processors.

        ``users``: store of the states that :meth:`assign` gets. Raises DecoderError if the loop does not support them.
        """
        if cache not in CACHES:
            raise DecoderError(f"cache={cache!r}: keys and values are kept in {', '.join(CACHES)}")
        if prompt_bits not in PROMPT_BITS:
            raise DecoderError(f"prompt_bits={prompt_bits!r}: activations of a prompt have 8 or 16 bits")
        # here, since compiling it may take a while and fail
        require_library()
        self.threads = threads or torch.get_num_threads()
        self.context = table.shape["context"]
        self.sequences = sequences
        if cache_bytes is not None:
            fitting = cache_bytes // (sequences * table.position_bytes(CACHES[cache]))
            # as many as the comparison with the model's logits needs
            if fitting < PROBE_TOKENS:
                raise DecoderError(f"{cache_bytes} bytes hold {fitting} positions of each of {sequences} sequences")
            self.context = min(self.context, fitting)
        self._lengths = [0] * sequences
        self._prompts_in_bytes = prompt_bits == 8
        # None: the base model
        self._adapters: list[Adapter | None] = [None] * sequences
        # without users, no adapter has a factor
        self._beta = 1.0
        if users is not None:
            # here, so that the first request of a user does not fail
            table.places_of_updates(users.common.shapes)
            self._beta = users.common.beta
        self.most = max(TOKENS_IN_A_PASS, sequences)
        """Most tokens of a pass."""
        self.vocabulary = table.embedding.rows.shape[0]
        """Number of tokens that the model knows."""
        self.weight_bytes = table.weight_bytes
        """Bytes of weights read for each token that is generated."""
        self._table = table
        self._loop = table.loop(self.context, sequences, self.most, cache_bits=CACHES[cache])

    @classmethod
    def from_model(
        cls,
        model: Part,
        context: int = 2048,
        *,
        verify: bool = True,
        tables: Mapping[str, StoredTable] | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Create a decoder for a transformers causal language model on the CPU, with dense or sparse layers.

        ``context``: positions of a sequence, at most as many as the model has. ``tables``: embeddings that its folder
        stores quantised. With ``verify``, compares the logits of some tokens with the model's. Raises DecoderError.
        """
        additions = added_modules(model)
        if additions:
            names = ", ".join(module.addition for module in additions.values())
            raise DecoderError(f"{type(model).__name__} has {names}, which the native decoder does not compute")
        # some models have no limit, and a config may say so with None
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int):
            context = min(context, limit)
        decoder = cls(table_of(model, context, tables), **options)
        if verify:
            _require_same(decoder, model)
        return decoder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, context: int = 2048, *, verify: bool = True, **options: Unpack[Options]
    ) -> Self:
        """Create a decoder for a model folder, dense or packed, as :meth:`from_model` does.

        Raises UserStoreError if the states of ``users`` belong to another model.
        """
        opened = open_model_folder(folder)
        opened.require_causal()
        tables = None
        if opened.is_plain:
            model = opened.load("auto", "fp32")
        else:
            model = opened.load("sparse", "fp32")
            # transformers' model has them dense; the loop reads them as stored
            tables = stored_tables(opened.path, model)
        users = options.get("users")
        if users is not None:
            require_fitting(model, opened.path, users)
        return cls.from_model(model, context, verify=verify, tables=tables, **options)

    def with_fp32_cache(self, context: int, first: int = 0) -> Self:
        """Return a decoder that shares the weights, with one empty sequence of ``context`` positions in fp32.

        ``first``: position in the model of the sequence's first token.
        """
        # a shallow copy shares the weights; what belongs to the sequences is replaced
        other = copy.copy(self)
        other.context = context
        other.sequences = 1
        other._lengths = [0]
        other._adapters = [None]
        other._loop = self._table.loop(context, 1, self.most, cache_bits=32, first=first)
        return other

    @property
    def length(self) -> int:
        """Tokens of the first sequence that are in its cache."""
        return self._lengths[0]

    def reset(self, length: int = 0, sequence: int = 0) -> None:
        """Truncate a sequence's cache to its first ``length`` tokens."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"sequence {sequence} has {self._lengths[sequence]} tokens, and cannot have {length}")
        self._lengths[sequence] = length

    def assign(self, state: State | None, sequence: int = 0) -> None:
        """Let a sequence use a user's state (None: the base model). Empties its cache, unless it uses that already.

        Do not change the tensors of a state afterwards. Raises DecoderError if it does not fit the model.
        """
        if state is self._state(sequence):
            return
        self._adapters[sequence] = self._adapter(state)
        # the cached keys and values are those of another model
        self._lengths[sequence] = 0

    def _adapter(self, state: State | None) -> Adapter | None:
        """Return the adapter of a state, which the sequences of one user share."""
        if state is None:
            return None
        for adapter in self._adapters:
            if adapter is not None and adapter.state is state:
                return adapter
        return self._table.adapter(state, self._beta)

    def _state(self, sequence: int) -> object:
        adapter = self._adapters[sequence]
        return None if adapter is None else adapter.state

    def forward(self, ids: Sequence[int] | Tensor, *, sequence: int = 0, all_logits: bool = False) -> Tensor:
        """Append ``ids`` to a sequence. Return fp32 logits, (vocabulary,) of the last token or (tokens, vocabulary).

        Raises ValueError without tokens, and for more than the context has room for.
        """
        tokens = _numbers(ids)
        if not tokens:
            raise ValueError("forward takes at least one token")
        self._require_room(self._lengths[sequence] + len(tokens))
        logits: list[Tensor] = []
        for first in range(0, len(tokens), self.most):
            part = tokens[first : first + self.most]
            # the output layer is a large part of a pass over few tokens, and only the last token needs it
            wanted: Sequence[int] = []
            if all_logits:
                wanted = range(len(part))
            elif first + len(part) == len(tokens):
                wanted = [len(part) - 1]
            in_bytes = self._prompts_in_bytes and len(part) >= PROMPT_TOKENS
            logits.append(self._pass(part, sequences=[sequence] * len(part), wanted=wanted, in_bytes=in_bytes))
        if all_logits:
            return torch.cat(logits)
        return logits[-1][0]

    def extend(self, added: Mapping[int, Sequence[int]], wanted: Collection[int]) -> Tensor:
        """Append tokens to several sequences, by their numbers, in one pass of at most :attr:`most` tokens.

        Returns fp32 logits of the last token of each of the ``wanted`` sequences, (wanted, vocabulary), in their order.
        """
        ids: list[int] = []
        sequences: list[int] = []
        last: dict[int, int] = {}
        for sequence, tokens in added.items():
            ids += tokens
            sequences += [sequence] * len(tokens)
            last[sequence] = len(ids) - 1
        return self._pass(ids, sequences=sequences, wanted=[last[sequence] for sequence in wanted])

    def copy(self, source: int, to: int, length: int) -> None:
        """Replace the tokens of sequence ``to`` with the first ``length`` ones of ``source``, of the same user."""
        # keys and values of another user's model
        if self._state(source) is not self._state(to):
            raise ValueError(f"sequences {source} and {to} have different users")
        if not 0 <= length <= self._lengths[source]:
            raise ValueError(f"sequence {source} has {self._lengths[source]} tokens, not {length}")
        self._loop.copy(source, to, length)
        self._lengths[to] = length

    def step(self, ids: Sequence[int] | Tensor, sequences: Sequence[int] | None = None) -> Tensor:
        """Append one token to each of ``sequences`` (default: the first ones). Return logits (tokens, vocabulary)."""
        tokens = _numbers(ids)
        if sequences is None:
            sequences = range(len(tokens))
        numbers = list(sequences)
        # two tokens of one sequence would need an order
        if len(numbers) != len(tokens) or len(set(numbers)) != len(numbers):
            raise ValueError(f"one token for each of different sequences, got {len(tokens)} for {numbers}")
        return self._pass(tokens, sequences=numbers, wanted=range(len(tokens)))

    def _pass(self, ids: list[int], sequences: list[int], wanted: Sequence[int], in_bytes: bool = False) -> Tensor:
        """Append each of ``ids`` to its sequence; return the logits of those at the indices ``wanted``."""
        # the layers below only assert this, and the C++ code reads these rows of the embedding unchecked
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ValueError(f"tokens are 0 to {self.vocabulary - 1}, got {min(ids)} to {max(ids)}")
        positions: list[int] = []
        lengths = list(self._lengths)
        for sequence in sequences:
            positions.append(lengths[sequence])
            lengths[sequence] += 1
        self._require_room(max(lengths))
        adapters = [self._adapters[sequence] for sequence in sequences]
        logits = self._loop.run(
            ids,
            sequences=sequences,
            positions=positions,
            adapters=adapters,
            wanted=wanted,
            threads=self.threads,
            in_bytes=in_bytes,
        )
        # only after a pass that succeeded, so that an error leaves the sequences as they were
        self._lengths = lengths
        return logits

    def _require_room(self, length: int) -> None:
        if length > self.context:
            raise ValueError(f"{length} tokens do not fit into a context of {self.context}")

    def stream(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        end: Collection[int] = (),
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that follow ``prompt``, including the token of ``end`` that stops them.

        Clears the first sequence. ``sampling``: the most likely token by default. Stops at the end of the context.
        """
        sampling = sampling or Sampling()
        generator = _generator(seed)
        self.reset()
        logits = self.forward(prompt)
        for number in range(max_new_tokens):
            token = int(sampling.choose(logits[None], generator))
            yield token
            # before the next pass, which would be for nothing
            if token in end or number + 1 == max_new_tokens or self.length == self.context:
                return
            logits = self.forward([token])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        end: Collection[int] = (),
        seed: int | None = None,
    ) -> list[list[int]]:
        """Return the tokens that follow each of up to ``sequences`` prompts, which are decoded concurrently."""
        if len(prompts) > self.sequences:
            raise ValueError(f"{len(prompts)} prompts for {self.sequences} sequences: open the decoder with more")
        sampling = sampling or Sampling()
        generator = _generator(seed)
        logits: list[Tensor] = []
        # one after the other: the tokens of a prompt fill a pass
        for number, prompt in enumerate(prompts):
            self.reset(sequence=number)
            logits.append(self.forward(prompt, sequence=number))
        # numbers of the prompts whose answers continue, in the order of their logits
        active = list(range(len(prompts)))
        written: list[list[int]] = [[] for _ in prompts]
        while active and max_new_tokens > 0:
            tokens = sampling.choose(torch.stack(logits), generator).tolist()
            chosen = dict(zip(active, tokens, strict=True))
            for number, token in chosen.items():
                written[number].append(token)
                is_last = len(written[number]) == max_new_tokens or self._lengths[number] == self.context
                if token in end or is_last:
                    active.remove(number)
            if active:
                next_tokens = [chosen[number] for number in active]
                logits = list(self.step(next_tokens, active))
        return written


def _generator(seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    return torch.Generator().manual_seed(seed)


def _numbers(ids: Sequence[int] | Tensor) -> list[int]:
    """Return tokens as Python's integers, which the loop takes; numpy's are converted too."""
    if isinstance(ids, Tensor):
        return ids.flatten().tolist()
    return [int(token) for token in ids]


def _require_same(decoder: Decoder, model: Part) -> None:
    """Compare logits of some tokens, partly processed one by one, with the model's own. Raises DecoderError.

    They are at the first and the last positions of the context, because a model may behave differently at the end.
    """
    count = min(PROBE_TOKENS, decoder.context)
    # a set: a short context starts and ends with the same positions
    firsts = sorted({0, decoder.context - count})
    ids = torch.randint(0, decoder.vocabulary, (count,), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor(firsts)[:, None] + torch.arange(count)
    with torch.no_grad():
        logits = model(input_ids=ids.expand(len(firsts), -1), position_ids=positions, use_cache=False).logits.double()
    for first, expected in zip(firsts, logits, strict=True):
        probe = decoder.with_fp32_cache(count, first)
        # most tokens as a prompt and the last ones singly, which the loop computes with different code
        singles = min(_SINGLE_PROBE_TOKENS, count)
        parts: list[Tensor] = []
        if count > singles:
            parts.append(probe.forward(ids[:-singles], all_logits=True))
        for index in range(count - singles, count):
            parts.append(probe.forward(ids[index : index + 1], all_logits=True))
        # in double precision, so that the norms do not round the small differences away
        computed = torch.cat(parts).double()
        differences = (computed - expected).norm(dim=-1) / expected.norm(dim=-1)
        # the mean over all tokens would hide an error of the few single ones; max() would ignore NaN
        difference = torch.stack([differences.mean(), differences[-singles:].mean()]).amax().item()
        # "not <=" also rejects NaN
        if not difference <= MOST_DIFFERENCE:
            raise DecoderError(
                f"model_type = {model.config.model_type!r}: the native decoder's logits differ from those of "
                f"{type(model).__name__} at positions {first} to {first + count - 1} (by {difference:.2g} of their "
                f"norm, at most {MOST_DIFFERENCE} is right): a part of this model is not in its table. {USE_OTHER}"
            )
