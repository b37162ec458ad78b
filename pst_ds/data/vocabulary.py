"""Trim a tokenizer to the tokens that some texts use, so that those texts are still tokenised in the same way.

Kept are the tokens that were seen, special and added tokens, and the smallest pieces that words fall back to: single
characters, or bytes. A word that was not seen is split into more and smaller pieces. A word that was seen is tokenised
as before:

* WordPiece uses the longest piece at each position. The piece it used before is still there, and no piece is new.
* BPE applies merges in order. Those that lead to a kept token are kept, with all intermediate tokens.
* Unigram uses the most likely split of a word, which is still there, among fewer.

New ids are in the order of the old ones, so an embedding is trimmed by selecting its rows in that order.
"""

import json
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Table: TypeAlias = dict[str, Any]
"""A JSON object: tokenizer.json, or a part of it."""
_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_BYTE = re.compile(r"<0x..>", re.DOTALL)
_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")
"""Settings of a model or its generation that hold ids, apart from those whose name ends in _token_id or _token_ids."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A trimmed tokenizer, and the rows of its embedding."""

    tokenizer: "PreTrainedTokenizerBase"
    kept: list[int]
    """Old id of each new id, ascending."""

    @property
    def new_ids(self) -> dict[int, int]:
        return _new_ids(self.kept)


def trim(tokenizer: "PreTrainedTokenizerBase", seen: Iterable[int]) -> Vocabulary:
    """Return ``tokenizer`` with the tokens ``seen``, ids in any order, and those that the module docstring names.

    Raises InputError for a tokenizer that is not fast or not WordPiece, BPE, Unigram or WordLevel, and for an unknown
    id.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer and cannot be trimmed. Name a fast one")
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    kept_ids = _kept(table, set(seen))
    new_ids = _new_ids(kept_ids)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in set(tokenizer.vocab_files_names.values()) - {_TOKENIZER}:
            # older formats, which have all tokens and would be read in place of the trimmed one
            (folder / file).unlink(missing_ok=True)
        (folder / _TOKENIZER).write_text(json.dumps(_trimmed(table, new_ids), ensure_ascii=False), "utf-8")
        settings = json.loads((folder / _SETTINGS).read_text("utf-8"))
        decoder = settings.get("added_tokens_decoder")
        if decoder:
            settings["added_tokens_decoder"] = {}
            for old, token in decoder.items():
                settings["added_tokens_decoder"][str(new_ids[int(old)])] = token
            (folder / _SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    expected: dict[str, int] = {}
    for token, old in tokenizer.get_vocab().items():
        if old in new_ids:
            expected[token] = new_ids[old]
    # a class may make its vocabulary from other files, or from code
    if trimmed.get_vocab() != expected:
        raise InputError(
            f"{type(tokenizer).__name__} rebuilds its vocabulary when it is loaded, so it cannot be trimmed. Name "
            "another tokenizer"
        )
    return Vocabulary(trimmed, kept_ids)


def _new_ids(kept: Sequence[int]) -> dict[int, int]:
    """Return the new id of each old one, from the ids that are kept, ascending."""
    return {old: new for new, old in enumerate(kept)}


def renumbered(settings: Mapping[str, object], vocabulary: Vocabulary) -> Table:
    """Return the settings of config.json or generation_config.json for a trimmed vocabulary: new ids and size. Raises
    InputError for an id that was not kept."""
    new_ids = vocabulary.new_ids

    def new_id(name: str, value: object) -> object:
        if isinstance(value, list):
            return [new_id(name, item) for item in value]
        # unset, or a position from the end
        if not isinstance(value, int) or value < 0:
            return value
        if value not in new_ids:
            raise InputError(f"{name} = {value} in the model's config is a token that is not kept")
        return new_ids[value]

    changed: Table = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            changed[name] = renumbered(value, vocabulary)
        elif name == "vocab_size":
            changed[name] = len(vocabulary.kept)
        elif _holds_ids(name):
            changed[name] = new_id(name, value)
        else:
            changed[name] = value
    return changed


def ids_in(settings: Mapping[str, object]) -> set[int]:
    """Return the token ids in the settings of a model or its generation, which must be kept."""
    ids: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            ids |= ids_in(value)
        elif _holds_ids(name):
            ids |= _numbers(value)
    return ids


def _holds_ids(name: object) -> bool:
    """Return whether a setting holds token ids, by its name."""
    return isinstance(name, str) and name.endswith(("_token_id", "_token_ids", *_LISTS_OF_IDS))


def _numbers(value: object) -> set[int]:
    """Return the ids in a value, which may be a nested list; negative numbers are not ids."""
    numbers: set[int] = set()
    if isinstance(value, list):
        for item in value:
            numbers |= _numbers(item)
    elif isinstance(value, int) and value >= 0:
        numbers.add(value)
    return numbers


def _kept(table: Table, seen: set[int]) -> list[int]:
    """Return the ids of a tokenizer.json that are kept, ascending."""
    model = table["model"]
    added = {token["id"] for token in table["added_tokens"]}
    ids = _ids_of(model)
    unknown = seen - set(ids.values()) - added
    if unknown:
        raise InputError(f"token {min(unknown)} was seen, but the tokenizer does not have it")
    prefix = model.get("continuing_subword_prefix") or ""
    # what words fall back to; a word without them would become the unknown token
    smallest: set[str] = set()
    for token in ids:
        if len(token.removeprefix(prefix)) == 1 or _BYTE.fullmatch(token):
            smallest.add(token)
    unk = model.get("unk_token")
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        unk = model["vocab"][model["unk_id"]][0]
    token_of_id = {number: token for token, number in ids.items()}
    wanted = smallest | {unk}
    for number in seen | added:
        # added tokens may lie outside of the model's vocabulary
        if number in token_of_id:
            wanted.add(token_of_id[number])
    if model["type"] == "BPE":
        wanted = _with_parts(wanted, model)
    kept = set(added)
    for token in wanted:
        # an unknown token may be None
        if token in ids:
            kept.add(ids[token])
    return sorted(kept)


def _ids_of(model: Table) -> dict[str, int]:
    if model["type"] in ("WordPiece", "BPE", "WordLevel"):
        return dict(model["vocab"])
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    raise InputError(f"a vocabulary of type {model['type']} cannot be trimmed. Export with the full vocabulary")


def _merges(model: Table) -> Iterable[tuple[object, tuple[str, str, str]]]:
    """Yield each merge in order: its entry in the file, and (left token, right token, merged token)."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        # a text in older files, a pair in newer ones
        if isinstance(merge, str):
            left, right = merge.split(" ")
        else:
            left, right = merge
        yield merge, (left, right, left + right.removeprefix(prefix))


def _with_parts(wanted: Collection[str], model: Table) -> set[str]:
    """Return the tokens ``wanted`` with all intermediate tokens of their merges."""
    made_of: dict[str, set[str]] = {}
    for _, (left, right, merged) in _merges(model):
        made_of.setdefault(merged, set()).update((left, right))
    reached = set(wanted)
    waiting = list(wanted)
    while waiting:
        new = made_of.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def _trimmed(table: Table, new_ids: dict[int, int]) -> Table:
    """Return a tokenizer.json with only the tokens of ``new_ids``, under their new ids."""
    model = dict(table["model"])
    new_id_of: dict[str, int] = {}
    for token, old in _ids_of(model).items():
        if old in new_ids:
            new_id_of[token] = new_ids[old]
    if model["type"] == "Unigram":
        # pairs of a token and its score, in the order of their ids
        model["vocab"] = [pair for pair in model["vocab"] if pair[0] in new_id_of]
        if model["unk_id"] is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = new_id_of
    if model["type"] == "BPE":
        # the order of merges is the order in which a word is put together
        model["merges"] = [merge for merge, tokens in _merges(model) if new_id_of.keys() >= set(tokens)]
    added: list[Table] = []
    for added_token in table["added_tokens"]:
        # its settings, such as whether it is special, stay
        added.append({**added_token, "id": new_ids[added_token["id"]]})
    trimmed = {**table, "model": model, "added_tokens": added}
    if table.get("padding"):
        trimmed["padding"] = {**table["padding"], "pad_id": new_ids[table["padding"]["pad_id"]]}
    if table.get("post_processor"):
        trimmed["post_processor"] = _renumbered_processor(table["post_processor"], new_ids)
    return trimmed


def _renumbered_processor(processor: Table, new_ids: dict[int, int]) -> Table:
    """Return a post-processor, which adds special tokens to a text, with new ids."""
    changed = dict(processor)
    # a sequence of processors
    if "processors" in processor:
        changed["processors"] = [_renumbered_processor(part, new_ids) for part in processor["processors"]]
    for name in {"sep", "cls"} & processor.keys():
        token, old = processor[name]
        changed[name] = [token, new_ids[old]]
    if isinstance(processor.get("special_tokens"), dict):
        # those of a template, by the names that it uses
        changed["special_tokens"] = {}
        for name, token in processor["special_tokens"].items():
            changed["special_tokens"][name] = {**token, "ids": [new_ids[old] for old in token["ids"]]}
    return changed
