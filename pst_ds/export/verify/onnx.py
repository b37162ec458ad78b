"""Compare an ONNX file with the masked model of the run it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers.utils import ModelOutput

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.packings import ONNX_FILE
from pst_ds.errors import InputError, first_problem, shortened
from pst_ds.export.verify.masked_run import Compared, MaskedRun, without_document_mask
from pst_ds.inference.onnx.arithmetic import DRAWS, RoundedProducts, allowed_difference
from pst_ds.inference.onnx.operators import open_session
from pst_ds.train.resolved import ResolvedRun
from pst_ds.writing.check import check_sums
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest


@dataclass(frozen=True, kw_only=True)
class OnnxComparison(Compared):
    """An ONNX file compared with the masked model of a run, which is quantised in the same way and computes in fp32.

    Logits are compared with 16-bit activations. Predictions are compared with int8 activations if the file has them.
    """

    max_logit_difference_in_8_bits: float | None = None
    """The largest difference with int8 activations, if the file has them."""


def facts_of_file(folder: Path) -> dict[str, object]:
    """Compare the files with the manifest, and open the graph in ONNX Runtime, which validates it.

    Returns its size, inputs and outputs, and in "without_sha256" the files that an older manifest does not list. Raises
    InputError.
    """
    without_sha256 = _check_files(folder)
    session = open_session(folder / ONNX_FILE)
    # large weights are in a second file next to the graph
    file_bytes = sum(path.stat().st_size for path in folder.glob(f"{ONNX_FILE}*"))
    return {
        "kind": "onnx",
        "file_bytes": file_bytes,
        "inputs": [value.name for value in session.get_inputs()],
        "outputs": [value.name for value in session.get_outputs()],
        "without_sha256": without_sha256,
    }


def _check_files(folder: Path) -> list[str]:
    """Compare the files of an ONNX export with its manifest; return the weight files of which it has no SHA-256.

    Older manifests describe the packed weights that the graph was made from, and do not list the graph.
    Raises ExportError for a missing or damaged manifest, and for a file that is missing or differs.
    """
    _, facts = read_manifest(folder)
    listed = facts["files"]
    present = sorted(path.name for path in folder.glob(f"{ONNX_FILE}*"))
    if ONNX_FILE not in listed:
        return present
    check_sums(folder, listed | facts.get("files_in_folders", {}))
    unknown = [name for name in present if name not in listed]
    if unknown:
        raise ExportError(f"{folder} has files that the manifest does not list: {shortened(unknown)}. Remove them")
    return []


@torch.no_grad()
def compare_onnx_with_run(
    folder: Path,
    resolved: ResolvedRun,
    checkpoint: Checkpoint,
    split: str,
    limit: int | None,
    reference: str | Path | None,
) -> OnnxComparison:
    """Compute the logits of a split with the file, and with the masked model in fp32, quantised as the file is.

    They may differ by what the file's arithmetic explains, see :mod:`pst_ds.inference.onnx.arithmetic`.
    A file with int8 activations is compared with 16-bit activations, and once more unchanged for predictions and
    metrics. Raises InputError for a file whose only output is not "logits".
    """
    model = OnnxModel(folder / ONNX_FILE)
    run = MaskedRun.of(
        folder=folder,
        resolved=without_document_mask(resolved),
        checkpoint=checkpoint,
        split=split,
        limit=limit,
        encoding=None,
    )
    run.trim()
    in_8_bits = model.activation_bits == 8
    as_it_runs = model
    if in_8_bits:
        as_it_runs = OnnxModel(folder / ONNX_FILE, exact=False)
    # divergences are from the model as it was trained, which the lines below change
    kl = run.kl_of(as_it_runs)
    kl_from_reference = run.kl_from(reference, as_it_runs)
    run.cast(run.narrower_dtypes())
    if run.encoding.is_quantized:
        run.quantise(in_fp32=True)
    # last: a cast or quantised value stays the same in fp32
    run.to_fp32()
    exact = run.compare(run.model, model)
    effects = _effects_of_rounding(run, model)
    differences = exact
    max_logit_difference_in_8_bits: float | None = None
    if in_8_bits:
        differences = run.compare(run.model, as_it_runs)
        max_logit_difference_in_8_bits = differences.logit
    return OnnxComparison(
        examples=len(run.examples),
        unit=run.context.task.unit,
        differing_predictions=differences.predictions,
        max_logit_difference=exact.logit,
        allowed_logit_difference=allowed_difference(effects, exact.largest_logit),
        metrics=differences.metrics,
        kl=kl,
        kl_from_reference=kl_from_reference,
        max_logit_difference_in_8_bits=max_logit_difference_in_8_bits,
    )


def _effects_of_rounding(run: MaskedRun, graph: "OnnxModel") -> list[float]:
    """Return how far the logits of the masked model move when its products round as those of the graph do."""
    quantised: dict[str, str] = {}
    if graph.has_our_operators:  # a graph of standard operators has dense fp32 weights
        for tensor in run.tensors:
            if tensor.values:
                quantised[tensor.name.removesuffix(".weight")] = tensor.values
    effects: list[float] = []
    for seed in range(DRAWS):
        rounded = RoundedProducts(run.model, quantised, seed)
        effects.append(run.compare(run.model, rounded).logit)
    return effects


class _Written(BaseModel):
    """What is read of the metadata that pst-ds writes into a graph."""

    model_config = ConfigDict(strict=True)

    activation_bits: Literal[8, 16] = 16
    operators: str | None = None


def _written_in(file: Path, text: str) -> _Written:
    """Return the metadata of a graph. Raises InputError."""
    try:
        return _Written.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{file}: its metadata is damaged: {first_problem(error)}. Export the run again") from None


class OnnxModel:
    """A session with the call signature of the model."""

    def __init__(self, file: Path, *, exact: bool = True):
        self._session = open_session(file, exact=exact)
        self._inputs = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        written = _written_in(file, self._session.get_modelmeta().custom_metadata_map.get("pst_ds", "{}"))
        self.activation_bits = written.activation_bits
        self.has_our_operators = written.operators != "standard"
        if outputs != ["logits"]:
            raise InputError(f"{file} has the outputs {', '.join(outputs)}, and only logits are compared")

    def __call__(self, **inputs: Tensor) -> ModelOutput:
        tokens = inputs["input_ids"]
        # transformers has these defaults, and a graph needs every input
        defaults = {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens)}
        known = defaults | inputs
        # a graph refuses a name that is not one of its inputs, such as "labels"
        feed = {name: known[name].cpu().numpy() for name in self._inputs if name in known}
        logits = torch.from_numpy(self._session.run(None, feed)[0])
        return ModelOutput(logits=logits.to(tokens.device))
