"""Describe a tokenizer for GGUF: byte-level BPE ("gpt2"), or BPE with byte fallback ("llama")."""

import json
import re
from typing import TYPE_CHECKING, Any

from pst_ds.writing.encoding import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_Table = dict[str, Any]
"""Part of tokenizer.json, or arguments of ``GGUFWriter``."""
# token types in llama.cpp's numbering
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def gguf_tokenizer(tokenizer: "Tokenizer", vocab_size: int) -> _Table:
    """Describe a fast tokenizer of transformers for a model of ``vocab_size`` rows.

    Returns the argument of each method ``add_<key>`` of ``GGUFWriter``, by key. Raises ExportError.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table: _Table = {}
    if backend is not None:
        # the text of tokenizer.json, since the package tokenizers has no other way to read its settings
        table = json.loads(backend.to_str())
    model = table.get("model") or {}
    if model.get("type") != "BPE":
        raise ExportError(
            f"GGUF export supports BPE tokenizers, and this is {model.get('type') or type(tokenizer).__name__}. Export "
            'with format = "dense", and convert the folder with the script of llama.cpp'
        )
    merges: list[str] = []
    for merge in model["merges"]:
        # a pair in new versions of tokenizers, "left right" in old ones
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    falls_back = bool(model.get("byte_fallback"))
    # llama.cpp does not split text before it merges in "llama" vocabularies
    pre = "default" if falls_back else _pre_tokenizer(table)
    tokens, kinds = _tokens(table, model, vocab_size, falls_back=falls_back)
    special = _special_tokens(tokenizer)
    if "unk" in special and falls_back:
        kinds[special["unk"]] = UNKNOWN
    # whether a text starts with the bos token is written in several places of tokenizer files, so it is tried out
    encoded = tokenizer("a")["input_ids"]
    described: _Table = {
        "tokenizer_model": "llama" if falls_back else "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": kinds,
    }
    # llama.cpp merges by scores in "llama" vocabularies, and by a list of merges in "gpt2" ones
    if falls_back:
        described["token_scores"] = _scores(tokens, merges)
    else:
        described["token_merges"] = merges
    for key, number in special.items():
        described[f"{key}_token_id"] = number
    described["add_bos_token"] = bool(encoded) and encoded[0] == special.get("bos")
    described["add_space_prefix"] = _adds_space(table)
    described["chat_template"] = _chat_templates(tokenizer)
    # GGUFWriter cannot write an empty list, whose type it does not know
    return {key: value for key, value in described.items() if value != []}


def _special_tokens(tokenizer: "Tokenizer") -> dict[str, int]:
    """Return the ids of the special tokens that a tokenizer has, by the names that GGUF and transformers share."""
    special: dict[str, int] = {}
    for key in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{key}_token_id", None)
        if number is not None:
            special[key] = int(number)
    return special


def _tokens(table: _Table, model: _Table, vocab_size: int, *, falls_back: bool) -> tuple[list[str], list[int]]:
    """Return the token and the type of each id; ids without a token get a name, and are marked as unused."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    named: dict[int, tuple[str, int]] = {}
    for token, number in model["vocab"].items():
        named[number] = (token, NORMAL)
    if falls_back:
        for byte in range(256):
            # SentencePiece's spelling, which stands for a byte that no other token has
            token = f"<0x{byte:02X}>"
            if token in model["vocab"]:
                named[model["vocab"][token]] = (token, BYTE)
    for added in table.get("added_tokens") or ():
        # llama.cpp does not print control tokens, nor read them from a user's text
        kind = CONTROL if added["special"] else USER_DEFINED
        named[added["id"]] = (added["content"], kind)
    beyond = sorted(number for number in named if number >= vocab_size)
    if beyond:
        raise ExportError(f"the tokenizer has token {beyond[0]}, but the model embeds only {vocab_size} tokens")
    for number, (token, kind) in named.items():
        tokens[number] = token
        kinds[number] = kind
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return the negated index of the merge that makes each token; llama.cpp merges the highest score first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    return [float(-rank.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(table: _Table) -> str:
    """Return llama.cpp's name for the pre-tokeniser. Raises ExportError for one that it does not have."""
    splitter = table.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers")  # of a sequence
    if parts is None:
        parts = [splitter] if splitter else []
    kinds = [part.get("type") for part in parts]
    name = _name_of_splits(kinds, parts)
    if not name:
        raise ExportError(
            f"the tokenizer splits text with {', '.join(map(str, kinds)) or 'nothing'}, a pre-tokeniser that GGUF "
            "export does not know. Supported are GPT-2, SmolLM, Llama 3 and Qwen2, and BPE with byte fallback"
        )
    # llama.cpp has no such setting for byte-level tokenizers, and would read other tokens than the model was trained on
    if parts[-1].get("add_prefix_space"):
        raise ExportError(
            "the tokenizer has add_prefix_space = true, which llama.cpp does not do with byte-level BPE. Choose "
            "another format"
        )
    return name


def _name_of_splits(kinds: list[str | None], parts: list[_Table]) -> str:
    """Return llama.cpp's name for the ``parts`` of a pre-tokeniser, which are of these ``kinds``; "" for others."""
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        # the regular expression tells the families apart, since they differ in nothing else
        pattern = (parts[0].get("pattern") or {}).get("Regex", "")
        return _KNOWN_SPLITS.get(pattern, "")
    return ""


def _adds_space(table: _Table) -> bool:
    """Return whether the tokenizer prepends a space."""
    # as text, because the rule may be at any depth of nested sequences
    rules = json.dumps([table.get("normalizer"), table.get("pre_tokenizer")])
    return '"Prepend"' in rules or '"prepend_scheme": "first"' in rules or '"prepend_scheme": "always"' in rules


def _chat_templates(tokenizer: "Tokenizer") -> list[dict[str, str]]:
    """Return names and texts of the chat templates.

    ``{% generation %}``, a tag that marks answers in training, is an extension of transformers. Plain Jinja rejects it,
    and older llama-cpp-python does not load such a file (its issue 2225). ``{% if true %}`` renders the same.
    """
    named = tokenizer.chat_template or {}
    if isinstance(named, str):
        named = {"default": named}
    templates: list[dict[str, str]] = []
    for name, text in named.items():
        plain = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", text)
        plain = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", plain)
        templates.append({"name": name, "template": plain})
    return templates
