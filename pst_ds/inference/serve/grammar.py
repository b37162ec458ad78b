"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class GrammarError(ValueError):
    """The schema is invalid or not supported, or the tokenizer is not."""


class Grammar:
    """The JSON values that an answer may still become."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def allowed(self, logits: Tensor) -> Tensor:
        """Return ``logits`` (vocabulary,) with -inf for tokens that must not come next."""
        marks = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        allowed[: marks.numel()] = marks[: logits.shape[0]] != 0  # a model may have more rows than tokens
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise GrammarError(self._matcher.get_error())

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow."""
        return self._matcher.is_stopped()


class Grammars:
    """Creates grammars for a tokenizer, whose tokens it reads at the first one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]):
        self._tokenizer, self._ends = tokenizer, list(ends)

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The tokens as bytes. Raises GrammarError for a tokenizer without a fast version."""
        try:
            return from_tokenizer(self._tokenizer, eos_token=self._ends or None)  # type: ignore[arg-type]
        except ValueError as error:
            raise GrammarError(str(error)) from None

    def of_schema(self, schema: dict[str, object]) -> Grammar:
        """Return the grammar of values that match a JSON schema. Raises GrammarError."""
        try:
            # no free choice of spaces, which a small model repeats for ever
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})
        except ValueError as error:
            raise GrammarError(str(error)) from None
        matcher = LLMatcher(self.tokens, text, log_level=0)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().partition("\n")[0][:500])
        return Grammar(matcher)
