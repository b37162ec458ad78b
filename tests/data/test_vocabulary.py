"""Trimmed tokenizers: seen texts keep their tokens, others are still read."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pst_ds.data.vocabulary import ids_in, renumbered, trim
from pst_ds.errors import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = "abcdefgh"


def _corpus(seed, count=300):
    """Words of few letters, so that pieces are shared and words have several ways through them."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(LETTERS, k=generator.randint(1, 9))) for _ in range(80)]
    return [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(count)]


def _of_kind(kind):
    if kind == "bert":
        return AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    if kind == "llama":
        return AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    texts, settings = _corpus(0), {"vocab_size": 260, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    elif kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        settings |= {"vocab_size": 420, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(**settings)
    elif kind == "word-bpe":
        made = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
        trainer = trainers.BpeTrainer(continuing_subword_prefix="##", **settings)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **settings)
    else:
        made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**settings)
    made.train_from_iterator(texts, trainer)
    cls, sep = made.token_to_id("[CLS]"), made.token_to_id("[SEP]")
    made.post_processor = (
        processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
        if kind == "unigram"
        else processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)])
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _texts(kind):
    if kind in ("bert", "llama"):
        with open("tests/data/train.jsonl") as file:
            return [json.loads(line)["text"] for line in file][:40]
    return _corpus(0)[:40]


KINDS = ["bert", "llama", "wordpiece", "bpe", "word-bpe", "unigram", "words"]


@pytest.mark.parametrize("kind", KINDS)
def test_seen_texts_keep_their_tokens(kind):
    whole, texts = _of_kind(kind), _texts(kind)
    before = [whole(text)["input_ids"] for text in texts]
    trimmed = trim(whole, (token for ids in before for token in ids))
    assert trimmed.kept == sorted(set(trimmed.kept))
    assert len(trimmed.tokenizer) == len(trimmed.kept) <= len(whole)
    after = [trimmed.tokenizer(text)["input_ids"] for text in texts]
    assert [[trimmed.kept[token] for token in ids] for ids in after] == before
    assert [trimmed.tokenizer.decode(ids) for ids in after] == [whole.decode(ids) for ids in before]
    for name, token in whole.special_tokens_map.items():
        assert getattr(trimmed.tokenizer, name) == token
        assert trimmed.kept[getattr(trimmed.tokenizer, f"{name}_id")] == getattr(whole, f"{name}_id")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "word-bpe", "unigram"])
def test_other_texts_become_smaller_pieces(kind):
    whole = _of_kind(kind)
    seen = [token for text in _corpus(0)[:5] for token in whole(text)["input_ids"]]
    fewer = trim(whole, seen).tokenizer
    assert len(fewer) < 0.9 * len(whole)
    longer = 0
    for text in _corpus(1, 50):
        ids = fewer(text)["input_ids"]
        assert fewer.unk_token_id not in ids
        assert fewer.decode(ids, skip_special_tokens=True) == whole.decode(
            whole(text)["input_ids"], skip_special_tokens=True
        )
        assert len(ids) >= len(whole(text)["input_ids"]) or kind != "unigram"
        longer += len(ids) > len(whole(text)["input_ids"])
    assert longer > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_one_is_read_as_it_was(kind, tmp_path):
    whole = _of_kind(kind)
    trimmed = trim(whole, whole(_texts(kind)[0])["input_ids"])
    trimmed.tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == trimmed.tokenizer.get_vocab()
    text = _texts(kind)[1]
    assert read(text)["input_ids"] == trimmed.tokenizer(text)["input_ids"]


def test_added_tokens_are_kept_and_split_no_word():
    whole = _of_kind("bpe")
    whole.add_tokens(["<turn>", "<image>"])
    trimmed = trim(whole, whole("abc <turn> d")["input_ids"])
    assert trimmed.kept[-2:] == [len(whole) - 2, len(whole) - 1]
    ids = trimmed.tokenizer("abc <turn> d")["input_ids"]
    assert [trimmed.kept[token] for token in ids] == whole("abc <turn> d")["input_ids"]


def test_padding_has_the_new_id():
    whole = _of_kind("wordpiece")
    whole.backend_tokenizer.enable_padding(pad_id=whole.convert_tokens_to_ids("h"), pad_token="h")
    trimmed = trim(whole, [])
    table = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())
    assert table["padding"]["pad_id"] == trimmed.tokenizer.convert_tokens_to_ids("h")


def test_settings_of_a_model_have_new_ids_and_sizes():
    whole = _of_kind("wordpiece")
    trimmed = trim(whole, [100, 200])
    new = trimmed.new_ids
    settings = {
        "vocab_size": len(whole), "hidden_size": 100, "pad_token_id": 0, "eos_token_id": [3, 200], "bos_token_id": None,
        "id2label": {0: "bad", 1: "good"},
        "text_config": {"vocab_size": len(whole), "image_token_id": 100}, "suppress_tokens": [-1, 200],
        "bad_words_ids": [[100], [200, 3]],
    }  # fmt: skip
    assert ids_in(settings) == {0, 3, 100, 200}
    assert renumbered(settings, trimmed) == {
        "vocab_size": len(trimmed.kept), "hidden_size": 100, "pad_token_id": 0, "eos_token_id": [3, new[200]],
        "bos_token_id": None, "id2label": {0: "bad", 1: "good"},
        "text_config": {"vocab_size": len(trimmed.kept), "image_token_id": new[100]},
        "suppress_tokens": [-1, new[200]], "bad_words_ids": [[new[100]], [new[200], 3]],
    }  # fmt: skip
    gone = next(id_ for id_ in range(len(whole)) if id_ not in new)
    with pytest.raises(InputError, match=f"decoder_start_token_id = {gone} "):
        renumbered({"decoder_start_token_id": gone}, trimmed)


def test_what_cannot_be_trimmed_is_refused(monkeypatch):
    whole = _of_kind("wordpiece")
    with pytest.raises(InputError, match="token 260 was seen"):
        trim(whole, [3, 260, 261])
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(InputError, match="not a fast tokenizer"):
        trim(whole, [])
