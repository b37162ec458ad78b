"""Format "gguf": one file for llama.cpp, with blocks of 32 weights that share a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import require_writable
from pst_ds.errors import ExportError, InputError
from pst_ds.storage_format import EMBEDDINGS, VALUES, StorageFormat


class Gguf(StorageFormat):
    """Needs the package gguf, and a model family that llama.cpp knows."""

    name = "gguf"
    purpose = "one file for llama.cpp"
    quantises = (VALUES, EMBEDDINGS)
    default_group = 32
    has_weight_files = False
    has_manifest = False
    writes_one_file = True
    keeps_stacks_in_pieces = True
    fills_stacks_by_expert = True
    loads_with_pst_ds = False
    engine = "llama.cpp"

    def require_free(self, out: Path) -> None:
        # An older file is replaced. The suffix keeps a mistyped name from replacing a file of another kind.
        if out.suffix != ".gguf" or out.is_dir():
            raise ExportError(
                f"out = {str(out.absolute())!r} must be one file for llama.cpp. Give it a name that ends in .gguf"
            )
        require_writable(out, f"out = {str(out)!r}")

    def require_model(self, model: Any) -> None:
        from pst_ds.writing.gguf.model import require_gguf

        require_gguf(model)

    def write_file(
        self, jobs: Sequence[Any], source: Any, config: Any, tokenizer: Any, out: Path, encoding: Any
    ) -> dict[str, object]:
        from pst_ds.writing.gguf.model import write_gguf

        return write_gguf(jobs, source, config, tokenizer, out, encoding)

    def export_lines(self, out: str, report: Mapping[str, Any], settings: Any) -> list[str]:
        inexact = report["inexact_scales"]
        changed = ""
        if inexact:  # llama.cpp's blocks have fp16 scales, ours are bf16 with a larger range
            changed = f"; fp16 holds {inexact} scales only approximately"
        return [
            f"wrote {out}: {report['rounded_tensors']} of {report['tensors']} tensors in blocks, "
            f"{report['file_bytes']:,} bytes, {report['bits_per_weight']:.2f} bits per weight{changed}"
        ]

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".gguf"

    def check(self, path: Path) -> dict[str, object]:
        """Compare the file with the SHA-256 inside it."""
        from pst_ds.writing.gguf.seal import check_gguf

        return check_gguf(path)

    def comparison(self, path: Path, run: str) -> Callable[..., Any]:
        """Raise InputError: only llama.cpp computes with the file."""
        raise InputError(f"against = {run!r}: llama.cpp computes {path}, a GGUF file, and pst-ds cannot. Omit it")

    def verify_lines(self, export: str, file: Mapping[str, Any]) -> Iterator[str]:
        yield f"{export}: {file['file_bytes']:,} bytes, with the SHA-256 that the export wrote into it"

    def inspection_hint(self, path: Path) -> str:
        # a folder may have any name
        if not path.is_file():
            return ""
        return f"{path} is a GGUF file. Show its tensors with gguf-dump; check it with pst-ds verify {path}"
