"""Hold an ONNX file against the masked model of the run that it came from."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pst_ds.cli.verify.against_run import LargestLogit, trimmed_to_export
from pst_ds.cli.verify.rounded import cast_model, encoding_of_folder, narrower_dtypes, round_model, settle
from pst_ds.cli.verify.vocabulary import tokens_of_folder
from pst_ds.config.run import RunConfig
from pst_ds.core.packings import ONNX_FILE
from pst_ds.errors import InputError
from pst_ds.inference.onnx.folder import ALLOWED
from pst_ds.inference.onnx.operators import open_session
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import exact_inputs
from pst_ds.train.evaluate import compare
from pst_ds.train.run import masked_model, prepare_single
from pst_ds.train.run_folder import open_checkpoint


def facts_of_file(folder: Path) -> dict[str, Any]:
    """Open the file, which has ONNX Runtime check it, and return its size, inputs and outputs. Raises InputError."""
    session = open_session(folder / ONNX_FILE)
    return {
        "export_dir": str(folder),
        "kind": "onnx",
        "file_bytes": sum(path.stat().st_size for path in folder.glob(f"{ONNX_FILE}*")),
        "inputs": [value.name for value in session.get_inputs()],
        "outputs": [value.name for value in session.get_outputs()],
    }


@torch.no_grad()
def compare_onnx_with_run(args: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Compute the logits of a split with the file and with the masked model in fp32, rounded as the file is.

    A file whose products take inputs of 8 bits is held against the model with 16, and once more as it is, against the
    model as it was trained: that counts predictions and metrics. Raises InputError for a file of several outputs, or
    none called logits.
    """
    model = _OnnxModel(Path(args.export) / ONNX_FILE)
    checkpoint = open_checkpoint(config, args.checkpoint)
    config = replace(config, data=replace(config.data, document_mask=False))  # a graph has no position_ids
    prepared = prepare_single(config, checkpoint)
    examples = prepared.load(args.split)
    if args.limit:
        examples = examples.first(args.limit)
    masked = masked_model(prepared, checkpoint)
    if kept := tokens_of_folder(args.export):
        prepared, examples, _ = trimmed_to_export(args, prepared, examples, masked, kept)
    cast_model(masked, narrower_dtypes(masked, args.export))
    if encoding_of_folder(args.export).is_quantized:
        round_model(masked, args.export, config.model.path, in_fp32=True)
    for layer in pst_layers(masked).values():
        if not layer.rounds:
            settle(layer, layer.masked_weight())
    largest = LargestLogit(nn.Module.float(masked))
    with exact_inputs(masked):
        differences, metrics = compare(largest, model, prepared, examples)
    if model.activation_bits == 8:
        quantised = _OnnxModel(Path(args.export) / ONNX_FILE, exact=False)
        rounded, metrics = compare(largest, quantised, prepared, examples)
        differences |= {
            "differing_predictions": rounded["differing_predictions"],
            "max_logit_difference_in_8_bits": rounded["max_logit_difference"],
        }
    return {
        "examples": len(examples),
        "unit": prepared.task.unit,
        **differences,
        "allowed_logit_difference": ALLOWED * largest.value,
        "metrics": metrics,
    }


class _OnnxModel:
    """A session that is called as the model would be."""

    def __init__(self, file: Path, *, exact: bool = True):
        self._session = open_session(file, exact=exact)
        self._inputs = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        written = json.loads(self._session.get_modelmeta().custom_metadata_map.get("pst_ds", "{}"))
        self.activation_bits = written.get("activation_bits", 16)
        if outputs != ["logits"]:
            raise InputError(f"{file} has the outputs {', '.join(outputs)}; --against compares logits alone")

    def __call__(self, **inputs: Any) -> ModelOutput:
        tokens: Tensor = inputs["input_ids"]
        left_out = {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens)}
        given = {name: inputs.get(name, left_out.get(name)) for name in self._inputs}
        feed = {name: value.cpu().numpy() for name, value in given.items() if value is not None}
        return ModelOutput(logits=torch.from_numpy(self._session.run(None, feed)[0]).to(tokens.device))
