"""Compare an ONNX file with the masked model of the run it came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pst_ds.core.packings import ONNX_FILE
from pst_ds.errors import InputError
from pst_ds.inference.onnx.folder import ALLOWED
from pst_ds.inference.onnx.operators import open_session
from pst_ds.inference.verify.against_run import LargestLogit, OnnxComparison, RunToCompare, trimmed_to_export
from pst_ds.inference.verify.as_exported import (
    cast_model,
    encoding_of_folder,
    narrower_dtypes,
    quantise_model,
    settle,
    tokens_of_folder,
)
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import exact_inputs
from pst_ds.train.evaluate import compare
from pst_ds.train.run import masked_model, prepare_single
from pst_ds.train.run_folder import open_checkpoint


def facts_of_file(folder: Path) -> dict[str, object]:
    """Open the file in ONNX Runtime, which validates it; return its size, inputs and outputs. Raises InputError."""
    session = open_session(folder / ONNX_FILE)
    return {
        "kind": "onnx",
        "file_bytes": sum(path.stat().st_size for path in folder.glob(f"{ONNX_FILE}*")),
        "inputs": [value.name for value in session.get_inputs()],
        "outputs": [value.name for value in session.get_outputs()],
    }


@torch.no_grad()
def compare_onnx_with_run(folder: Path, run: RunToCompare) -> OnnxComparison:
    """Compute the logits of a split with the file, and with the masked model in fp32, quantised as the file is.

    A file with int8 activations is compared with 16-bit activations, and once more unchanged with the model as it was
    trained, for predictions and metrics. Raises InputError for a file whose only output is not "logits".
    """
    model = _OnnxModel(folder / ONNX_FILE)
    checkpoint = open_checkpoint(run.config, run.checkpoint)
    # a graph has no position_ids
    config = replace(run.config, data=replace(run.config.data, document_mask=False))
    context = prepare_single(config, checkpoint)
    examples = run.examples(context)
    masked = masked_model(context, checkpoint)
    if kept := tokens_of_folder(folder):
        context, examples, _ = trimmed_to_export(folder, run, context, examples, masked, kept)
    cast_model(masked, narrower_dtypes(masked, folder))
    if encoding_of_folder(folder).is_quantized:
        quantise_model(masked, folder, config.model.path, in_fp32=True)
    for layer in pst_layers(masked).values():
        if not layer.rounds:
            settle(layer, layer.masked_weight())
    largest = LargestLogit(nn.Module.float(masked))
    with exact_inputs(masked):
        differences, metrics = compare(largest, model, context, examples)
    predictions, in_8_bits = int(differences["differing_predictions"]), None
    if model.activation_bits == 8:
        rounded, metrics = compare(largest, _OnnxModel(folder / ONNX_FILE, exact=False), context, examples)
        predictions, in_8_bits = int(rounded["differing_predictions"]), rounded["max_logit_difference"]
    return OnnxComparison(
        examples=len(examples),
        unit=context.task.unit,
        differing_predictions=predictions,
        max_logit_difference=differences["max_logit_difference"],
        allowed_logit_difference=ALLOWED * largest.value,
        metrics=metrics,
        max_logit_difference_in_8_bits=in_8_bits,
    )


class _OnnxModel:
    """A session with the call signature of the model."""

    def __init__(self, file: Path, *, exact: bool = True):
        self._session = open_session(file, exact=exact)
        self._inputs = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        written = json.loads(self._session.get_modelmeta().custom_metadata_map.get("pst_ds", "{}"))
        self.activation_bits = written.get("activation_bits", 16)
        if outputs != ["logits"]:
            raise InputError(f"{file} has the outputs {', '.join(outputs)}, and --against compares logits only")

    def __call__(self, **inputs: Any) -> ModelOutput:
        tokens: Tensor = inputs["input_ids"]
        left_out = {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens)}
        given = {name: inputs.get(name, left_out.get(name)) for name in self._inputs}
        feed = {name: value.cpu().numpy() for name, value in given.items() if value is not None}
        return ModelOutput(logits=torch.from_numpy(self._session.run(None, feed)[0]).to(tokens.device))
