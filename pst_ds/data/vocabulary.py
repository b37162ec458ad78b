"""A tokenizer with fewer tokens, which reads the texts that it was trimmed to as the whole one does.

Kept are the tokens that were seen, the special and added ones, and the smallest pieces that others fall back to: single
characters, or bytes. A word that was not seen becomes more and smaller pieces; one that was becomes the same ones:

* WordPiece takes the longest piece that it has at each place. What it took before is still there, and nothing is new.
* BPE applies its merges in their order. Those that lead to a kept token are kept, with all that they go through.
* Unigram takes the best way through a word, which is still there, among fewer.

New ids are in the order of the old ones, so an embedding is trimmed by taking its rows in that order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")
"""Settings of a model or its generation that hold ids, besides those whose name ends in _token_id or _token_ids."""


class VocabularyError(InputError):
    """A tokenizer that cannot be trimmed."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A trimmed tokenizer, and the rows that an embedding for it has."""

    tokenizer: PreTrainedTokenizerBase
    kept: list[int]
    """The old id of every new one, ascending."""

    @property
    def new_ids(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}


def trim(tokenizer: PreTrainedTokenizerBase, seen: Iterable[int]) -> Vocabulary:
    """Return ``tokenizer`` with the tokens ``seen``, and those named above.

    ``seen``: ids, in any order, as often as they like. Raises VocabularyError for a tokenizer without a table of the
    tokenizers library, of a kind other than WordPiece, BPE, Unigram and WordLevel, and for an id that it does not have.
    """
    if not tokenizer.is_fast:
        raise VocabularyError(f"{type(tokenizer).__name__} is no fast tokenizer, and only those can be trimmed")
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _kept(table, set(seen))
    new_ids = {old: new for new, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in set(tokenizer.vocab_files_names.values()) - {_TOKENIZER}:
            (Path(folder) / name).unlink(missing_ok=True)  # its older forms, which have all tokens
        (Path(folder) / _TOKENIZER).write_text(json.dumps(_trimmed(table, new_ids), ensure_ascii=False), "utf-8")
        _renumber_settings(Path(folder) / _SETTINGS, new_ids)
        fewer = type(tokenizer).from_pretrained(folder)
    expected = {token: new_ids[old] for token, old in tokenizer.get_vocab().items() if old in new_ids}
    if fewer.get_vocab() != expected:
        raise VocabularyError(
            f"{type(tokenizer).__name__} makes its table anew when it is loaded, and cannot be trimmed"
        )
    return Vocabulary(fewer, kept)


def renumbered(settings: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the settings of config.json or generation_config.json for a trimmed vocabulary: ids and sizes.

    Raises VocabularyError for an id that was not kept.
    """
    new_ids = vocabulary.new_ids

    def new_id(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [new_id(name, item) for item in value]
        if not isinstance(value, int) or value < 0:  # none, or a position
            return value
        if value not in new_ids:
            raise VocabularyError(f"{name} = {value} in the model's config is a token that is not kept")
        return new_ids[value]

    changed: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            changed[name] = renumbered(value, vocabulary)
        elif name == "vocab_size":
            changed[name] = len(vocabulary.kept)
        else:
            changed[name] = new_id(name, value) if _holds_ids(name) else value
    return changed


def ids_in(settings: Mapping[str, Any]) -> set[int]:
    """Return the token ids that the settings of a model or its generation name, which must be kept."""
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= ids_in(value)
        elif _holds_ids(name):
            found |= _numbers(value)
    return found


def _holds_ids(name: object) -> bool:
    return isinstance(name, str) and name.endswith(("_token_id", "_token_ids", *_LISTS_OF_IDS))


def _numbers(value: Any) -> set[int]:
    if isinstance(value, list):
        return {number for item in value for number in _numbers(item)}
    return {value} if isinstance(value, int) and value >= 0 else set()


def _kept(table: dict[str, Any], seen: set[int]) -> list[int]:
    """Return the ids of ``table``, a tokenizer.json, that are kept, ascending."""
    model, added = table["model"], {token["id"] for token in table["added_tokens"]}
    ids = _ids_of(model)
    unknown = seen - set(ids.values()) - added
    if unknown:
        raise VocabularyError(f"token {min(unknown)} was seen, which the tokenizer does not have")
    prefix = model.get("continuing_subword_prefix") or ""
    smallest = {token for token in ids if len(token.removeprefix(prefix)) == 1 or _is_byte(token)}
    unk = model.get("unk_token")
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        unk = model["vocab"][model["unk_id"]][0]
    names = {id_: token for token, id_ in ids.items()}
    wanted = smallest | {names[id_] for id_ in seen | added if id_ in names} | {unk}
    if model["type"] == "BPE":
        wanted = _with_their_parts(wanted, model)
    return sorted({ids[token] for token in wanted if token in ids} | added)


def _ids_of(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] in ("WordPiece", "BPE", "WordLevel"):
        return dict(model["vocab"])
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    raise VocabularyError(f"a vocabulary of type {model['type']} cannot be trimmed")


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: dict[str, Any]) -> Iterable[tuple[Any, tuple[str, str], str]]:
    """(merge as it is written, its two tokens, the token that it makes), in order."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield merge, (left, right), left + right.removeprefix(prefix)


def _with_their_parts(wanted: Collection[str], model: dict[str, Any]) -> set[str]:
    """Return the tokens ``wanted`` and all that the merges to them go through."""
    made_of: dict[str, set[str]] = {}
    for _, parts, made in _merges(model):
        made_of.setdefault(made, set()).update(parts)
    found, todo = set(wanted), list(wanted)
    while todo:
        new = made_of.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def _trimmed(table: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """Return ``table`` with the tokens of ``new_ids`` alone, under their new ids."""
    model = dict(table["model"])
    kept = {token: new_ids[old] for token, old in _ids_of(model).items() if old in new_ids}
    if model["type"] == "Unigram":
        model["vocab"] = [pair for pair in model["vocab"] if pair[0] in kept]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = kept
    if model["type"] == "BPE":
        model["merges"] = [m for m, parts, made in _merges(model) if all(t in kept for t in (*parts, made))]
    added = [{**token, "id": new_ids[token["id"]]} for token in table["added_tokens"]]
    padding = table.get("padding") and {**table["padding"], "pad_id": new_ids[table["padding"]["pad_id"]]}
    processor = _renumbered_processor(table.get("post_processor"), new_ids)
    return {**table, "model": model, "added_tokens": added, "padding": padding, "post_processor": processor}


def _renumbered_processor(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> dict[str, Any] | None:
    """Return what puts special tokens around a text, with their new ids."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_renumbered_processor(one, new_ids) for one in processor["processors"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, old = processor[name]
            changed[name] = [token, new_ids[old]]
    if isinstance(processor.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return changed


def _renumber_settings(path: Path, new_ids: dict[int, int]) -> None:
    """Give the added tokens of a tokenizer_config.json their new ids."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text("utf-8"))
    if decoder := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(new_ids[int(old)]): token for old, token in decoder.items()}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
