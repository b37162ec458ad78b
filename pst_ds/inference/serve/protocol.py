"""Valid requests for chat, completions, labels and embeddings."""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pst_ds.inference.decoder.sampling import Sampling

JsonTable = dict[str, object]
_NAME_CHARACTERS = 64
"""Characters of an unknown field's name that a message quotes."""
_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "max_tokens",
}
"""Fields of the protocol that never change an answer, and max_tokens next to max_completion_tokens."""
MOST_FIELDS = 64
"""Fields of an object of the protocol."""
MOST_MESSAGES = 2048
"""Messages of a chat, and text parts of a message."""
MOST_TOOLS = 128
"""Tools, and tool calls of a message."""
MOST_PROMPTS = 128
"""Prompts of a completion request; the server's limit on answers is lower."""
MOST_PROMPT_TOKENS = 1 << 20
"""Tokens of a prompt that is given as tokens; the model's limit is lower."""
MOST_BIASES = 1024
"""Tokens of logit_bias."""
MOST_VALUES = 10_000
"""Values of a JSON schema or of a tool call's arguments."""
MOST_DEPTH = 100
"""Levels of a JSON schema or of a tool call's arguments."""
MOST_BODY_VALUES = 1 << 15
"""Lists, objects and names in a body. Python takes a second for a body of empty lists only."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A JSON string, which may lack its end. Possessive, so that it takes linear time for any body."""
_WHOLE = ("stop", "prompt", "input", "tool_choice", "logit_bias")
"""Fields with several types, of which a message does not name parts."""
_OTHER_TYPE = ("string_type", "list_type", "int_type", "dict_type", "model_type", "literal_error")
"""Errors of pydantic that say which type a value does not have."""


class ProtocolError(Exception):
    """A rejected request: an HTTP status, and the protocol's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> JsonTable:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Object(BaseModel):
    """A JSON object whose null fields count as absent."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, table: object) -> object:
        if not isinstance(table, dict):
            return table
        if len(table) > MOST_FIELDS:
            raise ValueError(f"an object may have at most {MOST_FIELDS} fields")
        return {name: value for name, value in table.items() if value is not None}

    without_effect: ClassVar[Collection[str]] = ()
    """Other fields that are ignored."""
    not_served: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that are not supported, with the values that are accepted besides null and empty ones."""

    def require_known(self, place: str = "") -> None:
        """Raise ProtocolError for the first field, here or in a part, that is unknown or has an unsupported value."""
        for name, value in (self.model_extra or {}).items():
            shown = place + name[:_NAME_CHARACTERS]
            if name not in self.without_effect and name not in self.not_served:
                # the start of a name only: the time of a comparison grows with the product of the lengths
                near = difflib.get_close_matches(name[:_NAME_CHARACTERS], type(self).model_fields, n=1)
                hint = "Omit it."
                if near:
                    hint = f"Did you mean {near[0]!r}?"
                raise ProtocolError(400, f"unknown field '{shown}'. {hint}", param=shown)
            if name in self.not_served and value not in (False, [], {}, *self.not_served[name]):
                raise ProtocolError(400, f"{shown} is not supported. Omit it.", param=shown)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, _Object):
                value.require_known(f"{place}{name}.")
            elif isinstance(value, list):
                for index, part in enumerate(value):
                    if isinstance(part, _Object):
                        part.require_known(f"{place}{name}[{index}].")


def _require_small(table: object) -> object:
    """Return a JSON value unless it has too many values or levels. Raises ValueError."""
    # level by level instead of recursively, which hostile depth would end with a RecursionError
    level = [table]
    values = 0
    depth = 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels")
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            values += 1
            # counts what is still to come too, so that the lists here stay below the limit
            if values + len(below) > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values")
        level = below
    return table


def _require_few_biases(biases: object) -> object:
    """Check the number before pydantic checks each of them, and keeps a kilobyte per error."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES} tokens may have a bias")
    return biases


Json = Annotated[JsonTable, Field(max_length=MOST_VALUES), BeforeValidator(_require_small)]
"""A JSON object of the client, such as a schema."""
Name = Annotated[str, Field(max_length=256)]


def _joined_parts(content: object) -> object:
    if not isinstance(content, list):
        return content
    if len(content) > MOST_MESSAGES:
        raise ValueError(f"at most {MOST_MESSAGES} text parts are supported")
    texts: list[str] = []
    for part in content:
        is_text_part = isinstance(part, dict) and part.get("type") == "text"
        if not is_text_part or not isinstance(part.get("text"), str):
            raise ValueError("a list must consist of text parts")
        texts.append(part["text"])
    return "".join(texts)


class _Called(_Object):
    name: Name
    arguments: str = "{}"
    """JSON."""


class _Call(_Object):
    id: Name = ""
    type: Literal["function"] = "function"
    function: _Called
    without_effect = ("index",)


class _Message(_Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined_parts)] = None
    """A string, or a list of text parts; may be absent next to tool calls."""
    tool_calls: Annotated[list[_Call], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    tool_call_id: Name | None = None
    name: Name | None = None
    not_served = dict.fromkeys(("refusal", "annotations", "audio", "function_call"), ())

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    @property
    def in_template(self) -> JsonTable:
        """The message as chat templates read it. Raises ProtocolError for arguments that are not JSON."""
        table: JsonTable = {"role": self.role.replace("developer", "system"), "content": self.content or ""}
        if self.tool_calls:
            table["tool_calls"] = [_call_in_template(call) for call in self.tool_calls]
        if self.role == "tool":
            table |= {"tool_call_id": self.tool_call_id or "", "name": self.name or ""}
        return table


def _call_in_template(call: _Call) -> JsonTable:
    try:
        arguments = _require_small(_parsed(call.function.arguments))
    except (ValueError, RecursionError):
        why = f"the arguments of a tool call are not JSON of at most {MOST_VALUES} values and {MOST_DEPTH} levels"
        raise ProtocolError(400, why, param="messages") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class _StreamOptions(_Object):
    include_usage: bool = False
    without_effect = ("include_obfuscation",)


class _Request(_Object):
    """Fields of requests for chat and for plain completions."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[
        int | None, Field(ge=1, lt=1 << 63, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    ] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MOST_BIASES),
        BeforeValidator(_require_few_biases),
    ] = {}
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(max_length=4, fail_fast=True),
        BeforeValidator(lambda stop: tuple(stop) if isinstance(stop, list) else (stop,)),
    ] = ()
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: Annotated[int, Field(ge=1, le=128)] = 1

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            float(self.temperature),
            top_k=max(self.top_k, 0),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias={int(token): float(bias) for token, bias in self.logit_bias.items()},
        )


class _Function(_Object):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str = ""
    parameters: Json = {"type": "object", "properties": {}}
    without_effect = ("strict",)


class _Tool(_Object):
    type: Literal["function"]
    function: _Function


class _FunctionName(_Object):
    name: Name


class _ToolChoice(_Object):
    type: Literal["function"]
    function: _FunctionName


class _Schema(_Object):
    content: Annotated[Json, Field(validation_alias="schema")]
    without_effect = ("name", "description", "strict")


class _ResponseFormat(_Object):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type 'json_schema'")
        return self


class ChatRequest(_Request):
    """A validated request for chat."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    """Validated up to the first wrong message: pydantic keeps a kilobyte per error."""
    tools: Annotated[list[_Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice = "auto"
    response_format: _ResponseFormat = _ResponseFormat(type="text")
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    without_effect = _WITHOUT_EFFECT
    not_served = {
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        **dict.fromkeys(("functions", "audio", "prediction", "store", "reasoning_effort", "verbosity"), ()),
        "web_search_options": (),
    }

    @property
    def chat(self) -> list[JsonTable]:
        """Messages as chat templates read them."""
        return [message.in_template for message in self.messages]

    @property
    def callable_tools(self) -> list[_Tool]:
        """Tools that the answer may call. Raises ProtocolError for a choice of none of them."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, str):
            if self.tool_choice == "required" and not self.tools:
                raise ProtocolError(400, "tool_choice requires a call, and there are no tools", param="tool_choice")
            return self.tools
        chosen = [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        if not chosen:
            raise ProtocolError(400, "tool_choice names none of the tools", param="tool_choice")
        return chosen

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def schema_of_answer(self) -> JsonTable | None:
        """JSON schema that the answer must match; None for any text. Raises ProtocolError."""
        if self.must_call:
            return {"anyOf": [_schema_of_call(tool.function) for tool in self.callable_tools]}
        if self.response_format.type == "text":
            return None
        if self.callable_tools:
            why = "response_format with tools is not supported. Omit one, or set tool_choice"
            raise ProtocolError(400, why, param="response_format")
        schema = self.response_format.json_schema
        if schema is None:  # the type "json_object"
            return {"type": "object"}
        return schema.content

    @property
    def likeliest(self) -> int | None:
        """Number of likely tokens whose log-probabilities are returned per token; None for none at all."""
        return self.top_logprobs if self.logprobs else None


def _schema_of_call(function: _Function) -> JsonTable:
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": function.parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


Kind = TypeVar("Kind", bound=_Object)
Tokens = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_PROMPT_TOKENS, fail_fast=True)
]


class CompletionRequest(_Request):
    """A validated request for the continuation of texts, or of lists of tokens."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=1 << 63)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    without_effect = ("user",)
    not_served = {"echo": (), "suffix": ("",), "best_of": (1,)}

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each a text, or tokens."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class PredictionRequest(_Object):
    """A validated request for the labels or the embeddings of texts, or pairs of texts."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    input: Annotated[
        list[str | Annotated[list[str], Field(min_length=2, max_length=2)]],
        Field(min_length=1, max_length=2048, fail_fast=True),
        BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
    ]
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1)] = None
    """Tokens to which a text is truncated, -1 for what the model allows; None rejects longer ones."""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int | None, Field(ge=1)] = None
    without_effect = ("user",)

    @property
    def texts(self) -> list[str | tuple[str, str]]:
        texts: list[str | tuple[str, str]] = []
        for text in self.input:
            if isinstance(text, str):
                texts.append(text)
            else:
                texts.append((text[0], text[1]))
        return texts


def read_json(body: bytes) -> JsonTable:
    """Parse the body of a request. Raises ProtocolError unless it is a JSON object."""
    # counted in the bytes, because parsing them is what takes long
    without_strings = _STRING.sub(b"", body)
    if sum(without_strings.count(mark) for mark in (b"[", b"{", b":")) > MOST_BODY_VALUES:
        raise ProtocolError(400, f"the JSON has more than {MOST_BODY_VALUES} lists, objects and names. Send less")
    try:
        # Python's json would detect other encodings, and accept bytes of unpaired surrogates
        table = _parsed(body.decode("utf-8-sig"))
    except UnicodeEncodeError:
        raise ProtocolError(400, "the JSON has a string with an unpaired surrogate. Remove it") from None
    except RecursionError:
        raise ProtocolError(400, "the JSON has too many levels of lists and objects. Send fewer") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ProtocolError(400, "the body is not JSON in UTF-8") from None
    except ValueError:
        why = "the JSON has NaN, an infinity, or an integer with thousands of digits. Send other numbers"
        raise ProtocolError(400, why) from None
    if not isinstance(table, dict):
        raise ProtocolError(400, "the body must be a JSON object")
    return table


def _parsed(text: str) -> object:
    """Parse JSON, without NaN and infinity. Raises ValueError, UnicodeEncodeError for unpaired surrogates, and
    RecursionError."""
    value = json.loads(text, parse_constant=_refuse_constant)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # an unpaired surrogate cannot be encoded
    return value


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def chat_request(table: JsonTable) -> ChatRequest:
    """Validate a request for chat. Raises ProtocolError for an invalid request, and for an unsupported field."""
    asked = validated(ChatRequest, table)
    if asked.top_logprobs and not asked.logprobs:
        raise ProtocolError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    return asked


def validated(kind: type[Kind], table: JsonTable) -> Kind:
    """Return a request of ``kind``. Raises ProtocolError for its first error, and for unknown fields."""
    try:
        asked = kind.model_validate(table)
    except ValidationError as error:
        first = _most_telling(error.errors(include_url=False))
        place = _place(first["loc"])
        what = first["msg"]
        if first["type"] == "model_type":
            what = "Input should be an object"  # pydantic's message names our class
        raise ProtocolError(400, f"{place or 'the request'}: {what}", param=place or None) from None
    asked.require_known()
    return asked


def _place(loc: Sequence[int | str]) -> str:
    """Return the place of an error as clients write it: "messages[2].content"; "" for the request itself."""
    if loc and loc[0] in _WHOLE:
        loc = loc[:1]
    place = ""
    for part in loc:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    return place.removeprefix(".")


def _most_telling(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the first error; for a field with several types, the first about the type that the value has."""
    field = errors[0]["loc"][:1]
    if not field or field[0] not in _WHOLE:
        return errors[0]
    of_field = [error for error in errors if error["loc"][:1] == field]
    return max(of_field, key=lambda error: (error["type"] not in _OTHER_TYPE, len(error["loc"])))
