"""Read and tokenise conversations, with a mask of the assistant's tokens.

A conversation is a list of messages ``{"role": ..., "content": ...}`` as in transformers' chat templates, with
``tool_calls`` and other fields that the template uses. If the template marks the assistant's messages
({% generation %}), its mask is used. Otherwise the mask follows from prefixes: the rendered messages before an answer,
with the generation prompt, must be a prefix of the rendered messages including it, and the rest is the answer.
Templates that render earlier messages differently once others follow are rejected, because they have no such mask.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.tokenize import Documents
from pst_ds.json_text import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message: TypeAlias = dict[str, Any]

ASSISTANT = "assistant"
TOOLS = "tools"
"""Column with the tools of a conversation."""
PAIR = ("prompt", "completion")
"""Columns of a conversation without a column of messages."""
_ROLES_OF_OTHERS = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Roles in ShareGPT and similar formats."""
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Input of a chat template."""

    messages: list[Message]
    tools: list[JsonObject] | None = None

    def upto(self, place: int) -> Conversation:
        """Return the messages before ``place``."""
        return Conversation(self.messages[:place], self.tools)

    def split_at_last_answer(self) -> tuple[Conversation, str]:
        """Return the messages before the last answer, and its text."""
        last = max(place for place, message in enumerate(self.messages) if message["role"] == ASSISTANT)
        # an answer that only calls tools has no content
        answer = str(self.messages[last].get("content") or "")
        return self.upto(last), answer


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered and tokenised conversation."""

    ids: list[int]
    """Token ids."""
    is_answer: list[bool]
    """Mask of the assistant's tokens, including the end of a turn."""


def messages_of(value: object, where: str) -> list[Message]:
    """Return the messages of a row: a list of {"role", "content"}, or of ShareGPT's {"from", "value"}.

    Fields with the value None are omitted: in a table, all messages have the same fields. A content that is a list of
    text parts is their text. Raises ConfigError, naming ``where``, for another structure, and for a conversation
    without an answer.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ConfigError(f"{where} holds {str(value)[:80]!r}, but a conversation is a list of messages")
    messages: list[Message] = []
    for place, written in enumerate(value):
        message: Message = _without_none(_standard(written))
        if not isinstance(message.get("role"), str) or not ({"content", "tool_calls"} & message.keys()):
            raise ConfigError(
                f'{where}: message {place} has the fields {", ".join(written)}, but needs a "role" and a "content"'
            )
        if isinstance(message.get("content"), list | dict):
            message["content"] = _text_of_parts(message["content"], f"{where}: message {place}")
        messages.append(message)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ConfigError(f"{where} has no message of the role {ASSISTANT!r}, but only those are trained on")
    return messages


def _text_of_parts(content: list[object] | dict[str, object], where: str) -> str:
    """Return the text of a content that is a list of parts {"type": "text", "text": ...}, as OpenAI writes it.

    Most templates would write the list as Python prints it, and those that accept parts join them. Raises ConfigError
    for other parts.
    """
    fix = "Write the content as a text, or as a list of parts of the type 'text'"
    if not isinstance(content, list):
        raise ConfigError(f"{where} has a content that is a {type(content).__name__}. {fix}")
    text = ""
    for part in content:
        if not isinstance(part, dict):
            raise ConfigError(f"{where} has a content part that is a {type(part).__name__}. {fix}")
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(f"{where} has a content part of the type {part.get('type')!r} without a text. {fix}")
        text += part["text"]
    return text


def tools_of(value: object, where: str) -> list[JsonObject] | None:
    """Return the tools of a row, which may be a JSON string; None without any.

    Raises ConfigError for invalid JSON, and for tools that are not a list.
    """
    if isinstance(value, str):
        # a table has an empty text in rows without tools
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{where}: tools are not JSON ({error})") from None
    if not value:
        return None
    if not isinstance(value, list):
        raise ConfigError(
            f"{where}: tools are {str(value)[:80]!r}, not a list. Write a list with an object for each tool"
        )
    tools: list[JsonObject] = _without_none(value)
    return tools


def conversation_of(row: Mapping[str, object], columns: Sequence[str], where: str) -> Conversation:
    """Return the conversation of a row, from a column of messages, or from one of prompts and one of completions."""
    if len(columns) == 1:
        messages = messages_of(row[columns[0]], f"{where}, column {columns[0]!r}")
    else:
        prompt = _as_messages(row[columns[0]], "user")
        completion = _as_messages(row[columns[1]], ASSISTANT)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise ConfigError(f"{where} has a prompt or a completion that is neither a text nor a list of messages")
        messages = messages_of([*prompt, *completion], where)
    return Conversation(messages, tools_of(row.get(TOOLS), where))


def _as_messages(value: object, role: str) -> object:
    """Return a text as a list of one message of ``role``; other values, such as messages, unchanged."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value


def read_template(path: str, setting: str) -> str:
    """Read a chat template from a file. Raises ConfigError, which names ``setting``."""
    try:
        # editors of Windows start a file with a byte order mark, which every prompt would start with
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} = {path!r} cannot be read: {error}. Name a Jinja file") from None


def require_template(tokenizer: Tokenizer, task: str) -> None:
    """Raise ConfigError for a tokenizer without a chat template or without offsets."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer has no chat template, which task {task!r} requires. Name a Jinja file with "
            "data.chat_template, or a tokenizer that has one with model.tokenizer"
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and has no offsets of its tokens. Name a fast one "
            "with model.tokenizer"
        )


def render(conversation: Conversation, tokenizer: Tokenizer, where: str) -> Rendered:
    """Return the tokens of a conversation, with a mask of the assistant's tokens. Raises ConfigError, naming ``where``,
    if the template rejects the conversation, or if the mask cannot be determined."""
    conversation = _with_arguments_for_template(conversation, tokenizer, where)
    template = tokenizer.get_chat_template(None, conversation.tools)
    if _MARKS_ANSWERS.search(template):
        marked = _applied(conversation, tokenizer, where, return_assistant_tokens_mask=True)
        return Rendered(list(marked["input_ids"]), [bool(wrote) for wrote in marked["assistant_masks"]])
    text, spans = _answers_by_prefix(conversation, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    # compared with each token; the tokenizer builds the list anew at each access
    special = set(tokenizer.all_special_ids)
    is_answer = [False] * len(ids)
    places = encoded["offset_mapping"]
    for start, stop in spans:
        inside: list[int] = []
        for index, (first, end) in enumerate(places):
            # also tokens that are only partly in the answer, such as a space joined with its first word
            if end > start and first < stop:
                inside.append(index)
        for index in _up_to_its_end(inside, ids=ids, text=text, places=places, special=special):
            is_answer[index] = True
    return Rendered(ids, is_answer)


def prompt_tokens(conversation: Conversation, tokenizer: Tokenizer, where: str) -> list[int]:
    """Return the tokens of the conversation with the generation prompt."""
    conversation = _with_arguments_for_template(conversation, tokenizer, where)
    return list(_applied(conversation, tokenizer, where, add_generation_prompt=True)["input_ids"])


def _with_arguments_for_template(conversation: Conversation, tokenizer: Tokenizer, where: str) -> Conversation:
    """Return a conversation with the arguments of tool calls in the form that the template expects.

    OpenAI writes them as a JSON text. A few templates write this text unchanged. Most expect an object, which they
    encode: they would encode the text once more, or miss the arguments that they name.
    """
    texts = [arguments for _, arguments in _argument_texts(conversation.messages)]
    if not texts:
        return conversation
    messages = copy.deepcopy(conversation.messages)
    for call, arguments in _argument_texts(messages):
        call["arguments"] = json.loads(arguments)
    with_objects = Conversation(messages, conversation.tools)
    try:
        rendered = _text(conversation, tokenizer, where)
    except ConfigError:
        return with_objects
    for arguments in texts:
        encoded_twice = json.dumps(arguments, ensure_ascii=False)
        if arguments not in rendered or encoded_twice in rendered:
            return with_objects
    return conversation


def _argument_texts(messages: Sequence[Message]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the tool calls whose arguments are a JSON object written as a text, and that text."""
    for message in messages:
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            continue
        for call in calls:
            if not isinstance(call, dict):
                continue
            # {"type": "function", "function": {"name", "arguments"}}, or only the inner object
            function = call.get("function", call)
            if isinstance(function, dict) and _is_json_object(function.get("arguments")):
                yield function, function["arguments"]


def _is_json_object(value: object) -> bool:
    """Return whether a value is a text that writes a JSON object."""
    if not isinstance(value, str):
        return False
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _answers_by_prefix(
    conversation: Conversation, tokenizer: Tokenizer, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and (start, end) of each answer in it."""
    text = _text(conversation, tokenizer, where)
    spans = []
    for place, message in enumerate(conversation.messages):
        if message["role"] != ASSISTANT:
            continue
        before = ""
        # templates that read messages[0] cannot render an empty conversation
        if place:
            before = _text(conversation.upto(place), tokenizer, where, add_generation_prompt=True)
        through = _text(conversation.upto(place + 1), tokenizer, where)
        if not text.startswith(through) or not through.startswith(before):
            raise ConfigError(
                f"{where}: the chat template renders the messages before message {place} differently once others "
                "follow, so the assistant's tokens cannot be determined. Name a template that marks them "
                "with {% generation %} and {% endgeneration %} in data.chat_template"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _up_to_its_end(
    inside: Sequence[int], ids: Sequence[int], text: str, places: Sequence[tuple[int, int]], special: set[int]
) -> Sequence[int]:
    """Return the tokens of an answer without the white space after its last special token."""
    for number in reversed(range(len(inside))):
        if ids[inside[number]] not in special:
            continue
        _, end_of_special = places[inside[number]]
        _, end_of_answer = places[inside[-1]]
        if text[end_of_special:end_of_answer].strip():
            return inside  # the special token is not the end of the turn
        return inside[: number + 1]
    return inside


def _text(conversation: Conversation, tokenizer: Tokenizer, where: str, **options: bool) -> str:
    """Return a conversation as text. Raises ConfigError, naming ``where``, if the template rejects it."""
    return str(_applied(conversation, tokenizer, where, tokenize=False, **options))


def _applied(conversation: Conversation, tokenizer: Any, where: str, **options: bool) -> Any:
    """Return what the tokenizer's chat template makes of a conversation: a text, or a dictionary with its tokens.

    Raises ConfigError, naming ``where``, if the template rejects it.
    """
    try:
        return tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, return_dict=options.get("tokenize", True), **options
        )
    except Exception as error:  # templates raise various errors, such as for an unexpected order of roles
        raise ConfigError(f"{where}: the chat template rejects the conversation: {error}") from None


def _standard(message: Message) -> Message:
    """Return a message of ShareGPT as {"role", "content"}."""
    if "from" not in message or "role" in message:
        return message
    role = message["from"]
    # roles with the same name in both formats, such as "system", are not in the table
    return {"role": _ROLES_OF_OTHERS.get(role, role), "content": message.get("value")}


def _without_none(value: Any) -> Any:
    """Return a JSON value without fields that are None."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value


def template_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the tokenizer's chat templates."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def columns_of_chat(names: Iterable[str], column: str) -> list[str]:
    """Return the columns among ``names`` that hold conversations; may be empty."""
    names = set(names)
    columns = [column]
    if column not in names:
        if not names.issuperset(PAIR):
            return []
        columns = list(PAIR)
    if TOOLS in names:
        columns.append(TOOLS)
    return columns


def row_of_chat(row: Mapping[str, object], column: str, place: str) -> str:
    """Return the conversation of a row as a line of JSON. Raises ConfigError, naming the row by ``place``."""
    columns = columns_of_chat(row, column)
    if not columns:
        raise ConfigError(
            f"{place} has neither a column {column!r} with messages nor {' and '.join(PAIR)}. "
            f"Columns: {', '.join(map(str, row))}"
        )
    conversation = conversation_of(row, [name for name in columns if name != TOOLS], place)
    return json.dumps({"messages": conversation.messages, "tools": conversation.tools}, ensure_ascii=False)


def tokenize_chats(rows: Sequence[str], tokenizer: Tokenizer, where: str) -> Documents:
    """Return the tokens of rows from :func:`row_of_chat`, with a mask of the assistant's tokens. Each conversation ends
    with the end-of-text token. Raises ConfigError, naming ``where``."""
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    learned: list[bool] = []
    lengths: list[int] = []
    closed = False
    for row in rows:
        rendered = render(Conversation(**json.loads(row)), tokenizer, f"{where}: a conversation")
        tokens += rendered.ids
        learned += rendered.is_answer
        lengths.append(len(rendered.ids))
        closed = rendered.ids[-1] != end
        if closed:
            tokens.append(end)
            # it separates conversations, and is not part of an answer
            learned.append(False)
            lengths[-1] += 1
    return Documents(
        np.array(tokens, np.int64), np.array(lengths, np.int64), learned=np.array(learned, bool), closed_by_us=closed
    )
