"""The tokens that an export keeps for a text file."""

from __future__ import annotations

from transformers import AutoTokenizer

from pst_ds.export.export_run import _tokens_of_file


def test_a_byte_order_mark_is_not_part_of_the_first_word(tmp_path):
    """Some editors write one; it would hide the first word, which the export would then not have."""
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    word = max(tokenizer.get_vocab(), key=lambda token: (token.isalpha(), token))
    path = tmp_path / "texts.txt"
    path.write_text(f"{word}\n", encoding="utf-8-sig")
    ids = tokenizer(word)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert _tokens_of_file(str(path), tokenizer) == set(ids)
