"""Conversations in token stores: rows as lines of JSON, and their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.conversations import TOOLS, Conversation, messages_of, messages_of_pair, render, tools_of
from pst_ds.data.tokens.tokenize import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PAIR = ("prompt", "completion")
"""Columns of a conversation if there is no column with messages."""


def template_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the tokenizer's chat templates."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def columns_of_chat(names: Iterable[str], column: str) -> list[str]:
    """Return the columns among ``names`` that hold conversations; an empty list if there are none."""
    names = set(names)
    found = [column] if column in names else [name for name in PAIR if set(PAIR) <= names]
    return [*found, *({TOOLS} & names)] if found else []


def row_of_chat(row: Mapping[str, Any], column: str, place: Callable[[], str]) -> str:
    """Return the conversation of a row as a line of JSON. Raises ConfigError, naming the row by ``place``."""
    found = columns_of_chat(row, column)
    if not found:
        raise ConfigError(
            f"{place()} has neither a column {column!r} with messages nor {' and '.join(PAIR)}. "
            f"Columns: {', '.join(map(str, row))}"
        )
    try:
        messages = (
            messages_of(row[column], "it") if column in row else messages_of_pair(row[PAIR[0]], row[PAIR[1]], "it")
        )
        about = {"messages": messages, "tools": tools_of(row.get(TOOLS), "it")}
    except ConfigError as error:
        raise ConfigError(f"{place()}: {error}") from None
    return json.dumps(about, ensure_ascii=False)


def tokenize_chats(rows: Sequence[str], tokenizer: Tokenizer, where: str) -> Documents:
    """Return the tokens of rows from :func:`row_of_chat`, with a mask of the assistant's tokens. Each conversation ends
    with the end-of-text token. Raises ConfigError, naming ``where``."""
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    learned: list[bool] = []
    lengths: list[int] = []
    closed = False
    for row in rows:
        about = json.loads(row)
        rendered = render(Conversation(about["messages"], about["tools"]), tokenizer, f"{where}: a conversation")
        closed = rendered.ids[-1] != end
        tokens += [*rendered.ids, *([end] * closed)]
        learned += [*rendered.is_answer, *([False] * closed)]
        lengths.append(len(rendered.ids) + closed)
    return Documents(
        np.array(tokens, np.int64), np.array(lengths, np.int64), learned=np.array(learned, bool), closed_by_us=closed
    )
