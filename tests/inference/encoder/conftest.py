"""Folders of tiny encoders: a classifier, a regressor, and an embedding model with files of sentence-transformers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

DATA = Path(__file__).resolve().parents[2] / "data"
WORDS = (DATA / "tiny-bert" / "vocab.txt").read_text(encoding="utf-8").split()[5:]
LABELS = {grade: f"grade {grade}" for grade in range(12)}


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folders "classifier", "regressor" and "embedder"."""
    top = tmp_path_factory.mktemp("encoders")
    named = {"num_labels": len(LABELS), "id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    for name, options in {"classifier": named, "regressor": {"num_labels": 1}, "embedder": {}}.items():
        torch.manual_seed(0)
        kind = hf.AutoModelForSequenceClassification if options else hf.AutoModel
        model = kind.from_pretrained(DATA / "tiny-bert", **options)
        if options:
            torch.nn.init.normal_(model.classifier.weight)
        with torch.no_grad():
            for layer in model.base_model.encoder.layer:
                layer.output.dense.weight[::2] = 0  # so that formats for pruned weights have something to pack
        model.save_pretrained(top / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DATA / "tiny-bert" / file, top / name / file)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (top / "embedder" / "modules.json").write_text(json.dumps(modules))
    set_pooling(top / "embedder", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    return top


def set_pooling(folder: Path, settings: dict[str, object]) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **settings}))
