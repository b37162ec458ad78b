"""Files of the compared decoders: folders of pst-ds and GGUF files of llama.cpp, made if missing.

In a top folder, ``dense`` is the model, ``zeros-50`` the same at 50 % sparsity (both from tools/fetch_smollm2.py, or
copied there), ``int8-50`` what `pst-ds export` packs from it, and ``Q8_0.gguf`` llama.cpp's quantisation of ``dense``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pst_ds.errors import InputError
from tools.bench.peers.engines import llama_cpp
from tools.bench.timing import progress
from tools.verbs import verb

KINDS = ("BF16", "Q8_0", "Q4_0")
"""Kinds of GGUF files."""


def smollm2_folder(top: Path, share: float) -> Path:
    """Return ``top``/dense, or for a sparsity ``share`` above 0 ``top``/zeros-50 or the like, pruned by magnitude."""
    from tools.fetch_smollm2 import dense_folder, pruned_folder

    return pruned_folder(top, share) if share else dense_folder(top)


def packed_folder(top: Path, values: str, share: float) -> Path:
    """Return ``top``/int8-50 or the like, with ``values`` "int8" or "int4" and int8 embeddings."""
    out = top / f"{values}-{100 * share:g}"
    if not (out / "config.json").is_file():
        progress(f"exporting {out}")
        layout = "bitmask" if share else "dense"
        options = ["--format", layout, "--values", values, "--embeddings", "int8", "--quiet", "--out", str(out)]
        verb("export", str(smollm2_folder(top, share)), *options)
    return out


def gguf_file(top: Path, kind: str) -> Path:
    """Return ``top``/Q8_0.gguf or the like, of one of :data:`KINDS`. Raises InputError."""
    out = top / f"{kind}.gguf"
    if out.is_file():
        return out
    if kind == "BF16":
        progress(f"writing {out}")
        verb(
            "export", str(smollm2_folder(top, 0.0)), "--format", "gguf", "--dtype", "bf16", "--quiet", "--out", str(out)
        )
        return out
    progress(f"quantising {out}")
    quantised_gguf(gguf_file(top, "BF16"), out, kind, {})
    return out


def quantised_gguf(dense: Path, out: Path, kind: str, importance: Mapping[str, NDArray[np.float32]]) -> None:
    """Let llama.cpp quantise ``dense`` to a file type such as "Q4_K_M". Raises InputError.

    ``importance``: of the inputs of some tensors, by their names, or nothing.
    """
    library = llama_cpp()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    entries = (library.llama_model_imatrix_data * (len(importance) + 1))()  # an empty name ends the list
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        settings.imatrix = entries
    partial = out.with_suffix(".part")
    code = library.llama_model_quantize(str(dense).encode(), str(partial).encode(), settings)
    if code:
        raise InputError(f"llama.cpp quantised {dense} to {kind} with error {code}; remove the file and try again")
    partial.replace(out)


def weight_bytes(path: Path) -> int:
    """Return the bytes of a GGUF file, or of the weight files of a folder."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def evenly_spaced_chunks(text: str, tokenizer: Any, chunks: int, length: int) -> list[list[int]]:
    """Return ``chunks`` pieces of ``length`` tokens, spread evenly over ``text``. Raises InputError."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) < chunks * length:
        raise InputError(f"the text has {len(ids):,} tokens; {chunks} chunks of {length} take {chunks * length:,}")
    return [ids[start : start + length] for start in (at * len(ids) // chunks for at in range(chunks))]
