"""Format "onnx": a graph for ONNX Runtime, whose sparse products are custom operators unless it is plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.core.packings import ONNX_FILE, VALUE_BITS
from pst_ds.errors import shortened
from pst_ds.storage_format import EMBEDDINGS, VALUES, StorageFormat

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid


class Onnx(StorageFormat):
    """Converted from a bitmask folder, or with ``plain`` from a dense one."""

    name = "onnx"
    purpose = "a graph for ONNX Runtime and OpenVINO"
    quantises = (VALUES, EMBEDDINGS)
    has_plain_variant = True
    has_weight_files = False
    has_manifest = False
    loads_with_pst_ds = False
    runtime = "ONNX Runtime"
    why_no_generation = "has a graph without a cache"
    activations_text = 'format = "onnx" with quantised weights'

    def problem(self, values: Grid | None, embeddings: Grid | None) -> str:
        """Return "": the folder that the graph is made from is checked instead."""
        return ""

    def quantises_activations(self, settings: Any) -> bool:
        return not settings.plain and settings.values in VALUE_BITS

    def made_from(self, *, plain: bool) -> str:
        if plain:
            return "dense"
        return "bitmask"  # the layout that the custom operators read

    def convert(self, folder: Path, out: Path, facts: Mapping[str, object], settings: Any) -> dict[str, object]:
        from pst_ds.inference.onnx.folder import write_onnx

        return write_onnx(folder, out, facts, plain=settings.plain, activation_bits=settings.activation_bits)

    def require_free(self, out: Path) -> None:
        from pst_ds.inference.onnx.folder import require_free

        require_free(out)

    def require_model(self, model: Any) -> None:
        from pst_ds.inference.onnx.folder import require_graph

        require_graph(model)

    def export_lines(self, out: str, report: Mapping[str, Any], settings: Any) -> list[str]:
        weights = f"{report['sparse_nodes']} sparse products"
        if settings.plain:
            weights = "dense weights"
        difference = report["max_relative_difference"]
        if difference is None:
            compared = "not run: no onnxruntime"
        else:
            compared = f"outputs within {difference:.1g} of the model's"
        return [
            f"wrote {Path(out) / ONNX_FILE}: {report['nodes']} nodes, {weights}, {report['file_bytes']:,} bytes; "
            f"{compared}"
        ]

    def opens(self, path: Path) -> bool:
        return (path / ONNX_FILE).is_file()

    def encoder(self, path: Path, output: str, threads: int | None) -> Callable[[dict[str, Any]], Any]:
        import numpy as np
        import torch

        from pst_ds.inference.onnx.operators import open_session

        session = open_session(path / ONNX_FILE, threads or torch.get_num_threads())
        # The graph has only the inputs that the model reads; a tokenizer may return more.
        inputs = [value.name for value in session.get_inputs()]

        def model(batch: dict[str, Any]) -> Any:
            (result,) = session.run([output], {name: batch[name] for name in inputs})
            return np.asarray(result)

        return model

    def model_of(self, path: Path) -> Callable[..., Any]:
        from pst_ds.export.verify.onnx import OnnxModel  # ONNX Runtime is optional

        return OnnxModel(path / ONNX_FILE, exact=False)

    def recognises(self, path: Path) -> bool:
        # A folder with both is a model folder that also has a graph, as many on the hub do.
        return (path / ONNX_FILE).is_file() and not any(path.glob("*.safetensors"))

    def check(self, path: Path) -> dict[str, object]:
        """Compare the files with the manifest, and open the graph in ONNX Runtime."""
        from pst_ds.export.verify.onnx import facts_of_file

        return facts_of_file(path)

    def comparison(self, path: Path, run: str) -> Callable[..., Any]:
        from pst_ds.export.verify.onnx import compare_onnx_with_run

        return compare_onnx_with_run

    def verify_lines(self, export: str, file: Mapping[str, Any]) -> Iterator[str]:
        without_sha256 = list[str](file["without_sha256"])
        checked = "as in the manifest, and ONNX Runtime opens it"
        if without_sha256:
            checked = "ONNX Runtime opens it"
        yield f"{Path(export) / ONNX_FILE}: {file['file_bytes']:,} bytes, {checked}; outputs {file['outputs']}"
        if without_sha256:
            yield (
                f"NOT VERIFIED: the content of {shortened(without_sha256)}, of which the manifest of an older version "
                "has no SHA-256. Export the run again"
            )

    def inspection_hint(self, path: Path) -> str:
        return f"{path} is an ONNX export. Show its graph with netron; check it with pst-ds verify {path}"
