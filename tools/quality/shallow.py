"""Classifiers without a transformer, as baselines: bag of words, and static embeddings by the recipe of model2vec.

Both read as much of each text as the encoder does. Bag of words: tf-idf of words and word pairs, for sentence pairs of
either sentence, and with or without each word of one combined with each word of the other. Static embeddings: the
encoder's output for each token of its vocabulary, reduced to 256 principal components and weighted by Zipf's law. A
text is the mean u of its tokens, a pair is u, v, |u - v| and u v; table and a linear layer are trained on the task.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import joblib
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import ComplementNB
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

from tools.quality.cells import digest

Texts = tuple[str, ...]
"""The text of an example, or the two of a pair."""
Predict = Callable[[Sequence[Texts]], Sequence[str]]
DIMENSIONS, SIF = 256, 1e-4
"""Principal components, and the coefficient of the weights: model2vec's defaults."""
STEPS, BATCHES, RATE, PATIENCE = 30, (32, 512), 1e-3, 5
"""Steps per epoch, least and most examples per step, Adam's learning rate, and epochs without a gain on the validation
file that end training; as in model2vec.
"""
TIMED_TOKENS, TIMED_TEXTS = 32, 51
CHARACTERS_PER_TOKEN = 40
"""No more of a text is tokenised, which is slow for pairs of long texts."""
GRAMS = CountVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2)).build_analyzer()


@dataclass(frozen=True)
class Labelled:
    """Examples of one file."""

    texts: list[Texts]
    labels: list[str]

    def accuracy(self, predict: Predict) -> float:
        right = zip(predict(self.texts), self.labels, strict=True)
        return sum(found == label for found, label in right) / len(self.labels)


def read(path: str | Path, encoder: str | Path, columns: Sequence[str], max_length: int) -> Labelled:
    """Return the examples of a JSONL file, cut where ``encoder`` truncates them to ``max_length`` tokens."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tokenizer, texts = AutoTokenizer.from_pretrained(encoder), []
    for row in rows:
        whole = [row[column][: CHARACTERS_PER_TOKEN * max_length] for column in columns]
        tokens = tokenizer(*whole, truncation=True, max_length=max_length, return_offsets_mapping=True)
        ends = [0] * len(columns)
        for side, (_, end) in zip(tokens.sequence_ids(), tokens["offset_mapping"], strict=True):
            if side is not None:
                ends[side] = max(ends[side], end)
        texts.append(tuple(text[:end] for text, end in zip(whole, ends, strict=True)))
    return Labelled(texts, [row["label"] for row in rows])


@dataclass(frozen=True)
class Files:
    """Where a classifier finds what it is made from, and where it is written."""

    encoder: Path
    """Folder of the encoder and its tokenizer."""
    table: Path
    """Static embeddings of its tokens, which all cells share; made if missing."""
    out: Path
    """File to write."""


def measure(kind: str, settings: dict[str, Any], tests: dict[str, str], folder: Path, shared: Path) -> dict[str, Any]:
    """Train a classifier, one of :data:`KINDS`, on the data of a run file's settings. Return the facts of its cell.

    Args:
        folder: Where its file is written.
        shared: Folder of files that several cells need. Making them is not part of the CPU seconds of training.
    """
    data, encoder = settings["data"], settings["model"]["path"]
    columns, length = data.get("text_columns", ["text"]), data["max_length"]
    train, validation = (read(data[split], encoder, columns, length) for split in ("train", "validation"))
    write, opened = KINDS[kind]
    files = Files(Path(encoder), shared / f"static-{digest(encoder)}.safetensors", folder / kind.replace(" ", "_"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings["seed"])
    if kind == "static embeddings":
        make_table(files)
    cpu = time.process_time()
    write(train, validation, files)
    cpu = time.process_time() - cpu
    predict = opened(files)
    found = {name: {"accuracy": read(path, encoder, columns, length).accuracy(predict)} for name, path in tests.items()}
    short = read(data["validation"], encoder, columns, TIMED_TOKENS).texts[:TIMED_TEXTS]
    return {
        "validation": {"accuracy": validation.accuracy(predict)},
        "tests": found,
        "training_cpu_seconds": round(cpu, 1),
        "sparsity_measured": 0.0,
        "files": {kind: {"bytes": files.out.stat().st_size, "ms": median_ms(predict, short), "tests": found}},
    }


def median_ms(predict: Predict, texts: Sequence[Texts]) -> float:
    """Return the median milliseconds of ``predict`` for one text, from characters to label."""
    times = []
    for text in texts:
        start = time.perf_counter()
        predict([text])
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def bag_features(texts: Texts) -> list[str]:
    """Return the words and word pairs of a text, or of both texts of a pair with their side."""
    grams = [GRAMS(text) for text in texts]
    return grams[0] if len(grams) == 1 else [f"{side}: {gram}" for side, own in enumerate(grams) for gram in own]


def crossed_features(texts: Texts) -> list[str]:
    """Return :func:`bag_features` of a pair, and each word of one text with each word of the other."""
    first, second = ({gram for gram in GRAMS(text) if " " not in gram} for text in texts)
    return bag_features(texts) + [f"{a} x {b}" for a, b in product(first, second)]


def write_bag(train: Labelled, validation: Labelled, files: Files) -> None:
    """Write the best of logistic regression at two strengths and naive Bayes on the validation examples."""
    features = (bag_features,) if len(train.texts[0]) == 1 else (bag_features, crossed_features)
    bags = [
        make_pipeline(TfidfVectorizer(analyzer=analyzer, sublinear_tf=True), classifier).fit(train.texts, train.labels)
        for analyzer in features
        for classifier in (
            LogisticRegression(max_iter=500),
            LogisticRegression(C=10, max_iter=500),
            ComplementNB(alpha=0.3),
        )
    ]
    joblib.dump(max(bags, key=lambda bag: validation.accuracy(bag.predict)), files.out, compress=3)


def open_bag(files: Files) -> Predict:
    predict: Predict = joblib.load(files.out).predict
    return predict


class StaticClassifier(nn.Module):
    """Mean embedding of the tokens of each text, and a linear layer.

    Args:
        table: Embedding of each token, (vocabulary, dimensions).
        sides: Texts per example, 1 or 2.
    """

    def __init__(self, table: Tensor, sides: int, classes: int):
        super().__init__()
        self.table = nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="mean")
        self.head = nn.Linear(table.shape[1] * (1 if sides == 1 else 4), classes)

    def forward(self, examples: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the logits of ``examples``, each of which has the token ids of its texts: (examples, classes)."""
        means = []
        for ids in zip(*examples, strict=True):
            starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
            means.append(normalize(self.table(torch.cat(ids), starts)))
        if len(means) == 2:
            u, v = means
            means += [(u - v).abs(), u * v]
        return self.head(torch.cat(means, 1))


def distilled(encoder: Path) -> Tensor:
    """Return a static embedding of each token of an encoder's vocabulary, zero for special ones: (vocabulary, 256)."""
    model, tokenizer = AutoModel.from_pretrained(encoder, dtype=torch.float32), AutoTokenizer.from_pretrained(encoder)
    special = re.compile(r"\[[A-Za-z]+\d*\]")  # [CLS], [unused17]
    ids = sorted(number for token, number in tokenizer.get_vocab().items() if not special.fullmatch(token))
    sequences = torch.tensor([[tokenizer.cls_token_id, number, tokenizer.sep_token_id] for number in ids])
    model.eval()
    with torch.inference_mode():
        outputs = torch.cat([model(input_ids=part).last_hidden_state.mean(1) for part in sequences.split(BATCHES[1])])
    share = 1 / torch.arange(2, len(ids) + 2)  # by Zipf's law: vocabularies are ordered by frequency
    weights = SIF / (SIF + share / share.sum())
    table = torch.zeros(len(tokenizer), min(DIMENSIONS, outputs.shape[1]))
    table[ids] = torch.from_numpy(PCA(table.shape[1]).fit_transform(outputs.numpy())) * weights[:, None]
    return table


def make_table(files: Files) -> None:
    """Write the static embeddings of an encoder, unless they exist."""
    if not files.table.is_file():
        files.table.parent.mkdir(parents=True, exist_ok=True)
        save_file({"table": distilled(files.encoder)}, files.table)


def token_ids(encoder: Path) -> Callable[[Texts], list[Tensor]]:
    """Return a function from the texts of an example to their token ids, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    return lambda texts: [
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64) for text in texts
    ]


def write_static(train: Labelled, validation: Labelled, files: Files) -> None:
    """Train table and layer by Adam until the validation examples gain nothing; write the best epoch in fp16."""
    make_table(files)
    ids, classes = token_ids(files.encoder), sorted(set(train.labels))
    model = StaticClassifier(load_file(files.table)["table"], len(train.texts[0]), len(classes))
    examples = [ids(texts) for texts in train.texts]
    labels = torch.tensor([classes.index(label) for label in train.labels])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    batch = min(max(len(examples) // STEPS, BATCHES[0]), BATCHES[1])
    best, kept, waited = 0.0, deepcopy(model.state_dict()), 0
    while waited < PATIENCE:
        for chosen in torch.randperm(len(examples)).split(batch):
            optimizer.zero_grad()
            cross_entropy(model([examples[i] for i in chosen]), labels[chosen]).backward()
            optimizer.step()
        found = validation.accuracy(partial(predicted, model, ids, classes))
        waited += 1
        if found > best:
            best, kept, waited = found, deepcopy(model.state_dict()), 0
    save_file({name: value.half() for name, value in kept.items()}, files.out, {"classes": json.dumps(classes)})


def open_static(files: Files) -> Predict:
    with safe_open(files.out, "pt") as opened:
        classes = json.loads(opened.metadata()["classes"])
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  it is not a mapping
    table = state["table.weight"]
    model = StaticClassifier(table, 1 if state["head.weight"].shape[1] == table.shape[1] else 2, len(classes))
    model.load_state_dict(state)
    return partial(predicted, model, token_ids(files.encoder), classes)


def predicted(
    model: StaticClassifier, ids: Callable[[Texts], list[Tensor]], classes: Sequence[str], texts: Sequence[Texts]
) -> list[str]:
    """Return the most likely class of each example."""
    with torch.inference_mode():
        return [classes[i] for i in model([ids(one) for one in texts]).argmax(1).tolist()]


KINDS: dict[str, tuple[Callable[[Labelled, Labelled, Files], None], Callable[[Files], Predict]]] = {
    "bag of words": (write_bag, open_bag),
    "static embeddings": (write_static, open_static),
}
"""Values of a method's ``shallow``: what trains and writes its file, and what opens it."""
