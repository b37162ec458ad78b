"""Sentence pairs of evidence.toml in which the order of words decides, from the tagged Brown corpus.

A pair is a sentence and the one that follows it. In half of the pairs, two words of the second sentence have exchanged
their places: a noun and a verb, say. Each pair is there both ways, in one split, so both classes have the same words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

from tools.quality.ladder_texts import Row, bucket

CLASSES = {"nn": "noun", "np": "noun", "vb": "verb", "jj": "adjective", "rb": "adverb"}
"""Word classes by the first letters of their tags. Words of different classes are exchanged."""
WORDS = range(6, 17)
"""Words and punctuation marks of a sentence."""
TEST_PERCENT, VALIDATION_PERCENT = 20, 8
"""Percentages of the corpus's samples, by a hash of their names."""

Tagged = list[tuple[str, str]]


def order_splits(samples: Sequence[Path], joined: Callable[[list[str]], str]) -> dict[str, list[Row]]:
    """Return the rows of each split; ``joined`` turns words and punctuation marks into text."""
    splits: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    for sample in samples:
        draw, place = random.Random(f"order/{sample.name}"), bucket(sample.name)
        validation = place < TEST_PERCENT + VALIDATION_PERCENT
        split = "test" if place < TEST_PERCENT else "validation" if validation else "train"
        for first, second in adjacent_sentences(sample.read_text(encoding="latin-1")):
            if exchanged := with_two_words_exchanged(second, draw):
                text = joined([word for word, _ in first])
                for other, label in (([word for word, _ in second], "original"), (exchanged, "exchanged")):
                    splits[split].append({"text": text, "other": joined(other), "label": label})
    return splits


def adjacent_sentences(tagged: str) -> Iterator[tuple[Tagged, Tagged]]:
    """Yield adjacent sentences of a paragraph as (word, tag) pairs, without headings and sentences of other lengths."""
    for block in tagged.split("\n\n"):
        sentences: list[Tagged] = [
            [token.rpartition("/")[::2] for token in line.split()] for line in block.splitlines()
        ]
        for first, second in pairwise(sentences):
            if (
                len(first) in WORDS
                and len(second) in WORDS
                and not any(tag.endswith("-hl") for _, tag in first + second)
            ):
                yield first, second


def with_two_words_exchanged(sentence: Tagged, draw: random.Random) -> list[str] | None:
    """Return the words after two of different classes, not the first word, have exchanged places; None without two."""
    words, classes = [word for word, _ in sentence], [CLASSES.get(tag[:2]) for _, tag in sentence]
    places = [
        (a, b)
        for a, b in combinations(range(1, len(words)), 2)
        if classes[a] and classes[b] and classes[a] != classes[b]
    ]
    if not places:
        return None
    a, b = draw.choice(places)
    words[a], words[b] = words[b], words[a]
    return words
