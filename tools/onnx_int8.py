"""A dense encoder as ONNX Runtime runs it in int8: what a user without a sparse model would take.

Dynamic quantization of every matrix and of the embeddings, with the settings that onnxruntime has by default.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class LogitsOfInputs(nn.Module):
    """A classifier that takes ``INPUTS``, each (batch, tokens), by position, and returns its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(INPUTS, inputs, strict=True))).logits


def write_int8(folder: Path, out: Path) -> Path:
    """Write the classifier in the dense ``folder`` to ``out`` / model.onnx, with int8 weights; return that file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=model.config.max_position_embeddings)}
    with _quiet():
        torch.onnx.export(
            LogitsOfInputs(model).eval(),
            tuple(torch.ones(2, 8, dtype=torch.long) for _ in INPUTS),
            out / "fp32.onnx",
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes={"inputs": tuple(axes for _ in INPUTS)},
            dynamo=True,
            verbose=False,
        )
        quantize_dynamic(out / "fp32.onnx", out / "model.onnx", weight_type=QuantType.QInt8)
    return out / "model.onnx"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxruntime say of axes that share a size, and of models that they know nothing of."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def accuracy(model_file: Path, folder: Path, texts: Path, max_length: int) -> float:
    """The share of right answers on ``texts``, with the tokenizer and the labels of the model in ``folder``."""
    import onnxruntime
    from transformers import AutoConfig, AutoTokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    tokenizer, classes = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder).label2id
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    right = 0
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=max_length, return_tensors="np")
        (logits,) = session.run(None, {name: tokens[name] for name in INPUTS})
        right += int(logits[0].argmax()) == classes[row["label"]]
    return right / len(rows)


def measure(folder: Path, out: Path, texts: Path, max_length: int) -> dict[str, Any]:
    """Convert and test; the file's bytes are those of the one file that a user would keep."""
    file = write_int8(folder, out)
    return {"file_bytes": file.stat().st_size, "accuracy": accuracy(file, folder, texts, max_length)}
