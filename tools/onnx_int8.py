"""Quantise a dense encoder to int8 with ONNX Runtime, as a baseline.

Dynamic quantisation of all matrices and embeddings, with onnxruntime's default settings.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pst_ds.core.packings import ONNX_FILE
from pst_ds.inference.onnx.operators import open_session
from tools.verbs import verb


def write_int8(folder: Path, out: Path) -> Path:
    """Write the dense model in ``folder`` to ``out`` / model.onnx with int8 weights. Return that file.

    ``out`` / fp32 has the graph that it is made from.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    verb("export", str(folder), "--format", "onnx", "--plain", "--out", str(out / "fp32"))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # about missing shapes
    try:
        quantize_dynamic(out / "fp32" / ONNX_FILE, out / ONNX_FILE, weight_type=QuantType.QInt8)
    finally:
        logging.disable(disabled)
    return out / ONNX_FILE


def accuracy(model_file: Path, folder: Path, texts: Path, max_length: int) -> float:
    """Return the accuracy on ``texts``, with the tokenizer and the labels of the model in ``folder``."""
    session = open_session(model_file, threads=1)
    takes = [value.name for value in session.get_inputs()]

    def logits_of(feed: dict[str, Any]) -> Any:
        return session.run(None, {name: feed[name] for name in takes})[0]

    return share_of_right_answers(logits_of, folder, texts, max_length)


def share_of_right_answers(logits_of: Any, folder: Path, texts: Path, max_length: int) -> float:
    """Return the accuracy of any runtime; ``logits_of`` takes a dict of (1, tokens) int64 and returns (1, classes)."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, classes = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).label2id
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=max_length, return_tensors="np")
        right += int(logits_of(dict(tokens))[0].argmax()) == classes[row["label"]]
    return right / len(rows)
