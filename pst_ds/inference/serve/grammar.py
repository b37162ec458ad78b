"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Self
from urllib.parse import unquote

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pst_ds.errors import first_line_of

MOST_SCHEMA_CHARACTERS = 1 << 17
"""Characters of a JSON schema. Compiling one of this size takes up to 0.2 seconds, without the interpreter lock."""
_MESSAGE_CHARACTERS = 500


class GrammarError(ValueError):
    """The schema is invalid, not supported or cannot be followed, or the tokenizer is not supported.

    The message may quote the schema: it is for the client, not for the log.
    """


class Grammar:
    """The JSON values that an answer may still become."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def allowed(self, logits: Tensor) -> Tensor:
        """Return ``logits`` (vocabulary,) with -inf for tokens that must not come next. Raises GrammarError."""
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._require_valid()  # an error marks the end token as allowed
        allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        allowed[: marks.numel()] = marks[: logits.shape[0]] != 0  # a model may have more rows than tokens
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> None:
        """Append a token to the answer. Raises GrammarError."""
        self._matcher.consume_token(token)
        self._require_valid()

    def require_start(self) -> None:
        """Raise GrammarError if no token may come first."""
        probe = self.copy()
        probe._matcher.compute_logit_bias()
        probe._require_valid()

    def _require_valid(self) -> None:
        """Raise GrammarError if the parser has failed, or has stopped before the value is complete."""
        if self._matcher.is_error():
            raise GrammarError(_first_line(self._matcher.get_error()))
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise GrammarError(f"no token may come next ({self._matcher.stop_reason()})")

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow."""
        return self._matcher.is_stopped()


class Grammars:
    """Creates grammars for a tokenizer, whose tokens it reads at the first one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]):
        self._tokenizer = tokenizer
        self._ends = list(ends)

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The tokens as bytes. Raises GrammarError for a tokenizer without a fast version."""
        try:
            return from_tokenizer(self._tokenizer, eos_token=self._ends or None)  # type: ignore[arg-type]
        except ValueError as error:
            raise GrammarError(str(error)) from None

    def of_schema(self, schema: dict[str, object]) -> Grammar:
        """Return the grammar of values that match a JSON schema. Raises GrammarError."""
        _require_finite(schema)
        schema_text = json.dumps(schema)
        if len(schema_text) > MOST_SCHEMA_CHARACTERS:
            raise GrammarError(f"it has {len(schema_text)} characters; at most {MOST_SCHEMA_CHARACTERS} are supported")
        try:
            # no free choice of spaces, which a small model repeats for ever
            text = LLMatcher.grammar_from_json_schema(schema_text, {"whitespace_flexible": False})
        except ValueError as error:
            raise GrammarError(_first_line(str(error))) from None
        limits = LLParserLimits(verbose_errors=False)
        grammar = Grammar(LLMatcher(self.tokens, text, log_level=0, limits=limits))
        grammar.require_start()
        return grammar


def _first_line(message: str) -> str:
    return first_line_of(message)[:_MESSAGE_CHARACTERS]


def _require_finite(schema: dict[str, object]) -> None:
    """Raise GrammarError if a ``$ref`` leads back to itself by references only: no value matches such a schema."""
    waiting: list[object] = [schema]
    finite = set[int]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
        chain = set[int]()
        while isinstance(node, dict) and id(node) not in finite and isinstance(node.get("$ref"), str):
            if id(node) in chain:
                raise GrammarError(f"$ref = {node['$ref'][:100]!r}: it refers to itself")
            chain.add(id(node))
            node = _target(schema, node["$ref"])
        finite |= chain


def _target(schema: object, pointer: str) -> object:
    """Return what a reference within the schema names (a JSON pointer); None for other references."""
    if not pointer.startswith("#"):
        return None
    node = schema
    for part in filter(None, unquote(pointer[1:]).split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.get(name)
        else:
            return None
    return node
