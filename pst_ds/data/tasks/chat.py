"""Train on the assistant's messages of conversations, and score the model on them."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.conversations import TOOLS, Rendered, conversation_of, prompt_tokens, render, require_template
from pst_ds.data.dataset import place_in_split, read_rows, values_of
from pst_ds.data.tasks.answers import AnswerTask
from pst_ds.data.tasks.task import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Conversations:
    """Tokenised conversations, truncated to ``max_length`` tokens; those without an answer left are omitted."""

    tokens: np.ndarray
    """Tokens of all conversations: (tokens,) int32."""
    is_answer: np.ndarray
    """Mask of the assistant's tokens: (tokens,) bool."""
    ends: np.ndarray
    """Index after the last token of each conversation: (conversations,) int64."""
    prompt_ids: list[list[int]]
    """Tokens before the last answer of each conversation."""
    references: list[list[str]]
    """Last answer of each conversation."""
    answer_ends: list[int]
    """Special tokens that end answers."""
    max_length: int
    omitted: int = 0
    """Number of conversations whose first ``max_length`` tokens have no answer."""

    def __len__(self) -> int:
        return len(self.ends)

    def _place(self, example: int) -> slice:
        """Return the place of a conversation's tokens among those of all."""
        start = 0
        if example:
            start = int(self.ends[example - 1])
        return slice(start, int(self.ends[example]))

    @property
    def lengths(self) -> list[int]:
        return np.diff(self.ends, prepend=0).tolist()

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(f"{self.max_length} ".encode())
        for values in (self.tokens, self.is_answer, self.ends):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def first(self, count: int) -> Conversations:
        ends = self.ends[:count]
        num_tokens = 0
        if len(ends):
            num_tokens = int(ends[-1])
        return replace(
            self,
            tokens=self.tokens[:num_tokens],
            is_answer=self.is_answer[:num_tokens],
            ends=ends,
            prompt_ids=self.prompt_ids[:count],
            references=self.references[:count],
        )

    def row(self, example: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation, and its labels: -100 except for the assistant's tokens."""
        tokens = self.tokens[self._place(example)]
        is_answer = self.is_answer[self._place(example)]
        return tokens.tolist(), np.where(is_answer, tokens, IGNORED).tolist()

    def prompts(self, most: int) -> list[list[int]]:
        """Return the last ``most`` tokens before the last answer of each conversation."""
        # the last: they have the question, and the generation prompt
        return [ids[-most:] for ids in self.prompt_ids]


@dataclass(frozen=True, slots=True)
class _Example:
    """A conversation of a file."""

    rendered: Rendered
    has_answer: bool
    """Whether its first ``data.max_length`` tokens have an answer."""
    prompt_ids: list[int]
    """Tokens before the last answer; empty for training and without an answer."""
    reference: str
    """Last answer; empty for training and without an answer."""


def _example(
    row: Mapping[str, object], data: DataConfig, tokenizer: Tokenizer, *, for_training: bool, place: str
) -> _Example:
    """Return the tokenised conversation of a row. Raises ConfigError, naming ``place``."""
    conversation = conversation_of(row, data.text_columns, place)
    rendered = render(conversation, tokenizer, place)
    # the first token is never predicted
    has_answer = any(rendered.is_answer[1 : data.max_length])
    if for_training or not has_answer:
        return _Example(rendered, has_answer, [], "")
    before, answer = conversation.split_at_last_answer()
    # a prompt needs a token; templates that read messages[0] cannot render an empty conversation
    prompt_ids = rendered.ids[:1]
    if before.messages:
        prompt_ids = prompt_tokens(before, tokenizer, place)
    return _Example(rendered, has_answer, prompt_ids, answer)


def _examples_of_split(data: DataConfig, split: str, tokenizer: Tokenizer) -> Iterator[_Example]:
    """Yield the conversations of a split. Raises ConfigError, which names the row."""
    where = getattr(data, split)
    columns = data.text_columns
    rows = read_rows(data, split, dict.fromkeys(columns, "text_columns"), nested=True)
    columns_to_read = [*columns]
    if TOOLS in rows.column_names:
        columns_to_read.append(TOOLS)
    values_of_columns = [values_of(rows, column) for column in columns_to_read]
    for number, values in enumerate(zip(*values_of_columns, strict=True)):
        row = dict(zip(columns_to_read, values, strict=True))
        read = partial(_example, row, data, tokenizer, for_training=split == "train")
        try:
            example = read(place=where)
        except ConfigError:
            # once more with the place, which takes a pass over the file to find
            example = read(place=f"{where}: {place_in_split(data, split, rows, number)}")
        yield example


class Chat(AnswerTask[Conversations]):
    """Train on all answers of a conversation, and generate the last one."""

    ends_with = "'chat', which ends answers with it"
    unit = "conversations"

    def check_model(self, data: DataConfig, config: PreTrainedConfig, tokenizer: Tokenizer | None) -> None:
        super().check_model(data, config, tokenizer)
        if tokenizer is not None:
            require_template(tokenizer, "chat")

    def load(self, data: DataConfig, split: str, tokenizer: Tokenizer, labels: Sequence[str]) -> Conversations:
        """Return the conversations of a split. Raises ConfigError also for a template that hides the answers."""
        require_template(tokenizer, "chat")
        where = getattr(data, split)
        is_training = split == "train"
        special = set(tokenizer.all_special_ids)
        # compact arrays: lists of Python's numbers would take eight times the memory
        tokens = array("i")
        is_answer = bytearray()
        ends = array("q")
        prompts: list[list[int]] = []
        references: list[list[str]] = []
        answer_ends: set[int] = set()
        omitted = 0
        for example in _examples_of_split(data, split, tokenizer):
            rendered = example.rendered
            answer_ends |= special.intersection(itertools.compress(rendered.ids, rendered.is_answer))
            if not example.has_answer:
                omitted += 1
                continue
            # cut at the end: an answer without its question would be learned otherwise
            tokens.extend(rendered.ids[: data.max_length])
            is_answer.extend(rendered.is_answer[: data.max_length])
            ends.append(len(tokens))
            if not is_training:
                prompts.append(example.prompt_ids)
                references.append([example.reference])
        if not ends:
            raise ConfigError(
                f"{where}: no conversation has an answer within data.max_length = {data.max_length} tokens. Raise it"
            )
        return Conversations(
            tokens=np.frombuffer(tokens, dtype=np.int32),
            is_answer=np.frombuffer(is_answer, dtype=bool),
            ends=np.frombuffer(ends, dtype=np.int64),
            prompt_ids=prompts,
            references=references,
            answer_ends=sorted(answer_ends),
            max_length=data.max_length,
            omitted=omitted,
        )

    def remark(self, data: DataConfig, examples: Conversations) -> str:
        if not examples.omitted:
            return ""
        return (
            f"conversations without an answer in their first {examples.max_length} tokens are left out: "
            f"{examples.omitted}"
        )

    def ends_of(self, examples: Conversations) -> Sequence[int]:
        return examples.answer_ends


TASK = Chat
